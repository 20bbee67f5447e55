"""KTO: mismatched rows, reference point, loss and metrics against numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.kto import KTO, MISMATCHED
from sapwood.errors import DataError
from sapwood.plugins import load
from sapwood.types import Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "kto.md"


def row(prompt: list[int], reply: list[int], *, group: int, desirable: bool = True, **arrays: Any) -> Row:
    """A labelled reply, every token of which is scored."""
    packed: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
    return Row(
        token_ids=np.array(prompt + reply),
        loss_mask=np.array([False] * len(prompt) + [True] * len(reply)),
        turn=np.zeros(len(reply), np.int32),
        group=group,
        reward=1.0 if desirable else -1.0,
        **packed,
    )


def with_point(value: float, **options: Any) -> KTO:
    """KTO with this reference point."""
    algorithm = KTO(**options)
    algorithm.load_state({"kl": value, "estimated": True})
    return algorithm


def texts(rows: list[Row]) -> list[tuple[list[int], int]]:
    """Tokens, and how many of the last of them are scored."""
    return [(r.token_ids.tolist(), r.scored) for r in rows]


def test_is_the_plugin() -> None:
    assert load("algorithm", "kto") is KTO
    assert KTO.learns_from == "labels"
    assert not KTO.atomic


def test_bad_options() -> None:
    with pytest.raises(ValidationError, match="are both 0"):
        KTO(desirable_weight=0, undesirable_weight=0)
    with pytest.raises(ValidationError, match="greater than 0"):
        KTO(beta=0)


def test_needs() -> None:
    assert not KTO().needs.old_logprobs  # of the labelled rows the loss takes the trained policy alone
    assert KTO().needs.reference_logprobs
    assert KTO().extra_needs.old_logprobs
    assert KTO().extra_needs.reference_logprobs


# --- mismatched rows ------------------------------------------------------------------------------------------


def test_each_prompt_gets_the_reply_before() -> None:
    rows = [row([1, 2], [10], group=0), row([3], [11, 12], group=1), row([4], [13], group=2)]
    made = KTO().augment(rows)
    assert texts(made) == [([1, 2, 13], 1), ([3, 10], 1), ([4, 11, 12], 2)]
    assert [(r.group, r.member) for r in made] == [(0, MISMATCHED), (1, MISMATCHED), (2, MISMATCHED)]


def test_replies_to_the_same_prompt_are_no_mismatch() -> None:
    # Two labelled replies to each of two prompts: a shift by one would keep rows 1 and 3 with their own prompt.
    rows = [row([p], [10 + i], group=i) for i, p in enumerate((1, 1, 2, 2))]
    assert texts(KTO().augment(rows)) == [([1, 12], 1), ([1, 13], 1), ([2, 10], 1), ([2, 11], 1)]


def test_rows_without_another_prompt_are_left_out() -> None:
    # Three of prompt 1 and one of prompt 2: whatever the shift, only two prompts get a reply of the other.
    rows = [row([p], [10 + i], group=i) for i, p in enumerate((1, 1, 1, 2))]
    assert len(KTO().augment(rows)) == 2
    assert KTO().augment(rows[:3]) == []
    assert KTO().augment(rows[:1]) == []
    assert KTO(loss_type="apo_zero_unpaired").augment(rows) == []


def test_prompts_that_differ_by_token_0_are_two() -> None:
    rows = [row([1], [10], group=0), row([1, 0], [11], group=1)]
    assert texts(KTO().augment(rows)) == [([1, 11], 1), ([1, 0, 10], 1)]


def test_mismatched_rows_are_no_longer_than_the_longest() -> None:
    rows = [row([1, 2, 3, 4], [10], group=0), row([5], [11, 12, 13], group=1)]
    assert texts(KTO().augment(rows)) == [([1, 2, 3, 4, 11], 1), ([5, 10], 1)]


def test_later_prompts_of_a_conversation_go_with_the_reply() -> None:
    # The reply is everything from the first scored token on: 10, the user's 20, and 11.
    ids, mask = np.array([1, 10, 20, 11]), np.array([False, True, False, True])
    two = Row(ids, mask, np.array([0, 1], np.int32), group=0, reward=1.0)
    made = KTO().augment([two, row([5], [12], group=1)])
    assert made[1].token_ids.tolist() == [5, 10, 20, 11]
    assert made[1].loss_mask.tolist() == [False, True, False, True]
    assert made[1].turn.tolist() == [0, 1]


# --- reference point ------------------------------------------------------------------------------------------


def scored(algorithm: KTO, rows: list[Row], old: float, reference: float) -> list[Row]:
    """The rows and what they are augmented with, every scored token with these log-probabilities."""
    everyone = [*rows, *algorithm.augment(rows)]
    for each in everyone:
        each.old_logprobs = np.full(each.scored, old, np.float32)
        each.reference_logprobs = np.full(each.scored, reference, np.float32)
    return everyone


def test_the_reference_point_is_the_mean_log_ratio_of_the_mismatched() -> None:
    # Mismatched replies have 1, 2 and 1 tokens, each 0.25 more probable than under the reference: mean 1 / 3.
    rows = [row([1], [10, 11], group=0), row([2], [12], group=1), row([3], [13], group=2)]
    algorithm = KTO()
    kept, metrics = algorithm.credit([], scored(algorithm, rows, -1.0, -1.25))
    assert [(r.group, r.member) for r in kept] == [(0, 0), (1, 0), (2, 0)]
    assert metrics["kl"] == pytest.approx(0.25 * 4 / 3)
    # A divergence can't be negative.
    assert algorithm.credit([], scored(algorithm, rows, -1.0, -0.5))[1]["kl"] == 0.0


def test_a_batch_of_one_prompt_keeps_the_point_before() -> None:
    rows = [row([1], [10], group=0)]
    algorithm = with_point(0.5)
    algorithm.begin(1, 10)
    assert algorithm.credit([], rows)[1]["kl"] == 0.5
    # Held-out records before the first step: the policy is the reference.
    algorithm = KTO()
    assert algorithm.credit([], rows)[1]["kl"] == 0.0
    # Trained on one prompt at a time there would never be a point.
    algorithm.begin(1, 10)
    with pytest.raises(DataError, match=r"this batch of 1 has a single prompt: raise optim\.batch_size"):
        algorithm.credit([], rows)
    algorithm = KTO(loss_type="apo_zero_unpaired")
    algorithm.begin(1, 10)
    assert algorithm.credit([], rows) == (rows, {})


def test_state_carries_the_point() -> None:
    other = KTO()
    other.load_state(with_point(0.75).state())
    assert other.state() == {"kl": 0.75, "estimated": True}


def test_missing_scores_are_named() -> None:
    rows = [row([1], [10], group=0), row([2], [11], group=1)]
    with pytest.raises(ValueError, match="needs old_logprobs and reference_logprobs"):
        KTO().credit([], [*rows, *KTO().augment(rows)])
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        with_point(0.0).loss(Forward(torch.zeros(2)), RowBatch.of(rows), Totals.of(rows))


# --- loss -----------------------------------------------------------------------------------------------------


def two_rows() -> tuple[list[Row], list[float]]:
    """A desirable row with log-ratio 2 over two tokens and an undesirable one with log-ratio -1."""
    rows = [
        row([1], [10, 11], group=0, reference_logprobs=[-2.0, -2.0]),
        row([2], [12], group=1, desirable=False, reference_logprobs=[-1.0]),
    ]
    return rows, [-1.5, -0.5, -2.0]


def loss_of(algorithm: KTO, rows: list[Row], logprobs: list[float]) -> tuple[float, list[float], dict[str, float]]:
    new = torch.tensor(logprobs, requires_grad=True)
    output = algorithm.loss(Forward(new, torch.full_like(new, 0.5)), RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert new.grad is not None
    return float(output.loss.detach()), new.grad.tolist(), {k: float(v) for k, v in output.metrics.items()}


def test_loss_and_metrics() -> None:
    # beta 0.5, z = 1. Desirable: 1 - s(0.5 (2 - 1)) = 1 - s(0.5) = 0.377541; undesirable: 1 - s(0.5 (1 + 1)) =
    # 1 - s(1) = 0.268941. Weights 2 and 3, mean of two rows: (0.755081 + 0.806824) / 2.
    algorithm = with_point(1.0, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss, gradient, metrics = loss_of(algorithm, *two_rows())
    assert loss == pytest.approx(0.780953, rel=1e-5)
    # Slopes: -2 * 0.5 * s(0.5) s(-0.5) / 2 = -0.117502 and 3 * 0.5 * s(1) s(-1) / 2 = 0.147459.
    assert gradient == pytest.approx([-0.117502, -0.117502, 0.147459], rel=1e-5)
    assert metrics["loss"] == pytest.approx(loss)
    assert metrics["accuracy"] == 1.0
    assert metrics["desirable_share"] == 0.5
    assert metrics["entropy"] == 0.5
    derived = algorithm.derived(metrics)
    assert derived["reward_chosen"] == pytest.approx(1.0)  # 0.5 * 2
    assert derived["reward_rejected"] == pytest.approx(-0.5)
    assert derived["margin"] == pytest.approx(1.5)
    assert (derived["logprob_chosen"], derived["logprob_rejected"]) == (-2.0, -2.0)


def test_accuracy_is_about_the_reference_point() -> None:
    # Log-ratios 2 (desirable) and -1 (undesirable): against z = 3 the first is on the wrong side.
    assert loss_of(with_point(3.0), *two_rows())[2]["accuracy"] == 0.5
    # At the point itself, a half.
    assert loss_of(with_point(2.0), *two_rows())[2]["accuracy"] == 0.75


def test_apo_compares_with_zero() -> None:
    # beta 1: 1 - s(2) = 0.119203; s(-1) = 0.268941.
    loss = loss_of(KTO(loss_type="apo_zero_unpaired", beta=1.0), *two_rows())[0]
    assert loss == pytest.approx((0.119203 + 0.268941) / 2, rel=1e-5)


def test_metrics_of_one_kind_of_label() -> None:
    rows, logprobs = two_rows()
    metrics = loss_of(with_point(0.0), rows[1:], logprobs[2:])[2]
    assert set(KTO().derived(metrics)) == {"reward_rejected", "logprob_rejected"}
    assert KTO().derived({"learning_rate": 0.1}) == {}


def test_far_rows_stay_finite() -> None:
    rows, _ = two_rows()
    loss, gradient, _ = loss_of(with_point(0.0, beta=1.0), rows, [-5000.0, -1.0, 0.0])
    assert loss == pytest.approx((1.0 + 0.731059) / 2, rel=1e-5)
    assert all(math.isfinite(value) for value in gradient)


def test_packing_changes_nothing() -> None:
    generator = np.random.default_rng(3)
    rows = [
        row([1], [2] * size, group=i, desirable=bool(i % 3), reference_logprobs=generator.standard_normal(size))
        for i, size in enumerate(generator.integers(1, 6, 8).tolist())
    ]
    totals, logprobs = Totals.of(rows), torch.randn(sum(r.scored for r in rows))
    results = []
    for size in (8, 3, 1):
        new, loss, metrics, start = logprobs.clone().requires_grad_(), 0.0, dict[str, float](), 0
        for first in range(0, 8, size):
            micro = rows[first : first + size]
            stop = start + sum(r.scored for r in micro)
            output = with_point(0.3).loss(Forward(new[start:stop]), RowBatch.of(micro), totals)
            output.loss.backward()
            loss += float(output.loss.detach())
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in output.metrics.items()}
            start = stop
        results.append((loss, metrics, new.grad))
    for part in results[1:]:
        assert part[0] == pytest.approx(results[0][0], rel=1e-5)
        assert part[1] == pytest.approx(results[0][1], rel=1e-5, abs=1e-7)
        torch.testing.assert_close(part[2], results[0][2], rtol=1e-6, atol=1e-8)


def test_the_document() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in KTO.model_fields if f"`{name}`" not in text] == []
    metrics = loss_of(with_point(0.0), *two_rows())[2]
    logged = {name for name in {**metrics, **KTO().derived(metrics), "kl": 0.0} if not name.startswith("_")}
    assert [name for name in sorted(logged) if f"`{name}`" not in text] == []
    for line in text.splitlines():
        if "{name: kto" in line:
            options = yaml.safe_load(line[line.index("{") : line.rindex("}") + 1])
            assert options.pop("name") == "kto"
            KTO(**options)
