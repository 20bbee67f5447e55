"""Reward models: the pairwise loss and its metrics against numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from sapwood.algorithms import Forward, Needs, RowBatch, Totals
from sapwood.algorithms.reward import RewardModel
from sapwood.errors import DataError
from sapwood.plugins import load
from sapwood.types import Group, Row, Task

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "reward.md"
GROUPS = [Group(Task(str(g)), []) for g in range(3)]


def row(group: int, member: int, reward: float = 0.0) -> Row:
    """One reply of a pair; `reward` is the data's."""
    mask, turn = np.array([False, True]), np.zeros(1, np.int32)
    return Row(np.array([1, 2 + member]), mask, turn, group=group, member=member, reward=reward)


def pair(group: int, margin: float = 0.0) -> list[Row]:
    return [row(group, 0, margin), row(group, 1)]


def loss_of(rows: list[Row], scores: list[float], **options: Any) -> tuple[float, list[float], dict[str, float]]:
    """Loss, gradient by the scores [R] and metrics with their derived ones."""
    head, algorithm = torch.tensor(scores, requires_grad=True), RewardModel(**options)
    output = algorithm.loss(Forward(torch.zeros(0), scores=head), RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert head.grad is not None
    metrics = {name: float(value) for name, value in output.metrics.items()}
    return float(output.loss.detach()), head.grad.tolist(), metrics | algorithm.derived(metrics)


def test_is_the_plugin() -> None:
    assert load("algorithm", "reward") is RewardModel
    assert RewardModel.learns_from == "pairs"
    assert RewardModel.atomic
    assert RewardModel().needs == Needs(logprobs=False, scores=True, entropies=False)


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.5}, {"margin_coef": -1}, {"center_rewards_coefficient": -1}, {"beta": 0.1}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardModel(**options)


def test_bradley_terry() -> None:
    # Differences 2 and -1: -log s(2) = 0.126928, -log s(-1) = 1.313262; slopes -s(-2) / 2 and -s(1) / 2.
    loss, gradient, metrics = loss_of([*pair(0), *pair(1)], [3.0, 1.0, 0.0, 1.0])
    assert loss == pytest.approx((0.126928 + 1.313262) / 2, rel=1e-5)
    assert gradient == pytest.approx([-0.059601, 0.059601, -0.365529, 0.365529], rel=1e-4)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == pytest.approx(0.5)
    assert (metrics["reward_chosen"], metrics["reward_rejected"]) == (1.5, 1.0)
    # (3, 1, 0, 1): mean 1.25, squares sum to 11, variance 11 / 4 - 1.5625 = 1.1875.
    assert metrics["reward_std"] == pytest.approx(math.sqrt(1.1875))


def test_rows_may_come_in_any_order() -> None:
    ordered = loss_of([*pair(0), *pair(1)], [3.0, 1.0, 0.0, 1.0])
    shuffled = loss_of([row(1, 1), row(0, 0), row(0, 1), row(1, 0)], [1.0, 3.0, 1.0, 0.0])
    assert shuffled[0] == pytest.approx(ordered[0])
    assert shuffled[1] == pytest.approx([ordered[1][i] for i in (3, 0, 1, 2)])


def test_margin() -> None:
    # -log s(2 - 0.5) = 0.201413; with margin_coef 2, -log s(1) = 0.313262.
    assert loss_of(pair(0, 0.5), [3.0, 1.0])[0] == pytest.approx(0.201413, rel=1e-5)
    assert loss_of(pair(0, 0.5), [3.0, 1.0], margin_coef=2.0)[0] == pytest.approx(0.313262, rel=1e-5)
    assert loss_of(pair(0, 0.5), [3.0, 1.0], margin_coef=0.0)[0] == pytest.approx(0.126928, rel=1e-5)


def test_centering_pulls_rewards_to_zero() -> None:
    # 0.126928 + 0.01 * (3 + 1)^2; its slope is 0.01 * 2 * 4 on both.
    loss, gradient, _ = loss_of(pair(0), [3.0, 1.0], center_rewards_coefficient=0.01)
    assert loss == pytest.approx(0.286928, rel=1e-5)
    assert gradient == pytest.approx([-0.119203 + 0.08, 0.119203 + 0.08], rel=1e-4)


def test_label_smoothing() -> None:
    # 0.9 * -log s(2) + 0.1 * -log s(-2) = 0.9 * 0.126928 + 0.1 * 2.126928.
    assert loss_of(pair(0), [3.0, 1.0], label_smoothing=0.1)[0] == pytest.approx(0.326928, rel=1e-5)


def test_equal_rewards_count_half() -> None:
    loss, _, metrics = loss_of(pair(0), [1.0, 1.0])
    assert loss == pytest.approx(math.log(2.0), abs=1e-7)
    assert metrics["accuracy"] == 0.5
    assert metrics["reward_std"] == 0.0
    assert RewardModel().derived({"learning_rate": 0.1}) == {}


def test_large_margins_are_stable() -> None:
    loss, gradient, _ = loss_of(pair(0), [-5000.0, 5000.0])
    assert loss == pytest.approx(10000.0)
    assert gradient == [-1.0, 1.0]


def test_credit_leaves_broken_pairs_out() -> None:
    rows = [*pair(0), row(1, 0), *pair(2)]
    kept, metrics = RewardModel().credit(GROUPS, rows)
    assert [(r.group, r.member) for r in kept] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert metrics == {"incomplete_share": pytest.approx(1 / 3)}
    with pytest.raises(DataError, match=r"pair 0 .* replies \[0, 0, 1\]"):
        RewardModel().credit(GROUPS, [row(0, 0), *pair(0)])


def test_missing_scores_are_named() -> None:
    with pytest.raises(ValueError, match="needs scores"):
        RewardModel().loss(Forward(torch.zeros(0)), RowBatch.of(pair(0)), Totals.of(pair(0)))


def test_packing_changes_nothing() -> None:
    rows = [r for g in range(6) for r in pair(g, 0.1 * g)]
    totals, scores = Totals.of(rows), torch.randn(12)
    algorithm = RewardModel(center_rewards_coefficient=0.1)
    results = []
    for size in (12, 4, 2):
        head, loss, metrics = scores.clone().requires_grad_(), 0.0, dict[str, float]()
        for first in range(0, 12, size):
            batch = RowBatch.of(rows[first : first + size])
            output = algorithm.loss(Forward(torch.zeros(0), scores=head[first : first + size]), batch, totals)
            output.loss.backward()
            loss += float(output.loss.detach())
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in output.metrics.items()}
        results.append((loss, metrics, head.grad))
    for part in results[1:]:
        assert part[0] == pytest.approx(results[0][0], rel=1e-6)
        assert part[1] == pytest.approx(results[0][1], rel=1e-5, abs=1e-7)
        torch.testing.assert_close(part[2], results[0][2], rtol=1e-6, atol=1e-9)


def test_the_document() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in RewardModel.model_fields if f"`{name}`" not in text] == []
    logged = {"incomplete_share", *loss_of(pair(0), [1.0, 0.0])[2]}
    assert [name for name in sorted(logged) if not name.startswith("_") and f"`{name}`" not in text] == []
    for line in text.splitlines():
        if "{name: reward}" in line or "{name: reward," in line:
            options = yaml.safe_load(line[line.index("{") : line.rindex("}") + 1])
            assert options.pop("name") == "reward"
            RewardModel(**options)
