"""Policy-gradient losses against numbers worked by hand, with the signs of their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.ops.losses import (
    aggregate,
    cispo_loss,
    clipped_loss,
    gap_weights,
    log_ratio,
    row_mean,
    row_sum,
    sapo_loss,
    value_loss,
    vespo_loss,
)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


def clip_with_gradient(ratio: list[float], advantage: list[float], dual: float | None = None) -> tuple[list, list]:
    """Loss per token and its gradient by the ratio; bounds 0.8 and 1.3."""
    r = torch.tensor(ratio, requires_grad=True)
    loss = clipped_loss(r, torch.tensor(advantage), clip_low=0.2, clip_high=0.3, clip_dual=dual)
    (gradient,) = torch.autograd.grad(loss.sum(), r)
    return loss.tolist(), gradient.tolist()


def test_clip_where_the_advantage_is_positive() -> None:
    # A = 2. r = 0.5: min(1, 1.6) = 1, free to rise. r = 1.2: 2.4. r = 1.5: min(3, 2.6) = 2.6, no gradient.
    loss, gradient = clip_with_gradient([0.5, 1.2, 1.5], [2.0, 2.0, 2.0])
    assert loss == pytest.approx([-1.0, -2.4, -2.6])
    assert gradient == pytest.approx([-2.0, -2.0, 0.0])


def test_clip_where_the_advantage_is_negative() -> None:
    # A = -2. r = 0.5: min(-1, -1.6) = -1.6, no gradient. r = 0.9: -1.8. r = 5: min(-10, -2.6) = -10, unbounded.
    loss, gradient = clip_with_gradient([0.5, 0.9, 5.0], [-2.0, -2.0, -2.0])
    assert loss == pytest.approx([1.6, 1.8, 10.0])
    assert gradient == pytest.approx([0.0, 2.0, 2.0])


def test_dual_clip_bounds_the_negative_side_only() -> None:
    # delta 3. A = -2: r = 5 counts as 3, loss 6, no gradient; r = 2.5 is free, loss 5. A = 2 clips at 1.3 as ever.
    loss, gradient = clip_with_gradient([5.0, 2.5, 5.0], [-2.0, -2.0, 2.0], dual=3.0)
    assert loss == pytest.approx([6.0, 5.0, -2.6])
    assert gradient == pytest.approx([0.0, 2.0, 0.0])


def test_cispo_keeps_the_gradient_of_capped_tokens() -> None:
    # r = 4 is capped at 1.5; loss = -1.5 * 2 * log p, gradient by log p is -3. r = 0.5 is not raised: -0.5 * -1.
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = cispo_loss(logprobs, tensor(4.0, 0.5), tensor(2.0, -1.0), clip_high=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert loss.tolist() == pytest.approx([3.0, -1.0])
    assert gradient.tolist() == pytest.approx([-3.0, 0.5])


def test_sapo_gate() -> None:
    # r = 1: sigmoid 0.5, loss -(4 / tau) * 0.5 * A = -2 A / tau; gradient -(4 / tau) * tau * 0.25 * A = -A for any tau.
    # r = 3, A = 1, tau = 1: -4 * sigmoid(2) = -4 * 0.880797; gradient -4 * 0.880797 * 0.119203 = -0.419974.
    r = torch.tensor([1.0, 1.0, 3.0], requires_grad=True)
    loss = sapo_loss(r, tensor(1.0, -1.0, 1.0), temperature_pos=1.0, temperature_neg=2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), r)
    assert loss.tolist() == pytest.approx([-2.0, 1.0, -3.523188], rel=1e-6)
    assert gradient.tolist() == pytest.approx([-1.0, 1.0, -0.419974], rel=1e-5)


def test_vespo_weight() -> None:
    # One row of two tokens, log-ratios summing to ln 2: w = 2, A = 1, (k, lambda) = (2, 3): phi = 4 * e^-3 = 0.199148.
    # A row on policy: phi = 1. A < 0, w = 0.5, (3, 2): phi = 0.125 * e = 0.339785.
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    loss = vespo_loss(
        logprobs,
        tensor(math.log(4.0), -math.log(2.0), 0.0, -math.log(2.0)),
        tensor(1.0, 1.0, 1.0, -1.0),
        torch.tensor([2, 1, 1]),
        gap_weights=None,
        positive=(2.0, 3.0),
        negative=(3.0, 2.0),
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-0.199148, -0.199148, -1.0, 0.339785], rel=1e-5)


def test_log_ratio_levels() -> None:
    # Rows of 2 and 1 tokens: differences (0.2, 0.4) and (-0.3); the sequence level has the means 0.3 and -0.3.
    new, old, lengths = tensor(-1.0, -2.0, -3.0), tensor(-1.2, -2.4, -2.7), torch.tensor([2, 1])
    assert log_ratio(new, old, lengths, "token").tolist() == pytest.approx([0.2, 0.4, -0.3], rel=1e-5)
    assert log_ratio(new, old, lengths, "sequence").tolist() == pytest.approx([0.3, 0.3, -0.3], rel=1e-5)


def test_gspo_gradient_is_the_row_mean() -> None:
    # s = exp(mean of differences) = 1 on policy, so d(-s A)/d log p_t = -A / length, for each of the row's tokens: the
    # row's loss is counted once a token, hence -A / 2 * 2 tokens = -A for each of two.
    logprobs = tensor(-1.0, -2.0).requires_grad_()
    ratio = log_ratio(logprobs, logprobs.detach(), torch.tensor([2]), "sequence").exp()
    (gradient,) = torch.autograd.grad((-ratio * 3.0).sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-3.0, -3.0])


def test_rows_without_scored_tokens() -> None:
    lengths = torch.tensor([0, 2, 0, 1])
    assert row_sum(tensor(1.0, 3.0, 5.0), lengths).tolist() == [0.0, 4.0, 0.0, 5.0]
    assert row_mean(tensor(1.0, 3.0, 5.0), lengths).tolist() == [0.0, 2.0, 0.0, 5.0]
    assert row_sum(torch.zeros(0), torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("kind", "length", "expected"),
    [
        ("token", None, 9.0 / 10),  # (1 + 3 + 5) over 10 tokens of the update
        ("sequence", None, (2.0 + 5.0) / 4),  # row means 2 and 5 over 4 rows of the update
        ("constant", 8, 9.0 / 32),  # 4 rows of 8
    ],
)
def test_aggregation(kind: Any, length: int | None, expected: float) -> None:
    loss = aggregate(tensor(1.0, 3.0, 5.0), torch.tensor([2, 1]), kind, tokens=10, rows=4, constant_length=length)
    assert float(loss) == pytest.approx(expected)


def test_constant_aggregation_needs_its_length() -> None:
    with pytest.raises(ValueError, match="constant_length"):
        aggregate(tensor(1.0), torch.tensor([1]), "constant", tokens=1, rows=1, constant_length=None)


# Rows of 2 and 1 tokens with token weights 4, 0.5 and 0.25; row products 2 and 0.25.
GAP = torch.tensor([4.0, 0.5, 0.25]).log()


@pytest.mark.parametrize(
    ("level", "mode", "cap", "floor", "expected"),
    [
        ("token", "truncate", 3.0, None, [3.0, 0.5, 0.25]),
        ("token", "truncate", 3.0, 0.4, [3.0, 0.5, 0.4]),
        ("token", "mask", 3.0, None, [0.0, 0.5, 0.25]),
        ("token", "mask", 3.0, 0.4, [0.0, 0.5, 0.0]),
        ("sequence", "truncate", 1.5, None, [1.5, 1.5, 0.25]),
        ("sequence", "mask", 1.5, None, [0.0, 0.0, 0.25]),
        ("sequence", "mask", 3.0, 0.4, [2.0, 2.0, 0.0]),
    ],
)
def test_gap_weights(level: Any, mode: Any, cap: float, floor: float | None, expected: list[float]) -> None:
    weights = gap_weights(GAP, torch.tensor([2, 1]), level=level, mode=mode, cap=cap, floor=floor)
    assert weights.tolist() == pytest.approx(expected)


def test_gap_weights_carry_no_gradient() -> None:
    gap = GAP.clone().requires_grad_()
    weights = gap_weights(gap, torch.tensor([2, 1]), level="token", mode="truncate", cap=9.0, floor=None)
    assert not weights.requires_grad


def test_value_loss_and_its_clip() -> None:
    # Old value 1, clip 0.5. V = 2, R = 3: clipped to 1.5, max(1, 2.25) / 2, no gradient: it has moved far enough.
    # V = 2, R = 0: max(4, 2.25) / 2, free to come back, gradient V - R = 2. V = 1.25, R = 2: inside, 0.5625 / 2.
    values = torch.tensor([2.0, 2.0, 1.25], requires_grad=True)
    old, returns = torch.ones(3), torch.tensor([3.0, 0.0, 2.0])
    loss = value_loss(values, old, returns, 0.5)
    loss.sum().backward()
    assert loss.tolist() == [1.125, 2.0, 0.28125]
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 2.0, -0.75]
    assert value_loss(values, old, returns, None).tolist() == [0.5, 2.0, 0.28125]
