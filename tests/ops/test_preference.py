"""Losses of preference learning: values worked by hand, gradients against finite differences, extremes."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood.errors import DataError
from sapwood.ops.batch import RowBatch
from sapwood.ops.preference import (
    Divergence,
    PairLoss,
    Pairs,
    alphapo_reward,
    divergence_score,
    kto_loss,
    log_odds,
    pair_loss,
    preference_accuracy,
    shared_weights,
    smoothed_sigmoid_loss,
    whole_pairs,
)
from sapwood.types import Row

KINDS: tuple[PairLoss, ...] = get_args(PairLoss)


def row(group: int, member: int, tokens: int = 1) -> Row:
    mask = np.array([False] + [True] * tokens)
    return Row(np.arange(tokens + 1), mask, np.zeros(tokens, np.int32), group=group, member=member)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


# --- pairs ----------------------------------------------------------------------------------------------------


def test_pairs_are_found_in_any_order() -> None:
    pairs = Pairs.of(RowBatch.of([row(3, 1), row(1, 0), row(3, 0), row(1, 1)]))
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([1, 2], [3, 0])
    chosen, rejected = pairs.split(torch.tensor([10.0, 11.0, 12.0, 13.0]))
    assert (chosen.tolist(), rejected.tolist()) == ([11.0, 12.0], [13.0, 10.0])


@pytest.mark.parametrize("keys", [[(0, 0)], [(0, 0), (1, 1)], [(0, 0), (0, 0)], [(0, 1), (0, 2)], [(0, 0), (0, 2)]])
def test_broken_pairs_are_refused(keys: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="members 0 and 1"):
        Pairs.of(RowBatch.of([row(*key) for key in keys]))


def test_whole_pairs() -> None:
    rows = [row(0, 1), row(1, 0), row(0, 0)]
    assert whole_pairs(rows, 3) == ([rows[0], rows[2]], pytest.approx(2 / 3))
    assert whole_pairs([], 1) == ([], 1.0)
    with pytest.raises(DataError, match=r"pair 2 .* replies \[0, 1, 1\].*don't restart"):
        whole_pairs([row(2, 0), row(2, 1), row(2, 1)], 1)


def test_preference_accuracy_counts_ties_half() -> None:
    assert preference_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]


def test_shared_weights() -> None:
    # Pair 0: chosen 3, rejected 1; pair 1: chosen 2, rejected 2; rows interleaved.
    rows = [row(1, 0, 2), row(0, 0, 3), row(1, 1, 2), row(0, 1, 1)]
    batch = RowBatch.of(rows)
    weights = shared_weights(batch.lengths, Pairs.of(batch), 0.25)
    assert weights.tolist() == [1, 1, 1, 0.25, 0.25, 1, 1, 1]


# --- losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: PairLoss) -> None:
    """chosen 3, rejected -1, beta 0.5, e 0.1, tau 0.4: bc = 1.5, br = -0.5, m = 2."""
    low, high = sigmoid(-2.0), sigmoid(2.0)
    gate = sigmoid(2.0 / 0.4)
    expected = {
        "sigmoid": -0.9 * math.log(high) - 0.1 * math.log(low),
        "robust": (-0.9 * math.log(high) + 0.1 * math.log(low)) / 0.8,
        "hinge": 0.0,
        "ipo": (4.0 - 1.0) ** 2,
        "exo_pair": high * math.log(high / 0.9) + low * math.log(low / 0.1),
        "nca_pair": -math.log(sigmoid(1.5)) - 0.5 * math.log(sigmoid(-1.5)) - 0.5 * math.log(sigmoid(0.5)),
        "bco_pair": -math.log(sigmoid(1.5)) - math.log(sigmoid(0.5)),
        "sppo_hard": (3.0 - 1.0) ** 2 + (-1.0 + 1.0) ** 2,
        "apo_zero": 1.0 - sigmoid(1.5) + sigmoid(-0.5),
        "apo_down": sigmoid(1.5) + 1.0 - sigmoid(2.0),
        "discopop": (1.0 - gate) * -math.log(high) + gate * math.exp(-2.0),
    }
    one = torch.tensor([3.0]), torch.tensor([-1.0])
    assert float(pair_loss(kind, *one, beta=0.5, smoothing=0.1, tau=0.4)) == pytest.approx(expected[kind], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: PairLoss) -> None:
    scores = torch.tensor([[0.7, -2.0, 5.0], [0.2, 1.0, -3.0]], dtype=torch.float64, requires_grad=True)

    def total(both: Tensor) -> Tensor:
        return pair_loss(kind, both[0], both[1], beta=0.3, smoothing=0.1)

    assert torch.autograd.gradcheck(total, (scores,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [300.0, 5000.0])
def test_large_scores_stay_finite(kind: PairLoss, size: float) -> None:
    for sign in (1.0, -1.0):
        scores = torch.tensor([[sign * size], [-sign * size]], requires_grad=True)
        loss = pair_loss(kind, scores[0], scores[1], beta=0.5, smoothing=0.1).sum()
        loss.backward()
        assert scores.grad is not None
        assert torch.isfinite(loss)
        assert torch.isfinite(scores.grad).all()


def test_sigmoid_keeps_precision_far_out() -> None:
    # -log s(-m) is m for large m, and -log s(m) is exp(-m).
    margins = torch.tensor([-2000.0, 30.0])
    assert smoothed_sigmoid_loss(margins, 0.0).tolist() == pytest.approx([2000.0, math.exp(-30.0)], rel=1e-6)
    assert float(smoothed_sigmoid_loss(torch.zeros(1), 0.2)) == pytest.approx(math.log(2.0), abs=1e-7)


def test_robust_is_unbiased() -> None:
    """Over labels that are flipped with probability e, its mean is the loss of the true labels."""
    one = torch.tensor([1.2]), torch.tensor([-0.4])
    right = pair_loss("robust", *one, beta=0.7, smoothing=0.2)
    wrong = pair_loss("robust", *reversed(one), beta=0.7, smoothing=0.2)
    assert float(0.8 * right + 0.2 * wrong) == pytest.approx(float(pair_loss("sigmoid", *one, beta=0.7)), rel=1e-6)


@pytest.mark.parametrize(
    ("divergence", "alpha", "expected"),
    # t = exp(0.5) = 1.648721.
    [
        ("reverse_kl", 0.5, 0.5),
        ("forward_kl", 0.5, 1 - 1 / 1.648721),
        ("js", 0.5, math.log(2 * 1.648721 / 2.648721)),
        ("alpha", 0.5, (1.648721**-0.5 - 1) / -0.5),
        ("alpha", 0.0, 1 - 1 / 1.648721),
        ("alpha", 1.0, 0.5),
    ],
)
def test_divergences(divergence: Divergence, alpha: float, expected: float) -> None:
    assert float(divergence_score(torch.tensor([0.5]), divergence, alpha)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_divergences_stay_finite(divergence: Divergence) -> None:
    ratios = torch.tensor([-3000.0, 3000.0], requires_grad=True)
    scores = divergence_score(ratios, divergence, 0.5)
    scores.sum().backward()
    assert ratios.grad is not None
    assert torch.isfinite(scores).all()
    assert torch.isfinite(ratios.grad).all()


def test_log_odds() -> None:
    # p = 0.8: log 4; p = 0.2: log 0.25.
    values = log_odds(torch.tensor([math.log(0.8), math.log(0.2)]))
    assert values.tolist() == pytest.approx([math.log(4.0), math.log(0.25)], rel=1e-6)
    # Far down p / (1 - p) is p; at p = 1 the odds are as large as fp32 can tell.
    extreme = torch.tensor([-800.0, 0.0], requires_grad=True)
    odds = log_odds(extreme)
    assert odds.tolist() == pytest.approx([-800.0, 16.118], rel=1e-3)
    odds.sum().backward()
    assert extreme.grad is not None
    assert torch.isfinite(extreme.grad).all()


def test_log_odds_gradient() -> None:
    # d/dx log(e^x / (1 - e^x)) = 1 / (1 - e^x).
    x = torch.tensor([-0.01, -0.6, -0.8, -9.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_odds(x).sum(), x)
    torch.testing.assert_close(slope, 1.0 / (1.0 - x.detach().exp()))


def test_alphapo() -> None:
    # p = 0.5: (1 - 0.5^-1) / 1 = -1; (1 - 0.5^0.5) / -0.5 = -0.585786; alpha 0: log 0.5.
    p = torch.tensor([math.log(0.5)])
    assert float(alphapo_reward(p, 1.0)) == pytest.approx(-1.0)
    assert float(alphapo_reward(p, -0.5)) == pytest.approx(-0.585786, rel=1e-5)
    assert float(alphapo_reward(p, 0.0)) == pytest.approx(math.log(0.5))
    assert torch.isfinite(alphapo_reward(torch.tensor([-1e4]), 1.0)).all()


def test_kto() -> None:
    # beta 0.5, z = 1: 1 - s(0.5 (3 - 1)) and 1 - s(0.5 (1 - 3)).
    loss = kto_loss(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), 1.0, 0.5)
    assert loss.tolist() == pytest.approx([1 - sigmoid(1.0), 1 - sigmoid(-1.0)], rel=1e-6)
    far = kto_loss(torch.tensor([1e4, -1e4]), torch.tensor([True, True]), 0.0, 0.5)
    assert far.tolist() == [0.0, 1.0]
