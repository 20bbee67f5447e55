"""RLOO's defaults: what they say, and that they are what its paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tests.algorithms.test_grpo import attempt, groups_of, row

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.grpo import GRPO
from sapwood.algorithms.rloo import RLOO
from sapwood.plugins import load

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "rloo.md"


def test_is_the_plugin_and_nothing_but_defaults() -> None:
    assert load("algorithm", "rloo") is RLOO
    assert set(RLOO.model_fields) == set(GRPO.model_fields)
    changed = {n for n, f in RLOO.model_fields.items() if f.default != GRPO.model_fields[n].default}
    text = DOCUMENT.read_text()
    assert len(changed) == 8
    assert [name for name in sorted(changed) if f"`{name}`" not in text] == []


def test_loss_is_the_sum_over_the_reply_times_the_advantage_over_the_others() -> None:
    # Rewards 6, 2, 1 less 0.5 * k1 (2, 0, 0 summed over the reply): 5, 2, 1. Over the others: 5 - 1.5, 2 - 3, 1 - 3.5.
    old = {"old_logprobs": [-1.0, -1.0]}
    rows = [
        row(0, 0, (0, 0), **old, reference_logprobs=[-2.0, -2.0]),
        row(0, 1, (0, 0), **old, reference_logprobs=[-1.0, -1.0]),
        row(0, 2, (0, 0), **old, reference_logprobs=[-1.0, -1.0]),
    ]
    algorithm = RLOO(group_size=3, kl_coef=0.5)
    kept, metrics = algorithm.credit(groups_of([attempt(6), attempt(2), attempt(1)]), rows)
    assert [r.advantages[0] for r in kept if r.advantages is not None] == pytest.approx([3.5, -1.0, -2.5])
    assert metrics["kl_penalty"] == pytest.approx(1 / 3)
    logprobs = torch.full((6,), -1.0, requires_grad=True)
    output = algorithm.loss(Forward(logprobs), RowBatch.of(kept), Totals.of(kept))
    output.loss.backward()
    assert logprobs.grad is not None
    # -A / 3 rows for every token, whatever the reply's length.
    expected = [-3.5 / 3, -3.5 / 3, 1 / 3, 1 / 3, 2.5 / 3, 2.5 / 3]
    assert logprobs.grad.tolist() == pytest.approx(expected)


def test_another_aggregation_drops_the_default_length() -> None:
    assert RLOO().constant_length == 1
    assert RLOO(aggregation="constant", constant_length=8).constant_length == 8
    assert RLOO(aggregation="token").constant_length is None
    assert RLOO(**RLOO(aggregation="token").model_dump()).aggregation == "token"
    with pytest.raises(ValidationError, match="has no effect with aggregation: token"):
        RLOO(aggregation="token", constant_length=8)
    with pytest.raises(ValidationError, match="every advantage is 0"):
        RLOO(group_size=1)
