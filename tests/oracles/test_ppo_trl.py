"""PPO against the last TRL that had a PPOTrainer, by numbers that its own training loop gave.

scripts/ppo_trl_oracle.py made data/ppo_trl.json with it, and says what of that is TRL's code. Its replies fill the
buffer in all cases but one, because TRL pays a shorter reply's score one position after its end token, in a state that
only padding has; for that case the rules are compared with that position as a step of the episode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.algorithms.test_grpo import attempt, groups_of, row

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.ppo import PPO
from sapwood.ops.gae import gae, whiten
from sapwood.types import Row

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "ppo_trl.json").read_text())["cases"]
FULL = sorted(set(CASES) - {"ragged"})
SCORED = ("old_logprobs", "reference_logprobs", "values")


def algorithm_of(case: dict[str, Any], **more: Any) -> PPO:
    """TRL's options by our names."""
    options = case["options"]
    return PPO(
        kl_coef=options["kl_coef"],
        kl_estimator=options["kl_estimator"],
        gamma=options["gamma"],
        gae_lambda=options["lam"],
        whiten_rewards="batch" if options["whiten_rewards"] else "none",
        clip_low=options["cliprange"],
        clip_high=options["cliprange"],
        value_clip=options["cliprange_value"],
        value_coef=options["vf_coef"],
        **more,
    )


def credited(case: dict[str, Any], **more: Any) -> tuple[list[Row], dict[str, float]]:
    """One trajectory a row, paid its score."""
    groups = groups_of([attempt(score, (score,)) for score in case["scores"]])
    rows = [
        row(0, i, (0,) * length, **{name: case[name][i][:length] for name in SCORED})
        for i, length in enumerate(case["lengths"])
    ]
    return algorithm_of(case, **more).credit(groups, rows)


def stacked(rows: list[Row], name: str) -> np.ndarray:
    return np.stack([getattr(r, name) for r in rows])


@pytest.mark.parametrize("name", FULL)
def test_advantages_and_returns(name: str) -> None:
    case = CASES[name]
    raw, metrics = credited(case, whiten_advantages=False)
    np.testing.assert_allclose(stacked(raw, "advantages"), case["advantages"], rtol=1e-5, atol=1e-5)
    whitened, _ = credited(case)
    np.testing.assert_allclose(stacked(whitened, "advantages"), case["whitened"], rtol=1e-5, atol=1e-5)
    returns = np.array(case["advantages"]) + np.array(case["values"])
    np.testing.assert_allclose(stacked(whitened, "returns"), returns, rtol=1e-5, atol=1e-5)
    logged = case["logged"]
    assert metrics["reward"] == pytest.approx(logged["objective/scores"], rel=1e-5)
    assert metrics["kl"] * case["lengths"][0] == pytest.approx(logged["objective/kl"], rel=1e-5, abs=1e-5)
    assert metrics["kl_penalty"] == pytest.approx(-logged["objective/non_score_reward"], rel=1e-5, abs=1e-5)


def test_the_cases_differ() -> None:
    """A case that equals another one would test nothing."""
    plain = np.array(CASES["plain"]["whitened"])
    assert all(np.abs(plain - np.array(CASES[name]["whitened"])).max() > 0.1 for name in FULL if name != "plain")
    assert all(CASES[name]["logged"]["policy/clipfrac_avg"] > 0.0 for name in FULL)
    assert all(CASES[name]["logged"]["val/clipfrac_avg"] > 0.0 for name in FULL)


@pytest.mark.parametrize("name", FULL)
def test_losses_gradients_and_clip_fractions(name: str) -> None:
    case = CASES[name]
    rows, _ = credited(case)
    new = torch.tensor(case["logprobs"]).requires_grad_()
    values = torch.tensor(case["new_values"]).requires_grad_()
    forward = Forward(new.flatten(), values=values.flatten())
    output = algorithm_of(case).loss(forward, RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    metrics, logged = {k: float(v) for k, v in output.metrics.items()}, case["logged"]
    assert metrics["loss"] == pytest.approx(case["loss"], rel=1e-5, abs=1e-6)
    assert metrics["policy_loss"] == pytest.approx(logged["loss/policy_avg"], rel=1e-5, abs=1e-6)
    assert metrics["value_loss"] == pytest.approx(logged["loss/value_avg"], rel=1e-5)
    assert metrics["value_clip_fraction"] == pytest.approx(logged["val/clipfrac_avg"])
    clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert clipped == pytest.approx(logged["policy/clipfrac_avg"])
    assert metrics["ratio"] == pytest.approx(logged["val/ratio"], rel=1e-5)
    for ours, theirs in ((new.grad, "logprob_gradients"), (values.grad, "value_gradients")):
        assert ours is not None
        torch.testing.assert_close(ours, torch.tensor(case[theirs]), rtol=1e-5, atol=1e-7)


def test_reward_whitening() -> None:
    case = CASES["whitened_rewards"]
    ours = whiten(np.array(case["rewards"]).flatten(), shift_mean=False)
    np.testing.assert_allclose(ours, np.array(case["whitened_rewards"]).flatten(), rtol=1e-5, atol=1e-5)


def test_replies_of_different_length() -> None:
    """GAE with TRL's further position as a step; whitening and policy loss over the tokens alone."""
    case = CASES["ragged"]
    options, width = case["options"], len(case["values"][0])
    assert len(set(case["lengths"])) > 2
    flat, whitened = [], []
    for i, length in enumerate(case["lengths"]):
        steps = min(length + 1, width)
        difference = np.array(case["old_logprobs"][i]) - np.array(case["reference_logprobs"][i])
        rewards = np.where(np.arange(width) < length, -options["kl_coef"] * difference, 0.0)[:steps]
        rewards[-1] += case["scores"][i]
        values = case["values"][i][:steps]
        ours = gae(rewards, values, bootstrap=0.0, gamma=options["gamma"], lam=options["lam"])
        np.testing.assert_allclose(ours, case["advantages"][i][:steps], rtol=1e-5, atol=1e-5)
        flat += ours[:length].tolist()
        whitened += case["whitened"][i][:length]
    np.testing.assert_allclose(whiten(flat), whitened, rtol=1e-5, atol=1e-5)
    rows, _ = credited(case)
    cuts = np.cumsum(case["lengths"])[:-1]
    for made, advantages in zip(rows, np.split(np.array(whitened, np.float32), cuts), strict=True):
        made.advantages = advantages
    chosen = [case["logprobs"][i][:length] for i, length in enumerate(case["lengths"])]
    new = torch.tensor([value for part in chosen for value in part])
    forward = Forward(new, values=torch.zeros(len(new)))
    metrics = algorithm_of(case).loss(forward, RowBatch.of(rows), Totals.of(rows)).metrics
    assert float(metrics["policy_loss"]) == pytest.approx(case["logged"]["loss/policy_avg"], rel=1e-5)
    clipped = float(metrics["clip_fraction_low"] + metrics["clip_fraction_high"])
    assert clipped == pytest.approx(case["logged"]["policy/clipfrac_avg"])
