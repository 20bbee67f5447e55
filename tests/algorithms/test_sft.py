"""SFT against numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from sapwood.algorithms import Forward, Needs, RowBatch, Totals
from sapwood.algorithms.sft import SFT
from sapwood.plugins import load
from sapwood.types import Group, Row, Task

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "sft.md"


def row(group: int, tokens: int) -> Row:
    """A demonstration with a prompt of one token."""
    return Row(np.arange(tokens + 1), np.array([False] + [True] * tokens), np.zeros(tokens, np.int32), group=group)


def loss_of(algorithm: SFT, rows: list[Row], logprobs: list[float]) -> tuple[float, list[float], dict[str, float]]:
    new = torch.tensor(logprobs, requires_grad=True)
    output = algorithm.loss(Forward(new, torch.full_like(new, 0.5)), RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert new.grad is not None
    return float(output.loss.detach()), new.grad.tolist(), {k: float(v) for k, v in output.metrics.items()}


def test_is_the_plugin() -> None:
    assert load("algorithm", "sft") is SFT
    assert SFT.learns_from == "demonstrations"
    assert not SFT.atomic
    assert SFT().needs == Needs()


def test_bad_options() -> None:
    with pytest.raises(ValidationError, match="'nll' or 'dft'"):
        SFT.model_validate({"loss_type": "mse"})
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        SFT.model_validate({"beta": 0.1})


def test_every_row_teaches() -> None:
    rows = [row(0, 2), row(1, 1)]
    assert SFT().credit([Group(Task("a"), []), Group(Task("b"), [])], rows) == (rows, {})


# Rows of 3 and 1 tokens; -log p is 1, 2, 3 and 4.
ROWS, LOGPROBS = [row(0, 3), row(1, 1)], [-1.0, -2.0, -3.0, -4.0]


def test_mean_over_tokens() -> None:
    loss, gradient, metrics = loss_of(SFT(), ROWS, LOGPROBS)
    assert loss == pytest.approx(10 / 4)
    assert gradient == [-0.25] * 4
    assert metrics == {"loss": 2.5, "nll": 2.5, "entropy": 0.5}


def test_mean_over_rows() -> None:
    # Means 2 and 4.
    loss, gradient, metrics = loss_of(SFT(aggregation="sequence"), ROWS, LOGPROBS)
    assert loss == pytest.approx(3.0)
    assert gradient == pytest.approx([-1 / 6, -1 / 6, -1 / 6, -1 / 2])
    assert metrics["nll"] == pytest.approx(2.5)  # per token all the same


def test_dft_weights_tokens_by_their_probability() -> None:
    # -p log p with p = 0.5 and 0.25: 0.346574 and 0.346574; the weight has no gradient, so the slopes are -p / 2.
    loss, gradient, metrics = loss_of(SFT(loss_type="dft"), [row(0, 2)], [math.log(0.5), math.log(0.25)])
    assert loss == pytest.approx(0.346574, rel=1e-5)
    assert gradient == pytest.approx([-0.25, -0.125])
    assert metrics["nll"] == pytest.approx(1.5 * math.log(2.0))


def test_perplexity() -> None:
    assert SFT().derived({"nll": math.log(7.0)}) == pytest.approx({"perplexity": 7.0})
    assert SFT().derived({"nll": 1e4}) == {"perplexity": math.inf}
    assert SFT().derived({"learning_rate": 0.1}) == {}


def test_an_impossible_token_has_a_finite_gradient() -> None:
    for kind in ("nll", "dft"):
        _, gradient, _ = loss_of(SFT.model_validate({"loss_type": kind}), [row(0, 2)], [-1e4, -1.0])
        assert all(math.isfinite(value) for value in gradient)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_packing_changes_nothing(aggregation: str) -> None:
    algorithm = SFT.model_validate({"aggregation": aggregation, "loss_type": "dft"})
    rows = [row(i, size) for i, size in enumerate((1, 4, 2, 7, 3, 1))]
    totals, logprobs = Totals.of(rows), -torch.rand(18)
    results = []
    for size in (6, 4, 1):
        new, loss, start = logprobs.clone().requires_grad_(), 0.0, 0
        for first in range(0, 6, size):
            micro = rows[first : first + size]
            stop = start + sum(r.scored for r in micro)
            output = algorithm.loss(Forward(new[start:stop]), RowBatch.of(micro), totals)
            output.loss.backward()
            loss, start = loss + float(output.loss.detach()), stop
        results.append((loss, new.grad))
    for part in results[1:]:
        assert part[0] == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(part[1], results[0][1], rtol=1e-6, atol=1e-9)


def test_the_document() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in SFT.model_fields if f"`{name}`" not in text] == []
    logged = {**loss_of(SFT(), ROWS, LOGPROBS)[2], **SFT().derived({"nll": 1.0})}
    assert [name for name in logged if f"`{name}`" not in text] == []
    for line in text.splitlines():
        if "{name: sft" in line:
            options = yaml.safe_load(line[line.index("{") : line.rindex("}") + 1])
            assert options.pop("name") == "sft"
            SFT(**options)
