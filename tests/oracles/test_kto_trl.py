"""KTO against TRL's KTOTrainer._compute_loss, mismatched rows included, with gradients by the weights of a tiny model
(TRL's padded, ours through the token tree)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import VOCABULARY, tiny_model, tree_copy
from tests.oracles import _trl as peer
from torch import nn

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.kto import KTO
from sapwood.models.forward import forward_rows
from sapwood.types import Row

KTOTrainer = pytest.importorskip("trl.trainer.kto_trainer", reason="TRL is the oracle").KTOTrainer

LABELS = (True, False, False, True, False)
LENGTHS = (3, 6, 1, 4, 2)


def models(seed: int) -> tuple[nn.Module, nn.Module]:
    """The reference and a policy that has moved away from it."""
    reference = tiny_model("llama")
    policy, generator = copy.deepcopy(reference), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=generator))
    return reference, policy


def make_rows() -> list[Row]:
    """Labelled replies to prompts of their own, all so short that no mismatched row is cut."""
    generator = np.random.default_rng(8)
    rows = [
        peer.draw_row(generator, generator.integers(0, VOCABULARY, 3), tokens, group=g, reward=1.0 if good else 0.0)
        for g, (tokens, good) in enumerate(zip(LENGTHS, LABELS, strict=True))
    ]
    assert max(row.token_ids.size for row in rows) == 3 + max(LENGTHS)
    return rows


def rotated(rows: list[Row]) -> list[Row]:
    """TRL's mismatched rows: each prompt with the reply of the row before, the first with the last one's."""
    made = []
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        ids = np.concatenate([row.token_ids[~row.loss_mask], other.token_ids[other.loss_mask]])
        made.append(Row(ids, np.arange(len(ids)) >= 3, np.zeros(len(ids) - 3, np.int32)))
    return made


def theirs(rows: list[Row], seed: int, **options: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    reference, policy = models(seed)
    settings: dict[str, Any] = {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    trainer = peer.stand_in(
        **settings | options,
        model=peer.Fused(policy),
        ref_model=peer.Fused(reference),
        args=type("Args", (), {"gradient_checkpointing_kwargs": None})(),
    )
    trainer.calculate_KL = trainer.loss_type == "kto"
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    batch = {
        **peer.padded(rows),
        **{f"KL_{name}": value for name, value in peer.padded(rotated(rows)).items()},
        "label": torch.tensor(LABELS),
    }
    if not trainer.calculate_KL:
        batch = {name: value for name, value in batch.items() if not name.startswith("KL_")}
    loss = KTOTrainer._compute_loss(trainer, trainer.model, batch, False)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), peer.gradients(policy, loss), metrics


def ours(algorithm: KTO, rows: list[Row], seed: int) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    reference, policy = (tree_copy(model) for model in models(seed))
    rows = [*rows, *algorithm.augment(rows)]
    peer.fill(reference, rows, "reference_logprobs")
    peer.fill(policy, rows, "old_logprobs")
    kept, credited = algorithm.credit([], rows)
    logprobs, entropies = forward_rows(policy, kept)
    output = algorithm.loss(Forward(logprobs, entropies), RowBatch.of(kept), Totals.of(kept))
    metrics = {name: float(value) for name, value in output.metrics.items()}
    metrics |= credited | algorithm.derived(metrics)
    return float(output.loss.detach()), peer.gradients(policy, output.loss), metrics


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.6, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"loss_type": "apo_zero_unpaired"},
    ],
)
def test_loss_gradient_and_metrics(options: dict[str, Any], seed: int) -> None:
    expected, expected_gradients, expected_metrics = theirs(make_rows(), seed, **options)
    loss, gradients, metrics = ours(KTO(**options), make_rows(), seed)
    assert loss == pytest.approx(expected, rel=1e-5)
    peer.assert_same(gradients, expected_gradients)
    assert metrics["entropy"] == pytest.approx(expected_metrics["entropy"], rel=1e-5)
    if "loss_type" not in options:
        assert metrics["kl"] == pytest.approx(expected_metrics["kl"], rel=1e-4, abs=1e-6)
    for side in ("chosen", "rejected"):
        assert metrics[f"reward_{side}"] == pytest.approx(expected_metrics[f"rewards/{side}"], rel=1e-4)
        assert metrics[f"logprob_{side}"] == pytest.approx(expected_metrics[f"logps/{side}"], rel=1e-5)
    assert metrics["margin"] == pytest.approx(expected_metrics["rewards/margins"], rel=1e-4)


def test_a_reference_point_above_zero_is_among_them() -> None:
    """Of the seeds compared, one moves the policy so that the divergence counts, and one so that it is cut at 0."""
    points = [ours(KTO(), make_rows(), seed)[2]["kl"] for seed in (1, 3)]
    assert max(points) > 0.01
    assert min(points) == 0.0


def test_mismatched_rows_are_trls() -> None:
    made, expected = KTO().augment(make_rows()), rotated(make_rows())
    assert [row.token_ids.tolist() for row in made] == [row.token_ids.tolist() for row in expected]
    assert [row.loss_mask.tolist() for row in made] == [row.loss_mask.tolist() for row in expected]
