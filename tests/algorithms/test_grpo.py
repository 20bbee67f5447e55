"""GRPO's options: credit and loss against numbers worked by hand, and what must not change a gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.grpo import GRPO
from sapwood.errors import DataError
from sapwood.plugins import load
from sapwood.types import Group, Row, StopReason, Task, Trajectory, Turn

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "grpo.md"


def attempt(reward: float, turns: tuple[float, ...] = (0.0,), **fields: Any) -> Trajectory:
    """A trajectory with these environment rewards, one a turn."""
    stop = fields.pop("stop", StopReason.EOS)
    none, ids = np.zeros(0, np.float32), np.zeros(1, np.int64)
    made = [Turn(ids, ids, none, none, stop, "", reward=value) for value in turns]
    return Trajectory(Task("t"), made, reward=reward, **fields)


def groups_of(*groups: list[Trajectory]) -> list[Group]:
    return [Group(Task(f"task-{g}"), list(members)) for g, members in enumerate(groups)]


def row(group: int, member: int, turn: tuple[int, ...] = (0, 0), **arrays: Any) -> Row:
    """A row whose scored tokens belong to these turns; a prompt of one token."""
    packed: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
    return Row(
        token_ids=np.arange(len(turn) + 1),
        loss_mask=np.array([False] + [True] * len(turn)),
        turn=np.array(turn, np.int32),
        group=group,
        member=member,
        **packed,
    )


def rows_of(groups: list[Group]) -> list[Row]:
    """One row of two tokens a trajectory."""
    return [row(g, m) for g, group in enumerate(groups) for m in range(len(group.trajectories))]


def credited(algorithm: GRPO, groups: list[Group], rows: list[Row] | None = None) -> list[list[float]]:
    kept, _ = algorithm.credit(groups, rows_of(groups) if rows is None else rows)
    return [[] if r.advantages is None else r.advantages.tolist() for r in kept]


# --- options --------------------------------------------------------------------------------------------------


def test_is_the_plugin() -> None:
    assert load("algorithm", "grpo") is GRPO
    assert GRPO(group_size=4).attempts == 4
    assert not GRPO().resample
    assert GRPO(dynamic_sampling=True).resample


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group_size": 1}, "every advantage is 0"),
        ({"aggregation": "constant"}, "divides by constant_length"),
        ({"constant_length": 32}, "has no effect with aggregation: token"),
        ({"gamma": 0.9}, "no effect with credit_level: trajectory"),
        ({"clip_dual": 1.1}, "must exceed 1 \\+ clip_high = 1.2"),
        ({"clip_dual": 3.0, "surrogate": "cispo"}, "no effect with surrogate: cispo"),
        ({"surrogate": "vespo", "ratio_level": "sequence"}, "weights whole rows itself"),
        ({"kl_in": "reward"}, "kl_in: reward has no effect; set a kl_coef"),
        ({"kl_estimator": "k1"}, "kl_estimator: k1 has no effect; set a kl_coef"),
        ({"gap_cap": 3.0}, "gap_cap: 3.0 has no effect; set a gap_correction"),
        ({"std_epsilon": 0.1, "scale_rewards": "none"}, "std_epsilon: 0.1 has no effect; set scale_rewards"),
        ({"surrogate": "sapo", "clip_low": 0.1}, "clip_low: 0.1 has no effect; set surrogate: clip"),
        ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg: 2.0 has no effect; set surrogate: sapo"),
        ({"vespo_pos": (1.0, 1.0)}, "has no effect; set surrogate: vespo"),
        ({"clip_low": 0.0}, "greater than 0"),
        ({"beta": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        GRPO(**options)


def test_needs() -> None:
    assert GRPO().needs.old_logprobs is False
    assert GRPO(epochs=2).needs.old_logprobs
    assert GRPO(updates=2).needs.old_logprobs
    assert GRPO().needs.reference_logprobs is False
    assert GRPO(kl_coef=0.1).needs.reference_logprobs
    assert GRPO(kl_coef=0.1).needs.old_logprobs is False
    assert GRPO(kl_coef=0.1, kl_in="reward").needs.old_logprobs
    assert GRPO().needs.entropy_grad is False
    assert GRPO(entropy_coef=0.01).needs.entropy_grad


# --- credit ---------------------------------------------------------------------------------------------------


def test_advantages_of_two_groups() -> None:
    # (1, 2, 6): mean 3, sample variance 7; (0, 4, 8): mean 4, sample variance 16.
    groups = groups_of([attempt(1), attempt(2), attempt(6)], [attempt(0), attempt(4), attempt(8)])
    plain = credited(GRPO(scale_rewards="none"), groups)
    assert plain == [[v, v] for v in (-2.0, -1.0, 3.0, -4.0, 0.0, 4.0)]
    scaled = credited(GRPO(std_epsilon=1e-9), groups)
    assert scaled[2] == pytest.approx([3 / math.sqrt(7)] * 2)
    assert scaled[5] == pytest.approx([1.0] * 2)
    # Leave-one-out: 6 - (1 + 2) / 2 and 8 - (0 + 4) / 2.
    loo = credited(GRPO(baseline="loo", scale_rewards="none"), groups)
    assert (loo[2], loo[5]) == ([4.5, 4.5], [6.0, 6.0])
    # All six: mean 3.5, squares 6.25 + 2.25 + 6.25 + 12.25 + 0.25 + 20.25 = 47.5, sample variance 9.5.
    batch = credited(GRPO(scale_rewards="batch"), groups)
    assert batch[2] == pytest.approx([3 / (math.sqrt(9.5) + 1e-4)] * 2)


def test_all_rows_of_a_trajectory_share_its_advantage() -> None:
    groups = groups_of([attempt(1, (0.0, 0.0)), attempt(3)])
    rows = [row(0, 0, (0,)), row(0, 0, (1, 1)), row(0, 1, (0,))]
    assert credited(GRPO(scale_rewards="none"), groups, rows) == [[-1.0], [-1.0, -1.0], [1.0]]
    assert all(r.advantages is None for r in rows)  # the rows that were handed in stay as they were


def test_failed_trajectories_leave_the_group() -> None:
    # Without the failed one: mean of (1, 3) is 2.
    groups = groups_of([attempt(1), attempt(-100, error="env crashed"), attempt(3)])
    kept, metrics = GRPO(scale_rewards="none").credit(groups, rows_of(groups))
    assert [(r.member, None if r.advantages is None else r.advantages[0]) for r in kept] == [(0, -1.0), (2, 1.0)]
    assert metrics["failed_share"] == pytest.approx(1 / 3)
    assert metrics["reward"] == 2.0


def test_all_failed() -> None:
    groups = groups_of([attempt(0, error="x"), attempt(0, error="x")])
    kept, metrics = GRPO().credit(groups, rows_of(groups))
    assert kept == []
    assert metrics == {"failed_share": 1.0, "no_signal_share": 1.0}


def test_dynamic_sampling_drops_groups_that_agree() -> None:
    groups = groups_of([attempt(1), attempt(1)], [attempt(0), attempt(1)])
    assert credited(GRPO(scale_rewards="none"), groups) == [[0.0, 0.0], [0.0, 0.0], [-0.5, -0.5], [0.5, 0.5]]
    assert credited(GRPO(scale_rewards="none", dynamic_sampling=True), groups) == [[-0.5, -0.5], [0.5, 0.5]]
    assert [GRPO().informative(group) for group in groups] == [False, True]
    # The only one that differs failed.
    assert not GRPO().informative(Group(Task("t"), [attempt(1), attempt(1), attempt(0, error="x")]))


def test_truncated_attempts_count_in_their_group_but_are_not_trained_on() -> None:
    # The mean of (0, 1, 5) stays 2; the two that were cut are left out.
    cut = attempt(1, stop=StopReason.LENGTH)
    groups = groups_of([attempt(0), cut, attempt(5, truncated=True)])
    assert credited(GRPO(scale_rewards="none", mask_truncated=True), groups) == [[-2.0, -2.0]]
    assert len(credited(GRPO(scale_rewards="none"), groups)) == 3
    assert GRPO().credit(groups, [])[1]["truncated_share"] == pytest.approx(2 / 3)


def test_turn_credit() -> None:
    # gamma 0.5. A: rewards (1, 2), total 3, so nothing is added: returns (1 + 0.5 * 2, 2) = (2, 2).
    # B: rewards (0, 4, 8), total 14, so 14 - 12 = 2 go to the last turn: 10; 4 + 5 = 9; 0 + 4.5 = 4.5.
    # Turn 0: (2, 4.5), mean 3.25; turn 1: (2, 9), mean 5.5; turn 2: B alone, 0.
    groups = groups_of([attempt(3, (1.0, 2.0)), attempt(14, (0.0, 4.0, 8.0))])
    rows = [row(0, 0, (0, 0, 1)), row(0, 1, (0, 1)), row(0, 1, (2, 2))]
    algorithm = GRPO(credit_level="turn", gamma=0.5, scale_rewards="none")
    assert credited(algorithm, groups, rows) == [[-1.25, -1.25, -3.5], [1.25, 3.5], [0.0, 0.0]]


def test_turn_credit_is_scaled_by_turn() -> None:
    # gamma 1. Turn 0: returns 3 and 12, mean 7.5, deviation 9 / sqrt(2), so -+4.5 / (9 / sqrt(2)) = -+1 / sqrt(2).
    # Turn 1: 2 and 10, mean 6, deviation 8 / sqrt(2): the same.
    groups = groups_of([attempt(3, (1.0, 2.0)), attempt(12, (2.0, 10.0))])
    rows = [row(0, 0, (0, 1)), row(0, 1, (0, 1))]
    half = 1 / math.sqrt(2)
    result = credited(GRPO(credit_level="turn", std_epsilon=1e-9), groups, rows)
    assert result[0] == pytest.approx([-half, -half])
    assert result[1] == pytest.approx([half, half])


def test_equal_totals_can_still_teach_turns() -> None:
    # Totals 1 and 1, but the returns from turn 1 on are 0 and 1.
    group = Group(Task("t"), [attempt(1, (1.0, 0.0)), attempt(1, (0.0, 1.0))])
    assert not GRPO().informative(group)
    assert GRPO(credit_level="turn").informative(group)


def kl_rows() -> list[Row]:
    """d = old - reference: (0.2, 0.3) in turn 0 and (-0.1) in turn 1 of the first attempt; 0 for the second."""
    return [
        row(0, 0, (0, 0), old_logprobs=[-1.0, -1.0], reference_logprobs=[-1.2, -1.3]),
        row(0, 0, (1,), old_logprobs=[-1.0], reference_logprobs=[-0.9]),
        row(0, 1, (0,), old_logprobs=[-1.0], reference_logprobs=[-1.0]),
    ]


def test_kl_in_the_reward_is_summed_over_the_trajectory() -> None:
    # k1 sums to 0.4, times 0.5 = 0.2: rewards 1 - 0.2 and 0, mean 0.4.
    groups = groups_of([attempt(1, (0.0, 0.0)), attempt(0)])
    options: dict[str, Any] = {"scale_rewards": "none", "kl_coef": 0.5, "kl_in": "reward", "kl_estimator": "k1"}
    kept, metrics = GRPO(**options).credit(groups, kl_rows())
    assert kept[0].advantages == pytest.approx([0.4, 0.4], rel=1e-6)
    assert kept[1].advantages == pytest.approx([0.4], rel=1e-6)
    assert kept[2].advantages == pytest.approx([-0.4], rel=1e-6)
    assert metrics["kl_penalty"] == pytest.approx(0.1)  # (0.2 + 0) / 2
    assert metrics["reward"] == 0.5  # logged before the penalty
    # k2: (0.04 + 0.09 + 0.01) / 2 = 0.07, times 0.5 = 0.035: rewards 0.965 and 0.
    k2: dict[str, Any] = options | {"kl_estimator": "k2"}
    kept, _ = GRPO(**k2).credit(groups, kl_rows())
    assert kept[0].advantages == pytest.approx([0.4825] * 2, rel=1e-5)


def test_kl_in_the_reward_of_turns() -> None:
    # Penalties 0.25 in turn 0 and -0.05 in turn 1. Returns of A: turn 1: 1 + 0.05; turn 0: 1.05 - 0.25 = 0.8. B: 0.
    groups = groups_of([attempt(1, (0.0, 1.0)), attempt(0)])
    algorithm = GRPO(
        scale_rewards="none", kl_coef=0.5, kl_in="reward", kl_estimator="k1", credit_level="turn", baseline="loo"
    )
    kept, _ = algorithm.credit(groups, kl_rows())
    assert kept[0].advantages == pytest.approx([0.8, 0.8], rel=1e-6)
    assert kept[1].advantages == pytest.approx([0.0])  # B has no turn 1
    assert kept[2].advantages == pytest.approx([-0.8], rel=1e-6)


def test_kl_in_the_reward_leaves_the_loss_alone() -> None:
    batch = RowBatch.of([row(0, 0, (0,), old_logprobs=[-1.0], reference_logprobs=[-3.0], advantages=[1.0])])
    output = GRPO(kl_coef=10.0, kl_in="reward").loss(Forward(torch.tensor([-1.0])), batch, Totals(1, 1, 1))
    assert float(output.loss) == pytest.approx(-1.0)
    assert "kl" not in output.metrics


def test_missing_scores_are_named() -> None:
    groups = groups_of([attempt(1), attempt(0)])
    with pytest.raises(ValueError, match="reference_logprobs"):
        GRPO(kl_coef=0.1, kl_in="reward").credit(groups, rows_of(groups))


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_names_the_task(reward: float) -> None:
    groups = groups_of([attempt(0), attempt(reward)])
    for trajectory in groups[0].trajectories:
        trajectory.task = groups[0].task
    with pytest.raises(DataError, match=r"task 'task-0': trajectory 1 has the reward (nan|inf)"):
        GRPO().credit(groups, rows_of(groups))


def test_reward_metrics() -> None:
    first = [attempt(1, reward_parts={"env": 1.0, "format": 0.0}), attempt(3, reward_parts={"env": 2.0})]
    groups = groups_of(first, [attempt(2), attempt(2)])
    metrics = GRPO().credit(groups, [])[1]
    assert metrics["reward"] == 2.0
    assert metrics["reward_std"] == pytest.approx(math.sqrt(2 / 3))  # (1, 3, 2, 2): squares sum to 2, over 3
    assert metrics["reward_group_std"] == pytest.approx(math.sqrt(2) / 2)  # sqrt(2) and 0
    assert metrics["no_signal_share"] == 0.5
    assert (metrics["reward/env"], metrics["reward/format"]) == (1.5, 0.0)


# --- loss -----------------------------------------------------------------------------------------------------


def loss_of(algorithm: GRPO, rows: list[Row], logprobs: list[float], entropies: list[float] | None = None) -> tuple:
    """Loss, its gradients by log-probabilities and entropies, and metrics, of an update of one micro-batch."""
    new = torch.tensor(logprobs, requires_grad=True)
    entropy = None if entropies is None else torch.tensor(entropies, requires_grad=True)
    output = algorithm.loss(Forward(new, entropy), RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert new.grad is not None
    by_entropy = None if entropy is None or entropy.grad is None else entropy.grad.tolist()
    return float(output.loss.detach()), new.grad.tolist(), by_entropy, {k: float(v) for k, v in output.metrics.items()}


def ragged(**second: Any) -> list[Row]:
    """A row of three tokens with advantage 1 and a row of one with advantage -2."""
    return [row(0, 0, (0, 0, 0), advantages=[1, 1, 1]), row(0, 1, (0,), advantages=[-2], **second)]


@pytest.mark.parametrize(
    ("options", "loss", "gradient"),
    [
        # On policy the ratio is 1 and each token's loss is -A: (-1, -1, -1, 2).
        ({}, -1 / 4, [-0.25, -0.25, -0.25, 0.5]),
        ({"aggregation": "sequence"}, (-1 + 2) / 2, [-1 / 6, -1 / 6, -1 / 6, 1.0]),
        ({"aggregation": "constant", "constant_length": 10}, -1 / 20, [-0.05, -0.05, -0.05, 0.1]),
    ],
)
def test_aggregation_on_policy(options: dict[str, Any], loss: float, gradient: list[float]) -> None:
    result = loss_of(GRPO(**options), ragged(), [-1.0, -2.0, -0.5, -1.5])
    assert result[0] == pytest.approx(loss)
    assert result[1] == pytest.approx(gradient)
    assert result[3]["ratio"] == 1.0
    assert result[3]["approx_kl"] == 0.0


def off_policy(advantages: tuple[float, float], **arrays: Any) -> list[Row]:
    """One row of two tokens with old probabilities 0.5 and 0.5."""
    return [row(0, 0, (0, 0), advantages=advantages, old_logprobs=[math.log(0.5)] * 2, **arrays)]


def test_clipping_and_its_metrics() -> None:
    # Ratios 1.5 and 0.5. A = 1 at 1.5 clips high (loss -1.2), A = -1 at 0.5 clips low (loss 0.8): no gradient.
    new = [math.log(0.75), math.log(0.25)]
    loss, gradient, _, metrics = loss_of(GRPO(epochs=2), off_policy((1.0, -1.0)), new)
    assert loss == pytest.approx((-1.2 + 0.8) / 2)
    assert gradient == [0.0, 0.0]
    assert (metrics["clip_fraction_high"], metrics["clip_fraction_low"]) == (0.5, 0.5)
    # approx_kl: (1.5 - 1 - ln 1.5 + 0.5 - 1 - ln 0.5) / 2 = (0.094535 + 0.193147) / 2.
    assert metrics["approx_kl"] == pytest.approx(0.143841, rel=1e-4)
    assert metrics["ratio"] == pytest.approx(1.0)
    # With the signs swapped neither is clipped: the gradient by log p is -r * A.
    loss, gradient, _, metrics = loss_of(GRPO(epochs=2), off_policy((-1.0, 1.0)), new)
    assert loss == pytest.approx((1.5 - 0.5) / 2)
    assert gradient == pytest.approx([0.75, -0.25])
    assert metrics["clip_fraction_high"] == metrics["clip_fraction_low"] == 0.0


def test_clip_higher_frees_rising_tokens() -> None:
    # Ratio 1.25, A = 1: clipped at 1.2, free below 1.28.
    new = [math.log(0.625)] * 2
    assert loss_of(GRPO(epochs=2), off_policy((1.0, 1.0)), new)[1] == [0.0, 0.0]
    assert loss_of(GRPO(epochs=2, clip_high=0.28), off_policy((1.0, 1.0)), new)[1] == pytest.approx([-0.625] * 2)


def test_dual_clip() -> None:
    # Ratio 1.8, A = -1: loss 1.8, or 1.5 without a gradient.
    new = [math.log(0.9)] * 2
    assert loss_of(GRPO(epochs=2), off_policy((-1.0, -1.0)), new)[0] == pytest.approx(1.8)
    loss, gradient, _, metrics = loss_of(GRPO(epochs=2, clip_dual=1.5), off_policy((-1.0, -1.0)), new)
    assert loss == pytest.approx(1.5)
    assert gradient == [0.0, 0.0]
    assert metrics["clip_fraction_dual"] == 1.0


def test_sequence_ratio() -> None:
    # Ratios 1.8 and 0.8: the row's is sqrt(1.44) = 1.2. A = 1, not clipped below 1.3: loss -1.2. The
    # gradient by each log p is -1.2 * 1/2 (mean of 2) * 2 tokens / 2 tokens of the update = -0.6.
    new = [math.log(0.9), math.log(0.4)]
    algorithm = GRPO(epochs=2, ratio_level="sequence", clip_high=0.3)
    loss, gradient, _, metrics = loss_of(algorithm, off_policy((1.0, 1.0)), new)
    assert loss == pytest.approx(-1.2)
    assert gradient == pytest.approx([-0.6, -0.6])
    assert metrics["ratio"] == pytest.approx(1.2)
    # Per token the first would be clipped.
    assert loss_of(algorithm.model_copy(update={"ratio_level": "token"}), off_policy((1.0, 1.0)), new)[1][0] == 0.0


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    # d = log p - log ref = ln 2 on both tokens, on policy.
    [("k1", 0.693147, 1.0), ("k2", 0.240227, 0.693147), ("k3", 0.193147, 0.5)],
)
def test_kl_in_the_loss(estimator: Any, value: float, slope: float) -> None:
    rows = [row(0, 0, (0, 0), advantages=[0, 0], reference_logprobs=[math.log(0.25)] * 2)]
    plain = GRPO(kl_coef=0.1, kl_estimator=estimator, kl_ratio_weight=False)
    loss, gradient, _, metrics = loss_of(plain, rows, [math.log(0.5)] * 2)
    assert loss == pytest.approx(0.1 * value, rel=1e-5)
    assert gradient == pytest.approx([0.05 * slope] * 2, rel=1e-5)
    assert metrics["kl"] == pytest.approx(value, rel=1e-5)
    # The ratio is 1 in value, and adds the estimate itself to the slope.
    loss, gradient, _, _ = loss_of(GRPO(kl_coef=0.1, kl_estimator=estimator), rows, [math.log(0.5)] * 2)
    assert loss == pytest.approx(0.1 * value, rel=1e-5)
    assert gradient == pytest.approx([0.05 * (slope + value)] * 2, rel=1e-5)


def test_entropy_bonus_raises_entropy() -> None:
    # Mean entropy over the update's 4 tokens is 2; the bonus is taken from the loss whatever the aggregation.
    cases: list[dict[str, Any]] = [{}, {"aggregation": "sequence"}]
    for options in cases:
        base = loss_of(GRPO(**options), ragged(), [-1.0] * 4)[0]
        algorithm = GRPO(entropy_coef=0.1, **options)
        loss, _, by_entropy, metrics = loss_of(algorithm, ragged(), [-1.0] * 4, entropies=[1.0, 2.0, 3.0, 2.0])
        assert loss == pytest.approx(base - 0.2)
        assert by_entropy == pytest.approx([-0.025] * 4)  # descending the loss raises the entropies
        assert metrics["entropy"] == 2.0


def gap_rows() -> list[Row]:
    """Old log-probability -1; the sampler's are -1.5 and -1.2 of a distribution that kept e^-0.3 and e^-0.1."""
    sampled = {"sampled_logprobs": [-1.5, -1.2], "kept_logmass": [-0.3, -0.1]}
    return [row(0, 0, (0, 0), advantages=[1, 1], **sampled)]


def test_gap_weights_add_the_kept_mass_back() -> None:
    # The sampler's untruncated log-probabilities are -1.8 and -1.3: weights e^0.8 = 2.225541 and e^0.3 = 1.349859.
    new = [-1.0, -1.0]
    loss, gradient, _, metrics = loss_of(GRPO(gap_correction="token", gap_cap=9.0), gap_rows(), new)
    assert loss == pytest.approx(-(2.225541 + 1.349859) / 2, rel=1e-5)
    assert gradient == pytest.approx([-2.225541 / 2, -1.349859 / 2], rel=1e-5)
    assert metrics["gap_weight"] == pytest.approx(1.7877, rel=1e-4)
    # k1: (-0.8 - 0.3) / 2; k3: (e^0.8 - 1.8 + e^0.3 - 1.3) / 2 = (0.425541 + 0.049859) / 2.
    assert metrics["gap_k1"] == pytest.approx(-0.55, rel=1e-5)
    assert metrics["gap_k3"] == pytest.approx(0.2377, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"gap_correction": "token"}, (2.0, 1.349859)),
        ({"gap_correction": "token", "gap_mode": "mask"}, (0.0, 1.349859)),
        ({"gap_correction": "sequence", "gap_cap": 4.0}, (3.004166, 3.004166)),  # e^1.1
        ({"gap_correction": "sequence"}, (2.0, 2.0)),
        ({"gap_correction": "none"}, (1.0, 1.0)),
    ],
)
def test_gap_options(options: dict[str, Any], weights: tuple[float, float]) -> None:
    gradient = loss_of(GRPO(**options), gap_rows(), [-1.0, -1.0])[1]
    assert gradient == pytest.approx([-w / 2 for w in weights], rel=1e-5)


def test_gap_is_measured_against_the_old_policy() -> None:
    # The trainer has moved from -1.8 and -1.3 (the sampler's) to -1: no gap, whatever the update did.
    rows = [replace(gap_rows()[0], old_logprobs=np.array([-1.8, -1.3], np.float32))]
    metrics = loss_of(GRPO(epochs=2, gap_correction="token"), rows, [-1.0, -1.0])[3]
    assert metrics["gap_weight"] == pytest.approx(1.0, rel=1e-6)
    assert metrics["gap_k3"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        (GRPO(epochs=2), "old_logprobs"),
        (GRPO(kl_coef=0.1), "reference_logprobs"),
        (GRPO(entropy_coef=0.1), "entropies"),
        (GRPO(gap_correction="token"), "sampler's log-probabilities"),
    ],
)
def test_missing_inputs_of_the_loss(algorithm: GRPO, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        loss_of(algorithm, ragged(), [-1.0] * 4)
    with pytest.raises(ValueError, match="advantages"):
        loss_of(GRPO(), [row(0, 0)], [-1.0] * 2)


def random_update(seed: int, count: int) -> tuple[list[Row], torch.Tensor, torch.Tensor]:
    """Rows of 0 to 5 tokens with every array, and log-probabilities and entropies of all their tokens."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        size = int(generator.integers(0, 6))
        names = ("sampled_logprobs", "old_logprobs", "reference_logprobs", "kept_logmass", "advantages")
        rows.append(row(i // 4, i % 4, (0,) * size, **{name: 0.4 * generator.standard_normal(size) for name in names}))
    tokens = sum(r.scored for r in rows)
    drawn = torch.from_numpy(0.4 * generator.standard_normal((2, tokens)))
    return rows, drawn[0].float(), drawn[1].float().abs()


EVERYTHING: dict[str, Any] = {"epochs": 2, "kl_coef": 0.1, "entropy_coef": 0.01, "gap_correction": "token"}


@pytest.mark.parametrize(
    "options",
    [
        {"clip_dual": 1.5},
        {"aggregation": "sequence", "ratio_level": "sequence", "gap_correction": "sequence", "gap_mode": "mask"},
        {"aggregation": "constant", "constant_length": 8},
        {"surrogate": "cispo"},
        {"surrogate": "sapo", "aggregation": "sequence"},
        {"surrogate": "vespo"},
    ],
)
def test_packing_changes_nothing(options: dict[str, Any]) -> None:
    """Micro-batches of any size sum to the update's loss, gradient and metrics."""
    algorithm = GRPO(**EVERYTHING | options)
    rows, logprobs, entropies = random_update(7, 12)
    totals = Totals.of(rows)
    results = []
    for size in (12, 5, 1):
        new, entropy = logprobs.clone().requires_grad_(), entropies.clone().requires_grad_()
        loss, metrics, start = 0.0, dict[str, float](), 0
        for first in range(0, len(rows), size):
            micro = rows[first : first + size]
            stop = start + sum(r.scored for r in micro)
            output = algorithm.loss(Forward(new[start:stop], entropy[start:stop]), RowBatch.of(micro), totals)
            output.loss.backward()
            loss += float(output.loss.detach())
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in output.metrics.items()}
            start = stop
        results.append((loss, metrics, new.grad, entropy.grad))
    whole = results[0]
    assert whole[2].abs().sum() > 0.0
    for part in results[1:]:
        assert part[0] == pytest.approx(whole[0], rel=1e-5)
        assert part[1] == pytest.approx(whole[1], rel=1e-5)
        torch.testing.assert_close(part[2], whole[2], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(part[3], whole[3], rtol=1e-6, atol=1e-8)


# --- the document ---------------------------------------------------------------------------------------------


def test_presets_of_the_document_are_valid() -> None:
    lines = [line for line in DOCUMENT.read_text().splitlines() if "{name: grpo" in line]
    presets = [yaml.safe_load(line[line.index("{") : line.rindex("}") + 1]) for line in lines]
    assert len(presets) >= 6
    for preset in presets:
        assert preset.pop("name") == "grpo"
        GRPO(**preset)


def test_every_option_and_metric_is_documented() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in GRPO.model_fields if f"`{name}`" not in text] == []
    options: dict[str, Any] = EVERYTHING | {"clip_dual": 1.5}
    rows, logprobs, entropies = random_update(1, 4)
    logged = set(GRPO(**options).loss(Forward(logprobs, entropies), RowBatch.of(rows), Totals.of(rows)).metrics)
    logged |= set(GRPO().credit(groups_of([attempt(1), attempt(0)]), [])[1])
    assert [name for name in sorted(logged) if f"`{name}`" not in text] == []
