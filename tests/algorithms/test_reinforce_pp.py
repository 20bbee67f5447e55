"""REINFORCE++: its advantages by hand, with and without a group's baseline, and the loss that it shares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from tests.algorithms.test_grpo import EVERYTHING, attempt, groups_of, random_update, row

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.reinforce_pp import ReinforcePP
from sapwood.errors import DataError
from sapwood.ops.gae import whiten
from sapwood.plugins import load
from sapwood.types import Group, Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "reinforce_pp.md"


def credited(algorithm: ReinforcePP, groups: list[Group], rows: list[Row]) -> list[float]:
    """Advantages of all tokens of all rows."""
    kept, _ = algorithm.credit(groups, rows)
    return [value for r in kept if r.advantages is not None for value in r.advantages.tolist()]


def expected(returns: list[float]) -> Any:
    """Normalised over the batch."""
    return pytest.approx(whiten(returns).tolist(), rel=1e-5, abs=1e-6)


def test_is_the_plugin() -> None:
    assert load("algorithm", "reinforce_pp") is ReinforcePP
    assert ReinforcePP(group_size=2).attempts == 2
    assert not ReinforcePP().needs.values
    assert ReinforcePP().needs.old_logprobs
    assert not ReinforcePP(kl_coef=0.0).needs.old_logprobs
    assert not ReinforcePP(kl_coef=0.0).needs.reference_logprobs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"baseline": "group", "group_size": 1}, "use at least 2, or baseline: none"),
        ({"baseline": "group", "gamma": 0.9}, "discounted differently"),
        ({"kl_coef": 0.0, "kl_in": "loss"}, "set a kl_coef"),
        ({"kl_ratio_weight": False}, "set kl_in: loss"),
        ({"value_coef": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ReinforcePP(**options)


def test_rewards_are_normalised_over_the_tokens_of_the_batch() -> None:
    # Replies of 1, 2 and 1 tokens with rewards 1, 2, 3: (1, 2, 2, 3), mean 2, sample variance 2 / 3.
    groups = groups_of([attempt(1), attempt(2)], [attempt(3)])
    rows = [row(0, 0, (0,)), row(0, 1, (0, 0)), row(1, 0, (0,))]
    root = math.sqrt(2 / 3)
    advantages = credited(ReinforcePP(kl_coef=0.0), groups, rows)
    assert advantages == pytest.approx([-1 / root, 0.0, 0.0, 1 / root])


def test_kl_penalties_are_summed_from_each_token_on() -> None:
    # Reward 1, k1 (0.5, -0.25), coefficient 0.2: 1 - 0.2 * 0.25 = 0.95 and 1 + 0.05 = 1.05. The other: 0 and 0.
    scored = {"old_logprobs": [-1.0, -1.25], "reference_logprobs": [-1.5, -1.0]}
    same = {"old_logprobs": [-1.0, -1.0], "reference_logprobs": [-1.0, -1.0]}
    groups, rows = groups_of([attempt(1), attempt(0)]), [row(0, 0, (0, 0), **scored), row(0, 1, (0, 0), **same)]
    assert credited(ReinforcePP(kl_coef=0.2), groups, rows) == expected([0.95, 1.05, 0.0, 0.0])
    metrics = ReinforcePP(kl_coef=0.2).credit(groups, rows)[1]
    assert metrics["kl"] == pytest.approx(0.0625)
    assert metrics["kl_penalty"] == pytest.approx(0.025)
    assert metrics["advantages"] == pytest.approx(0.5)
    # In the loss instead: rewards alone.
    assert credited(ReinforcePP(kl_coef=0.2, kl_in="loss"), groups, rows) == expected([1.0, 1.0, 0.0, 0.0])


def test_turns_and_discount() -> None:
    # Turns pay 1 and 2 (and 1 more at the end), gamma 0.5: (1 + 0.5 * 1.5, 0.5 * 3, 3) = (1.75, 1.5, 3).
    groups = groups_of([attempt(4, (1.0, 2.0))])
    algorithm = ReinforcePP(kl_coef=0.0, gamma=0.5)
    assert credited(algorithm, groups, [row(0, 0, (0, 1, 1))]) == expected([1.75, 1.5, 3.0])


def test_group_baseline() -> None:
    # Group 0: rewards 1 and 3, mean 2: -1, 1, 1. Group 1: 10 and 10: 0, 0. No group's own deviation.
    groups = groups_of([attempt(1), attempt(3)], [attempt(10), attempt(10)])
    rows = [row(0, 0, (0,)), row(0, 1, (0, 0)), row(1, 0, (0,)), row(1, 1, (0,))]
    algorithm = ReinforcePP(baseline="group", kl_coef=0.0)
    assert credited(algorithm, groups, rows) == expected([-1.0, 1.0, 1.0, 0.0, 0.0])


def test_group_baseline_of_turns() -> None:
    # A: turns pay 1, 2: returns 3, 2. B: one turn, 5. Turn 0: mean 4; turn 1: A alone.
    groups = groups_of([attempt(3, (1.0, 2.0)), attempt(5, (5.0,))])
    rows = [row(0, 0, (0, 0, 1)), row(0, 1, (0,))]
    algorithm = ReinforcePP(baseline="group", kl_coef=0.0)
    assert credited(algorithm, groups, rows) == expected([-1.0, -1.0, 0.0, 1.0])


def test_failed_and_bad_trajectories() -> None:
    # Without the failed one the mean of the group is 2.
    groups = groups_of([attempt(1), attempt(-100, error="x"), attempt(3)])
    rows = [row(0, m, (0,)) for m in range(3)]
    assert credited(ReinforcePP(baseline="group", kl_coef=0.0), groups, rows) == expected([-1.0, 1.0])
    assert ReinforcePP().credit(groups_of([attempt(0, error="x")]), rows[:1])[0] == []
    with pytest.raises(DataError, match="rewards must be finite"):
        ReinforcePP(kl_coef=0.0).credit(groups_of([attempt(math.inf)]), rows[:1])
    with pytest.raises(ValueError, match="reference_logprobs"):
        ReinforcePP().credit(groups_of([attempt(1)]), rows[:1])


def test_loss_is_the_clipped_one() -> None:
    # Ratios 1.5 and 0.5; A = 1 clips at 1.2, A = 1 at 0.5 is free: (-1.2 - 0.5) / 2.
    arrays = {"old_logprobs": [math.log(0.5)] * 2, "advantages": [1, 1]}
    rows = [row(0, 0, (0, 0), **arrays)]
    new = torch.tensor([math.log(0.75), math.log(0.25)], requires_grad=True)
    output = ReinforcePP(kl_coef=0.0, epochs=2).loss(Forward(new), RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(-0.85)
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, -0.25])


def test_packing_changes_nothing() -> None:
    algorithm = ReinforcePP(**EVERYTHING, kl_in="loss", kl_estimator="k3")
    rows, logprobs, entropies = random_update(3, 8)
    totals, cut = Totals.of(rows), sum(r.scored for r in rows[:3])
    whole = algorithm.loss(Forward(logprobs, entropies), RowBatch.of(rows), totals)
    parts = [
        algorithm.loss(Forward(logprobs[:cut], entropies[:cut]), RowBatch.of(rows[:3]), totals),
        algorithm.loss(Forward(logprobs[cut:], entropies[cut:]), RowBatch.of(rows[3:]), totals),
    ]
    assert sum(float(p.loss) for p in parts) == pytest.approx(float(whole.loss), rel=1e-5)
    summed = {name: sum(float(p.metrics[name]) for p in parts) for name in whole.metrics}
    assert summed == pytest.approx({name: float(value) for name, value in whole.metrics.items()}, rel=1e-5)


def test_the_document() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in ReinforcePP.model_fields if f"`{name}`" not in text] == []
    lines = [line for line in text.splitlines() if "`{name: reinforce_pp" in line]
    presets = [yaml.safe_load(line[line.index("{") : line.rindex("}") + 1]) for line in lines]
    assert len(presets) == 2
    for preset in presets:
        assert preset.pop("name") == "reinforce_pp"
        ReinforcePP(**preset)
    rows, logprobs, entropies = random_update(1, 4)
    algorithm = ReinforcePP(**EVERYTHING)
    logged = set(algorithm.loss(Forward(logprobs, entropies), RowBatch.of(rows), Totals.of(rows)).metrics)
    logged |= set(algorithm.credit(groups_of([attempt(1), attempt(0), attempt(0), attempt(0)]), rows)[1])
    assert [name for name in sorted(logged) if f"`{name}`" not in text] == []
