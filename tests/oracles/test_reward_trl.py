"""Reward models against TRL's RewardTrainer.compute_loss: loss, gradient by the rewards and metrics."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.oracles import _trl as peer
from torch import Tensor

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.reward import RewardModel
from sapwood.types import Row

RewardTrainer = pytest.importorskip("trl.trainer.reward_trainer", reason="TRL is the oracle").RewardTrainer

PAIRS = 6


class Scorer:
    """A classifier that returns these rewards, whatever it reads."""

    def __init__(self, rewards: Tensor) -> None:
        self.rewards = rewards

    def __call__(self, **inputs: Tensor | bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rewards[:, None])


def rows_of(margins: Tensor | None) -> list[Row]:
    """All chosen rows, then all rejected ones, as TRL's collator orders them."""
    mask, turn = np.array([False, True]), np.zeros(1, np.int32)
    rows = []
    for member in range(2):
        for g in range(PAIRS):
            # A margin is a difference of rewards, wherever the data puts its zero.
            reward = 2.5 + (float(margins[g]) if margins is not None and member == 0 else 0.0)
            rows.append(Row(np.array([g, member]), mask, turn, group=g, member=member, reward=reward))
    return rows


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_loss_gradient_and_metrics(margin: bool, center: float | None, scale: float) -> None:
    generator = torch.Generator().manual_seed(4)
    rewards = (scale * torch.randn(2 * PAIRS, generator=generator)).requires_grad_()
    margins = torch.rand(PAIRS, generator=generator) if margin else None
    trainer = peer.stand_in(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=center)
    )
    inputs: dict[str, Tensor] = {"attention_mask": torch.ones(2 * PAIRS, 2)}
    if margins is not None:
        inputs["margin"] = margins
    expected = RewardTrainer.compute_loss(trainer, Scorer(rewards), inputs)
    (slope,) = torch.autograd.grad(expected, rewards)

    algorithm, rows = RewardModel(center_rewards_coefficient=center or 0.0), rows_of(margins)
    output = algorithm.loss(Forward(torch.zeros(0), scores=rewards), RowBatch.of(rows), Totals.of(rows))
    (ours,) = torch.autograd.grad(output.loss, rewards)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, slope, rtol=1e-5, atol=1e-7)

    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    found = {name: float(value) for name, value in output.metrics.items()}
    assert found["accuracy"] == pytest.approx(metrics["accuracy"])
    assert found["margin"] == pytest.approx(metrics["margin"], rel=1e-5)
    assert (found["reward_chosen"] + found["reward_rejected"]) / 2 == pytest.approx(metrics["mean_reward"], rel=1e-4)
    assert algorithm.derived(found)["reward_std"] == pytest.approx(float(rewards.detach().std(correction=0)), rel=1e-4)
