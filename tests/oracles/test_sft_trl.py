"""SFT against TRL's SFTTrainer.compute_loss, with gradients by the weights of a tiny model (TRL's padded, ours
through the token tree)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import VOCABULARY, tiny_model, tree_copy
from tests.oracles import _trl as peer

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.sft import SFT
from sapwood.models.forward import forward_rows
from sapwood.types import Row

SFTTrainer = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL is the oracle").SFTTrainer


def make_rows() -> list[Row]:
    """Demonstrations of 1 to 8 tokens; two share a prompt, one has two turns."""
    generator = np.random.default_rng(6)
    prompts = [generator.integers(0, VOCABULARY, size) for size in (4, 4, 2)]
    rows = [
        peer.draw_row(generator, prompts[p], tokens, group=g) for g, (p, tokens) in enumerate([(0, 5), (0, 1), (1, 8)])
    ]
    mask = np.array([False, False, True, True, False, False, True])
    ids = generator.integers(0, VOCABULARY, 7)
    return [*rows, Row(ids, mask, np.array([0, 0, 1], np.int32), group=3)]


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_loss_and_gradient(loss_type: str, accumulated: bool) -> None:
    """accumulated: TRL is told the number of tokens of the whole update, as it is with gradient accumulation."""
    rows, model = make_rows(), tiny_model("llama")
    batch = peer.padded(rows)
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
    }
    tokens = sum(row.scored for row in rows)
    trainer = peer.stand_in(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        compute_loss_func=None,
        label_smoother=None,
    )
    trainer.accelerator.parallelism_config = None
    count = 3 * tokens if accumulated else tokens
    given = torch.tensor(count) if accumulated else None
    expected = SFTTrainer.compute_loss(trainer, peer.Fused(model), inputs, num_items_in_batch=given)
    expected_gradients = peer.gradients(model, expected)

    twin = tree_copy(model)
    logprobs, entropies = forward_rows(twin, rows)
    algorithm = SFT.model_validate({"loss_type": loss_type})
    output = algorithm.loss(Forward(logprobs, entropies), RowBatch.of(rows), Totals(count, len(rows), len(rows)))
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    peer.assert_same(peer.gradients(twin, output.loss), expected_gradients)
    if not accumulated:
        assert float(output.metrics["entropy"]) == pytest.approx(trainer._metrics["train"]["entropy"][-1], rel=1e-5)
