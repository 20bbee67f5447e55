"""PPO's options: credit, loss, schedules and controllers against numbers worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from tests.algorithms.test_grpo import attempt, groups_of, row
from tests.learning import save_tiny_model

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.ppo import PPO
from sapwood.config import parse_recipe
from sapwood.errors import DataError
from sapwood.plugins import load
from sapwood.train import train
from sapwood.types import Group, Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "ppo.md"
PLAIN: dict[str, Any] = {"kl_coef": 0.0, "whiten_advantages": False}


def credited(algorithm: PPO, groups: list[Group], rows: list[Row]) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of the rows."""
    kept, _ = algorithm.credit(groups, rows)
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    for r in kept:
        assert r.advantages is not None
        assert r.returns is not None
        found[0].append(r.advantages.tolist())
        found[1].append(r.returns.tolist())
    return found


# --- options --------------------------------------------------------------------------------------------------


def test_is_the_plugin() -> None:
    assert load("algorithm", "ppo") is PPO
    assert PPO(group_size=2).attempts == 2
    assert PPO().learns_from == "rollouts"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_floor": 0.05}, "clip_floor: 0.05 has no effect; set clip_schedule: linear"),
        ({"epochs": 1, "target_kl": 0.1}, "target_kl: 0.1 has no effect; set epochs or updates above 1"),
        ({"epochs": 1, "js_coef": 0.1}, "js_coef: 0.1 has no effect; set epochs or updates above 1"),
        ({"clip_schedule": "linear", "clip_low": 0.05}, "must not exceed clip_low and clip_high"),
        ({"entropy_schedule": "linear"}, "set an entropy_coef"),
        ({"entropy_coef": 0.01, "entropy_floor": 0.005}, "set entropy_schedule: linear"),
        ({"entropy_coef": 0.01, "entropy_schedule": "linear", "entropy_floor": 0.1}, "must not exceed entropy_coef"),
        ({"kl_coef": 0.0, "kl_control": "multiplicative"}, "set a kl_coef"),
        ({"kl_control": "proportional"}, "needs kl_target"),
        ({"kl_target": 0.02}, "set kl_control: proportional"),
        ({"kl_up": 2.0}, "set kl_control: multiplicative"),
        ({"kl_control": "multiplicative", "kl_low": 0.1}, "must not exceed kl_high"),
        ({"kl_ratio_weight": False}, "set kl_in: loss"),
        ({"aggregation": "constant"}, "divides by constant_length"),
        ({"ppo_epochs": 4}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        PPO(**options)


def test_resolved_options_are_valid() -> None:
    assert PPO(**PPO().model_dump()) == PPO()
    everything = PPO(kl_control="proportional", kl_target=0.02, clip_schedule="linear", clip_decay_updates=10)
    assert PPO(**everything.model_dump()) == everything


def test_needs() -> None:
    assert PPO().needs.values
    assert PPO().needs.old_logprobs
    assert PPO().needs.reference_logprobs
    assert not PPO(kl_coef=0.0).needs.reference_logprobs
    assert not PPO(kl_coef=0.0, epochs=1).needs.old_logprobs
    assert PPO(kl_coef=0.0, epochs=1, updates=2).needs.old_logprobs
    assert not PPO().needs.entropy_grad
    assert PPO(entropy_coef=0.01).needs.entropy_grad


# --- credit ---------------------------------------------------------------------------------------------------


def test_the_reward_is_paid_at_the_last_token() -> None:
    # gamma 1, lambda 0.5, V (1, 2, 0), reward 4 at the end: delta (1, -2, 4); A_2 = 4, A_1 = -2 + 2 = 0, A_0 = 1.
    algorithm = PPO(**PLAIN, gae_lambda=0.5)
    advantages, returns = credited(algorithm, groups_of([attempt(4)]), [row(0, 0, (0, 0, 0), values=[1, 2, 0])])
    assert advantages == [[1.0, 0.0, 4.0]]
    assert returns == [[2.0, 2.0, 4.0]]


def test_truncated_trajectories_are_bootstrapped_and_terminated_ones_are_not() -> None:
    # lambda 1, gamma 0.5, V (1, 1), reward 2, V after the end 4.
    # Cut: R = (0 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4) = (2, 4). Ended: (1, 2).
    algorithm = PPO(**PLAIN, gae_lambda=1.0, gamma=0.5)
    groups = groups_of([attempt(2, truncated=True), attempt(2, terminated=True), attempt(2)])
    rows = [row(0, m, (0, 0), values=[1, 1]) for m in range(3)]
    for r in rows:
        r.bootstrap = 4.0
    advantages, returns = credited(algorithm, groups, rows)
    assert returns == [[2.0, 4.0], [1.0, 2.0], [1.0, 2.0]]
    assert advantages == [[1.0, 3.0], [0.0, 1.0], [0.0, 1.0]]


def test_rewards_of_turns_are_paid_at_their_last_tokens() -> None:
    # The environment paid 1 and 2, the total is 5: 2 more at the end. lambda 1, V 0: returns to go 5, 5, 4, 4.
    groups = groups_of([attempt(5, (1.0, 2.0))])
    advantages, _ = credited(PPO(**PLAIN, gae_lambda=1.0), groups, [row(0, 0, (0, 0, 1, 1), values=[0] * 4)])
    assert advantages == [[5.0, 5.0, 4.0, 4.0]]


def test_rows_of_a_trajectory_are_chained_in_the_order_of_its_turns() -> None:
    # Turn 1 restarted the conversation, so it is a row of its own, here handed in first. gamma 1, lambda 0.5,
    # V: turn 0 (1, 2), turn 1 (3). delta: 2 - 1 = 1; 1 + 3 - 2 = 2; 4 - 3 = 1. A: 1; 2 + 0.5; 1 + 1.25.
    groups = groups_of([attempt(5, (1.0, 4.0))])
    rows = [row(0, 0, (1,), values=[3]), row(0, 0, (0, 0), values=[1, 2])]
    kept, _ = PPO(**PLAIN, gae_lambda=0.5).credit(groups, rows)
    by_turn = {int(r.turn[0]): r.advantages.tolist() for r in kept if r.advantages is not None}
    assert by_turn == {0: [2.25, 2.5], 1: [1.0]}
    # The value after the end is that of the last turn's row.
    rows[0].bootstrap, rows[1].bootstrap = 10.0, -50.0
    cut = groups_of([attempt(5, (1.0, 4.0), truncated=True)])
    kept, _ = PPO(**PLAIN, gae_lambda=0.5).credit(cut, rows)
    by_turn = {int(r.turn[0]): r.advantages.tolist() for r in kept if r.advantages is not None}
    assert by_turn == {0: [4.75, 7.5], 1: [11.0]}  # 10 more at the end, times 0.5 a token before it


def test_turns_as_steps() -> None:
    # Turn values are those of their first tokens: 1 and 3; rewards 1 and 4. gamma 0.5, lambda 0.5:
    # delta_1 = 4 - 3 = 1; delta_0 = 1 + 0.5 * 3 - 1 = 1.5; A_0 = 1.5 + 0.25. Returns 2.75 and 4.
    groups = groups_of([attempt(5, (1.0, 4.0))])
    algorithm = PPO(**PLAIN, credit_level="turn", gamma=0.5, gae_lambda=0.5)
    advantages, returns = credited(algorithm, groups, [row(0, 0, (0, 0, 1, 1, 1), values=[1, 9, 3, 9, 9])])
    assert advantages == [[1.75, 1.75, 1.0, 1.0, 1.0]]
    assert returns == [[2.75, 2.75, 4.0, 4.0, 4.0]]


def test_kl_in_the_reward_of_each_token() -> None:
    # k1: (0.5, -0.25) times 0.1; reward 1 at the end. lambda 1, V 0: returns 1 - 0.05 + 0.025 and 1.025.
    arrays = {"old_logprobs": [-1.0, -1.25], "reference_logprobs": [-1.5, -1.0], "values": [0, 0]}
    algorithm = PPO(kl_coef=0.1, whiten_advantages=False, gae_lambda=1.0)
    kept, metrics = algorithm.credit(groups_of([attempt(1)]), [row(0, 0, (0, 0), **arrays)])
    assert kept[0].advantages == pytest.approx([0.975, 1.025])
    assert metrics["kl"] == pytest.approx(0.125)
    assert metrics["kl_penalty"] == pytest.approx(0.025)
    # With turns as steps each turn pays for its own.
    by_turn = PPO(kl_coef=0.1, whiten_advantages=False, gae_lambda=1.0, credit_level="turn")
    kept, _ = by_turn.credit(groups_of([attempt(1, (0.0, 1.0))]), [row(0, 0, (0, 1), **arrays)])
    assert kept[0].advantages == pytest.approx([0.975, 1.025])


def test_advantages_are_whitened_over_the_batch() -> None:
    # One token a trajectory, V 0: advantages 1, 2, 6: mean 3, sample variance 7. Returns stay as they are.
    groups = groups_of([attempt(1), attempt(2)], [attempt(6)])
    rows = [row(0, 0, (0,), values=[0]), row(0, 1, (0,), values=[0]), row(1, 0, (0,), values=[0])]
    kept, metrics = PPO(kl_coef=0.0).credit(groups, rows)
    root = math.sqrt(7)
    assert [r.advantages[0] for r in kept if r.advantages is not None] == pytest.approx(
        [-2 / root, -1 / root, 3 / root]
    )
    assert [r.returns[0] for r in kept if r.returns is not None] == [1.0, 2.0, 6.0]
    assert metrics["advantages"] == 3.0
    assert metrics["advantages_std"] == pytest.approx(root)
    assert metrics["returns"] == 3.0
    assert metrics["values"] == 0.0
    assert metrics["trajectories"] == 3.0
    assert metrics["reward"] == 3.0


def test_rewards_whitened_by_the_batch() -> None:
    # Rewards of the steps 0, 3 and 0, 1 (V 0, lambda 0): mean 1, sample variance (1 + 4 + 1 + 0) / 3 = 2; the mean is
    # kept: 1 - 1/sqrt 2, 1 + 2/sqrt 2, 1 - 1/sqrt 2, 1.
    groups = groups_of([attempt(3), attempt(1)])
    rows = [row(0, 0, (0, 0), values=[0, 0]), row(0, 1, (0, 0), values=[0, 0])]
    advantages, _ = credited(PPO(**PLAIN, gae_lambda=0.0, whiten_rewards="batch"), groups, rows)
    root = math.sqrt(0.5)
    assert advantages[0] == pytest.approx([1 - root, 1 + 2 * root])
    assert advantages[1] == pytest.approx([1 - root, 1.0])


def test_rewards_whitened_by_running_moments() -> None:
    # Episode totals 2 and 6: deviation sqrt 8. Then 4 as well: (2, 6, 4) has deviation 2.
    algorithm = PPO(**PLAIN, gae_lambda=1.0, whiten_rewards="running")
    rows = [row(0, 0, (0,), values=[0]), row(0, 1, (0,), values=[0])]
    first, _ = credited(algorithm, groups_of([attempt(2), attempt(6)]), rows)
    assert first == [pytest.approx([2 / math.sqrt(8)]), pytest.approx([6 / math.sqrt(8)])]
    resumed = PPO(**PLAIN, gae_lambda=1.0, whiten_rewards="running")
    resumed.load_state(algorithm.state())
    for twin in (algorithm, resumed):
        kept, metrics = twin.credit(groups_of([attempt(4)]), rows[:1])
        assert kept[0].advantages == pytest.approx([2.0])
        assert metrics["reward_scale"] == pytest.approx(2.0)


def test_reward_clip_bounds_what_a_turn_is_paid() -> None:
    # Turns are paid 3 and -0.5; the KL penalty (0.2 a token) comes after the clip.
    groups = groups_of([attempt(2.5, (3.0, -0.5))])
    arrays = {"old_logprobs": [-1.0, -1.0], "reference_logprobs": [-2.0, -2.0], "values": [0, 0]}
    algorithm = PPO(kl_coef=0.2, whiten_advantages=False, gae_lambda=0.0, reward_clip=1.0)
    advantages, _ = credited(algorithm, groups, [row(0, 0, (0, 1), **arrays)])
    assert advantages == [pytest.approx([0.8, -0.7])]


def test_failed_trajectories_are_left_out() -> None:
    groups = groups_of([attempt(1), attempt(-100, error="env crashed")])
    rows = [row(0, 0, values=[0, 0]), row(0, 1, values=[0, 0])]
    kept, metrics = PPO(**PLAIN).credit(groups, rows)
    assert [r.member for r in kept] == [0]
    assert metrics["failed_share"] == 0.5
    assert metrics["reward"] == 1.0
    nothing, metrics = PPO(**PLAIN).credit(groups_of([attempt(1, error="x")]), rows[:1])
    assert nothing == []
    assert metrics == {"failed_share": 1.0, "trajectories": 0.0}


def test_bad_inputs_of_credit() -> None:
    with pytest.raises(DataError, match="trajectory 0 has the reward nan"):
        PPO(**PLAIN).credit(groups_of([attempt(math.nan)]), [row(0, 0, values=[0, 0])])
    with pytest.raises(ValueError, match="credit needs values"):
        PPO(**PLAIN).credit(groups_of([attempt(1)]), [row(0, 0)])
    with pytest.raises(ValueError, match="reference_logprobs"):
        PPO().credit(groups_of([attempt(1)]), [row(0, 0, values=[0, 0])])


# --- loss -----------------------------------------------------------------------------------------------------


def loss_of(
    algorithm: PPO, rows: list[Row], logprobs: list[float], values: list[float], entropies: list[float] | None = None
) -> tuple[float, list[float], list[float], dict[str, float]]:
    """Loss, its gradients by log-probabilities and values, and metrics, of an update of one micro-batch."""
    new = torch.tensor(logprobs, requires_grad=True)
    critic = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    entropy = None if entropies is None else torch.tensor(entropies)
    output = algorithm.loss(Forward(new, entropy, critic), RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert new.grad is not None
    assert critic.grad is not None
    metrics = {name: float(value) for name, value in output.metrics.items()}
    return float(output.loss.detach()), new.grad.tolist(), critic.grad.tolist(), metrics


def off_policy(advantages: list[float], **arrays: Any) -> list[Row]:
    """One row of two tokens with old probabilities 0.5 and 0.5, old values 1 and 1, returns 2 and 2."""
    given = {"old_logprobs": [math.log(0.5)] * 2, "values": [1, 1], "returns": [2, 2], "advantages": advantages}
    return [row(0, 0, (0, 0), **given | arrays)]


def test_policy_and_value_loss() -> None:
    # Ratios 1.1 and 0.9, A (1, -1): losses -1.1 and 0.9, mean -0.1; gradients -1.1 / 2 and 0.9 / 2.
    # V (1.1, 1.5), R 2, clip 0.2: 0.81 / 2 inside, and clipped to 1.2: 0.64 / 2 without a gradient; mean 0.3625.
    # Loss -0.1 + 0.5 * 0.3625. Critic's gradient: 0.5 * (1.1 - 2) / 2 = -0.225: descending raises the value.
    new = [math.log(0.55), math.log(0.45)]
    loss, by_logprob, by_value, metrics = loss_of(PPO(kl_coef=0.0), off_policy([1, -1]), new, [1.1, 1.5])
    assert metrics["policy_loss"] == pytest.approx(-0.1)
    assert metrics["value_loss"] == pytest.approx(0.3625)
    assert loss == pytest.approx(0.08125)
    assert metrics["loss"] == pytest.approx(0.08125)
    assert by_logprob == pytest.approx([-0.55, 0.45])
    assert by_value == pytest.approx([-0.225, 0.0])
    assert metrics["value_clip_fraction"] == 0.5
    # Unclipped: the second is 0.25 / 2 and pulls with 0.5 * -0.5 / 2.
    _, _, by_value, metrics = loss_of(PPO(kl_coef=0.0, value_clip=None), off_policy([1, -1]), new, [1.1, 1.5])
    assert metrics["value_loss"] == pytest.approx((0.405 + 0.125) / 2)
    assert by_value == pytest.approx([-0.225, -0.125])
    assert "value_clip_fraction" not in metrics


def test_clip_and_its_metrics() -> None:
    # Ratios 1.5 and 0.5 with A (1, -1): both clipped, no gradient.
    new = [math.log(0.75), math.log(0.25)]
    _, by_logprob, _, metrics = loss_of(PPO(kl_coef=0.0), off_policy([1, -1]), new, [1, 1])
    assert metrics["policy_loss"] == pytest.approx((-1.2 + 0.8) / 2)
    assert by_logprob == [0.0, 0.0]
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == (0.5, 0.5)
    assert metrics["ratio"] == pytest.approx(1.0)
    # (1.5 - 1 - ln 1.5 + 0.5 - 1 - ln 0.5) / 2.
    assert metrics["approx_kl"] == pytest.approx(0.143841, rel=1e-4)


def test_jensen_shannon_term() -> None:
    # Ratios 2 and 1/2 (f = (2 ln 2 - 3 ln 1.5) / 2 = 0.084950; (-0.5 ln 2 - 1.5 ln 0.75) / 2 = 0.042475).
    new = [math.log(1.0), math.log(0.25)]
    base = loss_of(PPO(kl_coef=0.0), off_policy([0, 0]), new, [1, 1])
    loss, by_logprob, _, metrics = loss_of(PPO(kl_coef=0.0, js_coef=0.1), off_policy([0, 0]), new, [1, 1])
    assert metrics["js"] == pytest.approx((0.084950 + 0.042475) / 2, rel=1e-4)
    assert loss - base[0] == pytest.approx(0.1 * 0.0637125, rel=1e-4)
    # Slopes ln(4/3) and ln(2/3) / 4, times 0.1 / 2: descending takes the ratio back to 1 from both sides.
    assert by_logprob == pytest.approx([0.05 * math.log(4 / 3), 0.05 * math.log(2 / 3) / 4], rel=1e-5)


def test_kl_in_the_loss() -> None:
    # k2 on d = ln 2: ln(2)^2 / 2 = 0.240227, slope 0.693147.
    rows = off_policy([0, 0], reference_logprobs=[math.log(0.25)] * 2)
    algorithm = PPO(kl_coef=0.1, kl_in="loss", kl_estimator="k2", kl_ratio_weight=False)
    loss, by_logprob, _, metrics = loss_of(algorithm, rows, [math.log(0.5)] * 2, [2, 2])
    assert metrics["kl"] == pytest.approx(0.240227, rel=1e-5)
    value = 0.5 * 0.5 * 0.64  # values of 2 clipped at 1.2
    assert loss == pytest.approx(0.0240227 + value, rel=1e-5)
    assert by_logprob == pytest.approx([0.05 * 0.693147] * 2, rel=1e-5)


def test_sampler_gap_is_measured_and_corrected() -> None:
    # The sampler's were 0.25: weights 2; k3 of KL(sampler, old), d = ln 0.5: 2 - 1 + ln 0.5.
    rows = off_policy([1, 1], sampled_logprobs=[math.log(0.25)] * 2, kept_logmass=[0, 0])
    _, plain, _, metrics = loss_of(PPO(kl_coef=0.0), rows, [math.log(0.5)] * 2, [1, 1])
    assert metrics["gap_k3"] == pytest.approx(0.306853, rel=1e-5)
    assert metrics["gap_k1"] == pytest.approx(-0.693147, rel=1e-5)
    _, corrected, _, _ = loss_of(PPO(kl_coef=0.0, gap_correction="token"), rows, [math.log(0.5)] * 2, [1, 1])
    assert corrected == pytest.approx([2 * g for g in plain])


def test_entropy_bonus() -> None:
    algorithm = PPO(kl_coef=0.0, entropy_coef=0.1)
    base = loss_of(PPO(kl_coef=0.0), off_policy([1, 1]), [-1.0, -1.0], [1, 1], entropies=[1.0, 2.0])[0]
    loss, _, _, metrics = loss_of(algorithm, off_policy([1, 1]), [-1.0, -1.0], [1, 1], entropies=[1.0, 2.0])
    assert loss == pytest.approx(base - 0.15)
    assert metrics["entropy"] == 1.5


def test_explained_variance() -> None:
    # Returns 1, 3 (variance 1), errors 0.5, -0.5 (variance 0.25) of the old values: 0.75. A constant error costs none.
    rows = off_policy([1, 1], returns=[1, 3], values=[0.5, 3.5])
    metrics = loss_of(PPO(kl_coef=0.0), rows, [-1.0, -1.0], [0, 0])[3]
    assert PPO().derived(metrics) == {"explained_variance": pytest.approx(0.75)}
    shifted = loss_of(PPO(kl_coef=0.0), off_policy([1, 1], returns=[1, 3], values=[8, 10]), [-1.0] * 2, [0, 0])[3]
    assert PPO().derived(shifted) == {"explained_variance": pytest.approx(1.0)}
    assert PPO().derived(loss_of(PPO(kl_coef=0.0), off_policy([1, 1]), [-1.0] * 2, [0, 0])[3]) == {}
    assert PPO().derived({}) == {}


def test_missing_inputs_of_the_loss() -> None:
    rows = off_policy([1, 1])
    with pytest.raises(ValueError, match="critic"):
        PPO(kl_coef=0.0).loss(Forward(torch.zeros(2)), RowBatch.of(rows), Totals.of(rows))
    with pytest.raises(ValueError, match="PPO's loss needs advantages"):
        PPO(kl_coef=0.0).loss(Forward(torch.zeros(2)), RowBatch.of([row(0, 0)]), Totals(2, 1, 1))


# --- schedules and control --------------------------------------------------------------------------------------


def test_clip_range_by_steps() -> None:
    algorithm = PPO(clip_schedule="linear", clip_low=0.2, clip_high=0.4, clip_floor=0.1)
    # Step 1 of 10: nothing has passed. Step 4: 0.3 of the run. Step 10: 0.9, both at the floor.
    assert algorithm.begin(1, 10)["clip_range"] == 0.4
    assert algorithm.begin(4, 10)["clip_range"] == pytest.approx(0.28)
    assert algorithm.clip_bounds == pytest.approx((0.14, 0.28))
    algorithm.begin(10, 10)
    assert algorithm.clip_bounds == (0.1, 0.1)
    assert PPO().begin(10, 10)["clip_range"] == 0.2


def test_clip_range_by_updates() -> None:
    algorithm = PPO(clip_schedule="linear", clip_decay_updates=4)
    seen = []
    for _ in range(4):
        seen.append(algorithm.clip_bounds[1])
        algorithm.adapt({"approx_kl": 0.0})
    assert seen == pytest.approx([0.2, 0.15, 0.1, 0.1])  # max(0.1, 0.2 * (1 - t / 4))
    resumed = PPO(clip_schedule="linear", clip_decay_updates=4)
    resumed.load_state({**PPO().state(), "updates": 1})
    assert resumed.clip_bounds[1] == pytest.approx(0.15)


def test_the_scheduled_clip_is_the_loss_clip() -> None:
    algorithm = PPO(kl_coef=0.0, clip_schedule="linear")
    new = [math.log(0.575)] * 2  # ratio 1.15: free at 0.2, clipped at 0.1
    algorithm.begin(1, 10)
    assert loss_of(algorithm, off_policy([1, 1]), new, [1, 1])[1] == pytest.approx([-0.575] * 2)
    algorithm.begin(10, 10)
    assert loss_of(algorithm, off_policy([1, 1]), new, [1, 1])[1] == [0.0, 0.0]


def test_entropy_decay() -> None:
    algorithm = PPO(kl_coef=0.0, entropy_coef=0.1, entropy_schedule="linear", entropy_floor=0.02)
    weights = [algorithm.begin(step, 5)["entropy_coef"] for step in (1, 3, 5)]
    assert weights == pytest.approx([0.1, 0.06, 0.02])
    base = loss_of(PPO(kl_coef=0.0), off_policy([1, 1]), [-1.0] * 2, [1, 1], entropies=[1.0, 1.0])[0]
    assert loss_of(algorithm, off_policy([1, 1]), [-1.0] * 2, [1, 1], entropies=[1.0, 1.0])[0] == pytest.approx(
        base - 0.02
    )


def test_multiplicative_kl_control() -> None:
    algorithm = PPO(kl_coef=0.2, kl_control="multiplicative")
    algorithm.finish({"kl": 0.04})
    assert algorithm.begin(2, 10)["kl_coef"] == pytest.approx(0.3)
    algorithm.finish({"kl": 0.02})
    assert algorithm.kl_weight == pytest.approx(0.3)
    algorithm.finish({"kl": 0.001})
    assert algorithm.kl_weight == pytest.approx(0.24)
    algorithm.finish({})  # a step without a trained row
    resumed = PPO(kl_coef=0.2, kl_control="multiplicative")
    resumed.load_state(algorithm.state())
    assert resumed.kl_weight == pytest.approx(0.24)
    fixed = PPO(kl_coef=0.2)
    fixed.finish({"kl": 9.0})
    assert fixed.kl_weight == 0.2


def test_proportional_kl_control() -> None:
    algorithm = PPO(kl_coef=0.2, kl_control="proportional", kl_target=0.02, kl_horizon=100)
    algorithm.finish({"kl": 0.022, "trajectories": 50.0})  # 0.1 over the target, half a horizon: 5 % more
    assert algorithm.kl_weight == pytest.approx(0.21)


def test_the_adapted_kl_coefficient_is_used() -> None:
    algorithm = PPO(kl_coef=0.1, kl_control="multiplicative", whiten_advantages=False, gae_lambda=0.0)
    arrays = {"old_logprobs": [-1.0], "reference_logprobs": [-2.0], "values": [0]}
    groups, rows = groups_of([attempt(0)]), [row(0, 0, (0,), **arrays)]
    assert credited(algorithm, groups, rows)[0] == [pytest.approx([-0.1])]
    algorithm.finish({"kl": 1.0})
    assert credited(algorithm, groups, rows)[0] == [pytest.approx([-0.15])]


def test_target_kl_ends_the_updates() -> None:
    assert not PPO().adapt({"approx_kl": 9.0})
    assert PPO(target_kl=0.02).adapt({"approx_kl": 0.03})
    assert not PPO(target_kl=0.02).adapt({"approx_kl": 0.01})


# --- packing ----------------------------------------------------------------------------------------------------


EVERYTHING: dict[str, Any] = {"entropy_coef": 0.01, "gap_correction": "token", "js_coef": 0.1}
ARRAYS = ("sampled_logprobs", "old_logprobs", "reference_logprobs", "kept_logmass", "advantages", "values", "returns")


def random_update(seed: int, count: int) -> tuple[list[Row], torch.Tensor]:
    """Rows of 0 to 5 tokens with every array; log-probabilities, entropies and values [3, tokens]."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        size = int(generator.integers(0, 6))
        rows.append(row(i // 4, i % 4, (0,) * size, **{n: 0.4 * generator.standard_normal(size) for n in ARRAYS}))
    drawn = 0.4 * generator.standard_normal((3, sum(r.scored for r in rows)))
    return rows, torch.from_numpy(drawn).float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_in": "loss", "aggregation": "sequence", "gap_correction": "sequence"},
        {"aggregation": "constant", "constant_length": 8, "value_clip": None},
    ],
)
def test_packing_changes_nothing(options: dict[str, Any]) -> None:
    """Micro-batches of any size sum to the update's loss, gradients and metrics."""
    algorithm = PPO(**EVERYTHING | options)
    rows, drawn = random_update(7, 12)
    totals = Totals.of(rows)
    results = []
    for size in (12, 5, 1):
        inputs = drawn.clone().requires_grad_()
        loss, metrics, start = 0.0, dict[str, float](), 0
        for first in range(0, len(rows), size):
            micro = rows[first : first + size]
            stop = start + sum(r.scored for r in micro)
            part = Forward(inputs[0, start:stop], inputs[1, start:stop], inputs[2, start:stop])
            output = algorithm.loss(part, RowBatch.of(micro), totals)
            output.loss.backward()
            loss += float(output.loss.detach())
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in output.metrics.items()}
            start = stop
        results.append((loss, metrics, inputs.grad))
    whole = results[0]
    assert bool((whole[2].abs().sum(1) > 0.0).all())
    for part in results[1:]:
        assert part[0] == pytest.approx(whole[0], rel=1e-5)
        assert part[1] == pytest.approx(whole[1], rel=1e-5)
        assert algorithm.derived(part[1]) == pytest.approx(algorithm.derived(whole[1]), rel=1e-5)
        torch.testing.assert_close(part[2], whole[2], rtol=1e-6, atol=1e-8)


# --- the document -----------------------------------------------------------------------------------------------


def test_presets_of_the_document_are_valid() -> None:
    lines = [line for line in DOCUMENT.read_text().splitlines() if "`{name: ppo" in line]
    presets = [yaml.safe_load(line[line.index("{") : line.rindex("}") + 1]) for line in lines]
    assert len(presets) >= 5
    for preset in presets:
        assert preset.pop("name") == "ppo"
        PPO(**preset)


def test_every_option_and_metric_is_documented() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in PPO.model_fields if f"`{name}`" not in text] == []
    algorithm = PPO(**EVERYTHING, whiten_rewards="running")
    rows, drawn = random_update(1, 4)
    output = algorithm.loss(Forward(drawn[0], drawn[1], drawn[2]), RowBatch.of(rows), Totals.of(rows))
    metrics = {name: float(value) for name, value in output.metrics.items()}
    logged = {name for name in metrics if not name.startswith("_")} | set(algorithm.derived(metrics))
    groups = groups_of([attempt(1), attempt(0), attempt(0), attempt(0)])
    logged |= set(algorithm.credit(groups, rows)[1]) | set(algorithm.begin(1, 2))
    assert [name for name in sorted(logged) if f"`{name}`" not in text] == []


# --- the loop ---------------------------------------------------------------------------------------------------


def records_of_a_run(folder: Path, reward: str, steps: int, **algorithm: Any) -> list[dict[str, Any]]:
    """Metrics of each step of a tiny model that is paid for tokens of the vocabulary's lower half."""
    recipe = {
        "run": {"dir": str(folder / "run"), "steps": steps, "seed": 1},
        "model": {"name": str(save_tiny_model(folder / "model")), "lora": None},
        "env": {"name": "prompts", "items": [{"prompt": "go"}, {"prompt": "say"}, {"prompt": "the lamp"}]},
        "rewards": [{"name": f"tests.learning:{reward}"}],
        "algorithm": {"name": "ppo", "group_size": 8, **algorithm},
        "engine": {"name": "local", "max_new_tokens": 6, "ignore_eos": True},
        "optim": {"learning_rate": 1e-2, "batch_size": 4},
        "eval": {"tasks": 1, "at_start": False},
        "samples": {"every": 0},
    }
    train(parse_recipe(recipe))
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"]]


def test_options_run_through_the_loop(tmp_path: Path) -> None:
    options = {
        "group_size": 2,
        "epochs": 2,
        "updates": 2,
        "kl_control": "multiplicative",
        "kl_low": 0.0,
        "kl_high": 1e-9,
    }
    options |= {"entropy_coef": 0.01, "entropy_schedule": "linear", "js_coef": 0.1, "whiten_rewards": "running"}
    options |= {"clip_schedule": "linear", "clip_decay_updates": 8, "credit_level": "turn", "kl_estimator": "k3"}
    first, second = records_of_a_run(tmp_path, "LowTokens", 2, **options)
    assert [first["updates"], second["updates"]] == [4, 4]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # the policy is its reference
    assert second["kl"] > 0.0
    assert first["approx_kl"] > 0.0  # from the second update on
    assert (first["clip_range"], second["clip_range"]) == (0.2, 0.1)  # 4 of 8 updates
    assert (first["entropy_coef"], second["entropy_coef"]) == (0.01, 0.005)
    assert first["values"] == 0.0  # the head starts at zero
    assert second["values"] != 0.0
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in (first, second))
    assert all(abs(record["gap_k3"]) < 1e-6 for record in (first, second))


@pytest.mark.slow
def test_it_learns_and_its_twin_does_not(tmp_path: Path) -> None:
    # 32 replies of 6 tokens a step: the standard error of a step's mean is at most .5 / sqrt(192) = .036.
    true, twin = (records_of_a_run(tmp_path / r, r, 20) for r in ("LowTokens", "ShuffledLowTokens"))
    rewards, shuffled = (np.array([record["reward"] for record in records]) for records in (true, twin))
    assert rewards[:3].mean() < 0.62
    assert rewards[-3:].mean() > 0.75
    assert shuffled[-3:].mean() < shuffled[:3].mean() + 0.1
