"""Advantages against numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sapwood.ops.advantages import all_equal, group_relative, returns_to_go, sibling_std

# Two groups: (1, 2, 6) has mean 3 and sample variance (4 + 1 + 9) / 2 = 7; (0, 4) has mean 2 and variance 8.
VALUES = torch.tensor([1.0, 0.0, 2.0, 6.0, 4.0], dtype=torch.float64)
CELL = torch.tensor([0, 1, 0, 0, 1])


def advantages(baseline: Any, scale: Any, epsilon: float = 1e-12) -> list[float]:
    return group_relative(VALUES, CELL, baseline=baseline, scale=scale, epsilon=epsilon).tolist()


def test_mean_baseline() -> None:
    assert advantages("mean", "none") == pytest.approx([-2.0, -2.0, -1.0, 3.0, 2.0])


def test_leave_one_out() -> None:
    # 1 - (2 + 6)/2 = -3; 0 - 4; 2 - (1 + 6)/2 = -1.5; 6 - (1 + 2)/2 = 4.5; 4 - 0.
    assert advantages("loo", "none") == pytest.approx([-3.0, -4.0, -1.5, 4.5, 4.0])


def test_group_scale() -> None:
    a, b = math.sqrt(7), math.sqrt(8)
    assert advantages("mean", "group") == pytest.approx([-2 / a, -2 / b, -1 / a, 3 / a, 2 / b])


def test_batch_scale() -> None:
    # All five: mean 2.6, squares 2.56 + 6.76 + 0.36 + 11.56 + 1.96 = 23.2, sample variance 5.8.
    s = math.sqrt(5.8)
    assert advantages("mean", "batch") == pytest.approx([-2 / s, -2 / s, -1 / s, 3 / s, 2 / s])


def test_epsilon_is_added_to_the_deviation() -> None:
    # The second group: 2 / (sqrt(8) + 0.5).
    assert advantages("mean", "group", epsilon=0.5)[4] == pytest.approx(2 / (math.sqrt(8) + 0.5))


@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_lone_value_has_no_advantage(baseline: Any, scale: Any) -> None:
    values, cell = torch.tensor([5.0, 1.0, 3.0], dtype=torch.float64), torch.tensor([7, 2, 2])
    result = group_relative(values, cell, baseline=baseline, scale=scale, epsilon=1e-4)
    assert result[0] == 0.0
    assert result[1] < 0.0 < result[2]


def test_sibling_std_of_one_is_zero() -> None:
    assert sibling_std(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([1, 0, 0])).tolist() == pytest.approx(
        [0.0, math.sqrt(2), math.sqrt(2)]
    )


def test_returns_to_go() -> None:
    # gamma 0.5 over (1, 2, 4): 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3.
    assert returns_to_go(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    assert returns_to_go(torch.tensor([1.0, 2.0, 4.0]), 0.0).tolist() == [1.0, 2.0, 4.0]
    assert returns_to_go(torch.tensor([]), 1.0).tolist() == []


def test_all_equal_ignores_rounding_only() -> None:
    assert all_equal(torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64))
    assert all_equal(torch.tensor([7.0]))
    assert not all_equal(torch.tensor([0.3, 0.30001], dtype=torch.float64))
    assert all_equal(torch.tensor([1e9, 1e9 + 1], dtype=torch.float64))
