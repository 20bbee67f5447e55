"""DPO against TRL's own code: every loss of its DPOTrainer, CPOTrainer and ORPOTrainer, with gradients by the weights
of a tiny model (TRL's padded, ours through the token tree) and metrics."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import VOCABULARY, tiny_model, tree_copy
from tests.oracles import _trl as peer
from torch import Tensor, nn

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.dpo import DPO
from sapwood.models.forward import forward_rows
from sapwood.ops.losses import row_mean, row_sum
from sapwood.types import Group, Row, Task

DPOTrainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is the oracle").DPOTrainer
CPOTrainer = pytest.importorskip("trl.experimental.cpo", reason="TRL is the oracle").CPOTrainer
ORPOTrainer = pytest.importorskip("trl.experimental.orpo", reason="TRL is the oracle").ORPOTrainer

LENGTHS = ((3, 5), (6, 1), (2, 2), (4, 7))


@cache
def models() -> tuple[nn.Module, nn.Module]:
    """The reference and a policy that has moved away from it."""
    reference = tiny_model("llama")
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=generator))
    return reference, policy


def make_rows(lengths: tuple[tuple[int, int], ...] = LENGTHS) -> list[Row]:
    """All chosen rows, then all rejected ones, as TRL's collator orders them."""
    generator = np.random.default_rng(2)
    prompts = [generator.integers(0, VOCABULARY, int(generator.integers(2, 6))) for _ in lengths]
    return [
        peer.draw_row(generator, prompts[g], lengths[g][m], group=g, member=m)
        for m in range(2)
        for g in range(len(lengths))
    ]


def ours(algorithm: DPO, rows: list[Row]) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients by weights and metrics, through the token tree."""
    reference, policy = (tree_copy(model) for model in models())
    peer.fill(reference, rows, "reference_logprobs")
    peer.fill(policy, rows, "old_logprobs")
    kept, _ = algorithm.credit([Group(Task(str(g)), []) for g in range(len(rows) // 2)], rows)
    logprobs, entropies = forward_rows(policy, kept)
    output = algorithm.loss(Forward(logprobs, entropies), RowBatch.of(kept), Totals.of(kept))
    metrics = {name: float(value) for name, value in output.metrics.items()}
    return float(output.loss.detach()), peer.gradients(policy, output.loss), metrics


def theirs(rows: list[Row], **options: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """The same from DPOTrainer._compute_loss."""
    reference, policy = models()
    settings: dict[str, Any] = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
    }
    tau = {"discopop_tau": options.pop("discopop_tau", 0.05), "gradient_checkpointing_kwargs": None}
    trainer = peer.stand_in(
        **settings | options,
        model=peer.Fused(policy),
        ref_model=peer.Fused(reference),
        args=type("Args", (), tau)(),
    )
    loss = DPOTrainer._compute_loss(trainer, trainer.model, peer.padded(rows), False)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), peer.gradients(policy, loss), metrics


# name -> (TRL's options, ours)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "beta": ({"beta": 0.7}, {"beta": 0.7}),
    "hinge": ({"loss_types": ["hinge"]}, {"loss_type": "hinge"}),
    "ipo": ({"loss_types": ["ipo"]}, {"loss_type": "ipo"}),
    "exo_pair": (
        {"loss_types": ["exo_pair"], "label_smoothing": 1e-3},
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    ),
    "nca_pair": ({"loss_types": ["nca_pair"]}, {"loss_type": "nca_pair"}),
    "robust": ({"loss_types": ["robust"], "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
    "bco_pair": ({"loss_types": ["bco_pair"]}, {"loss_type": "bco_pair"}),
    "sppo_hard": ({"loss_types": ["sppo_hard"]}, {"loss_type": "sppo_hard"}),
    "aot": ({"loss_types": ["aot"], "label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}),
    "aot_unpaired": ({"loss_types": ["aot_unpaired"]}, {"loss_type": "aot_unpaired"}),
    "apo_zero": ({"loss_types": ["apo_zero"]}, {"loss_type": "apo_zero"}),
    "apo_down": ({"loss_types": ["apo_down"]}, {"loss_type": "apo_down"}),
    "discopop": ({"loss_types": ["discopop"]}, {"loss_type": "discopop"}),
    "discopop, tau": (
        {"loss_types": ["discopop"], "discopop_tau": 0.5},
        {"loss_type": "discopop", "discopop_tau": 0.5},
    ),
    "sigmoid_norm": ({"loss_types": ["sigmoid_norm"]}, {"length_normalize": True}),
    "mixture": (
        {"loss_types": ["sigmoid", "bco_pair", "hinge"], "loss_weights": [0.8, 0.2, 1.5]},
        {"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2, "hinge": 1.5}},
    ),
    "ld_alpha": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "ld_alpha, ipo": ({"ld_alpha": 0.0, "loss_types": ["ipo"]}, {"ld_alpha": 0.0, "loss_type": "ipo"}),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, {"f_divergence": "forward_kl"}),
    "js": ({"f_divergence_type": "js_divergence"}, {"f_divergence": "js"}),
    "alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence": "alpha", "f_alpha": 0.3},
    ),
    "alpha 1": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"f_divergence": "alpha", "f_alpha": 1.0},
    ),
    "js, ipo": (
        {"f_divergence_type": "js_divergence", "loss_types": ["ipo"]},
        {"f_divergence": "js", "loss_type": "ipo"},
    ),
    "forward_kl, sigmoid_norm": (
        {"f_divergence_type": "forward_kl", "loss_types": ["sigmoid_norm"]},
        {"f_divergence": "forward_kl", "length_normalize": True},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient(name: str) -> None:
    theirs_options, ours_options = VARIANTS[name]
    expected, expected_gradients, expected_metrics = theirs(make_rows(), **theirs_options)
    loss, gradients, metrics = ours(DPO(**ours_options), make_rows())
    assert loss == pytest.approx(expected, rel=1e-5)
    peer.assert_same(gradients, expected_gradients)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["entropy"] == pytest.approx(expected_metrics["entropy"], rel=1e-5)
    assert metrics["logprob_chosen"] == pytest.approx(expected_metrics["logps/chosen"], rel=1e-5)
    assert metrics["logprob_rejected"] == pytest.approx(expected_metrics["logps/rejected"], rel=1e-5)
    # TRL's rewards are of whole replies and the reverse KL, whatever the loss compares.
    if ours_options.keys() <= {"beta", "loss_type", "label_smoothing", "ld_alpha"} and "ipo" not in name:
        for key, other in (
            ("reward_chosen", "rewards/chosen"),
            ("reward_rejected", "rewards/rejected"),
            ("margin", "rewards/margins"),
            ("accuracy", "rewards/accuracies"),
        ):
            assert metrics[key] == pytest.approx(expected_metrics[other], rel=1e-4)


def test_every_loss_of_dpo_is_compared() -> None:
    """TRL names its losses in the error for an unknown one."""
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        theirs(make_rows(), loss_types=["unheard of"])
    named = set(str(caught.value).split("[")[1].split("]")[0].replace("'", "").split(", "))
    compared = {name for options, _ in VARIANTS.values() for name in options.get("loss_types", ["sigmoid"])}
    assert named - compared == {"sft"}


def test_sft_term() -> None:
    # TRL averages over the micro-batch's chosen tokens, we over pairs: the same for replies of one length.
    lengths = ((4, 5), (4, 1), (4, 2))
    expected, expected_gradients, _ = theirs(make_rows(lengths), loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    loss, gradients, _ = ours(DPO(sft_coef=0.5), make_rows(lengths))
    assert loss == pytest.approx(expected, rel=1e-5)
    peer.assert_same(gradients, expected_gradients)


def test_the_first_step_is_ln_2() -> None:
    """Where policy and reference are one, through the tree and as TRL does it."""
    rows, reference = make_rows(), tree_copy(models()[0])
    peer.fill(reference, rows, "reference_logprobs")
    output = DPO().loss(Forward(forward_rows(reference, rows)[0]), RowBatch.of(rows), Totals.of(rows))
    assert abs(float(output.loss.detach()) - math.log(2.0)) < 1e-6
    assert float(output.metrics["margin"]) == 0.0


# --- CPO and ORPO: losses without a reference -------------------------------------------------------------------


def without_reference(trainer: Any, kind: Any, rows: list[Row], average: bool) -> tuple[float, dict[str, Tensor], dict]:
    """kind.get_batch_loss_metrics over a stand-in of its forward; TRL's NLL is given ours' meaning, a mean of pairs."""
    policy = models()[1]
    batch = peer.padded(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    picked = peer.Fused(policy)(batch["input_ids"], batch["attention_mask"], labels).log_probs
    flat, lengths = picked[batch["completion_mask"][:, 1:].bool()], batch["completion_mask"].sum(1)
    chosen, rejected = (row_mean if average else row_sum)(flat, lengths).chunk(2)
    nll = -row_mean(flat, lengths).chunk(2)[0].mean()
    trainer.concatenated_forward = lambda model, inputs: (chosen, rejected, torch.zeros(1), torch.zeros(1), nll)
    loss, metrics = kind.get_batch_loss_metrics(trainer, None, {})
    return float(loss.detach()), peer.gradients(policy, loss), metrics


CPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"reference_free": True}),
    "cpo": ({"cpo_alpha": 1.0}, {"reference_free": True, "sft_coef": 1.0}),
    "label smoothing": ({"label_smoothing": 0.1}, {"reference_free": True, "label_smoothing": 0.1}),
    "hinge": ({"loss_type": "hinge"}, {"reference_free": True, "loss_type": "hinge"}),
    "ipo": ({"loss_type": "ipo"}, {"reference_free": True, "loss_type": "ipo"}),
    "simpo": ({"loss_type": "simpo", "beta": 2.0}, {"loss_type": "simpo", "beta": 2.0}),
    "simpo, gamma and smoothing": (
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2, "label_smoothing": 0.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2, "label_smoothing": 0.1},
    ),
    "cpo-simpo": (
        {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.5},
        {"loss_type": "simpo", "beta": 2.0, "sft_coef": 0.5},
    ),
    "alphapo": (
        {"loss_type": "simpo", "beta": 0.5, "alpha": 0.25},
        {"loss_type": "simpo", "beta": 0.5, "simpo_alpha": 0.25},
    ),
    "alphapo, negative": (
        {"loss_type": "simpo", "beta": 2.0, "alpha": -0.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_alpha": -0.1},
    ),
}
RENAMED = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "nll_chosen": "nll_loss",
}


@pytest.mark.parametrize("name", CPO)
def test_cpo(name: str) -> None:
    theirs_options, ours_options = CPO[name]
    settings: dict[str, Any] = {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "alpha": 0.0,
        "cpo_alpha": 0.0,
        "simpo_gamma": 0.5,
        "label_smoothing": 0.0,
    }
    trainer = peer.stand_in(**settings | theirs_options)
    trainer.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)
    average = trainer.loss_type in ("ipo", "simpo")
    expected, expected_gradients, expected_metrics = without_reference(trainer, CPOTrainer, make_rows(), average)
    loss, gradients, metrics = ours(DPO(**ours_options), make_rows())
    assert loss == pytest.approx(expected, rel=1e-5)
    peer.assert_same(gradients, expected_gradients)
    for key, other in RENAMED.items():
        assert metrics[key] == pytest.approx(expected_metrics[other], rel=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta: float) -> None:
    trainer = peer.stand_in(beta=beta)
    trainer.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(trainer, *logps)
    expected, expected_gradients, expected_metrics = without_reference(trainer, ORPOTrainer, make_rows(), True)
    loss, gradients, metrics = ours(DPO(loss_type="orpo", beta=beta), make_rows())
    assert loss == pytest.approx(expected, rel=1e-5)
    peer.assert_same(gradients, expected_gradients)
    for key, other in RENAMED.items():
        assert metrics[key] == pytest.approx(expected_metrics[other], rel=1e-4)


def test_conservative_dpo() -> None:
    """TRL's DPOTrainer ignores label_smoothing for sigmoid; its CPO formula, fed log-ratios, is cDPO."""
    rows = make_rows()
    reference, policy = (tree_copy(model) for model in models())
    peer.fill(reference, rows, "reference_logprobs")
    logprobs, _ = forward_rows(policy, rows)
    batch = RowBatch.of(rows)
    assert batch.reference_logprobs is not None
    ratios = row_sum(logprobs - batch.reference_logprobs, batch.lengths).chunk(2)
    trainer = peer.stand_in(loss_type="sigmoid", beta=0.3, alpha=0.0, simpo_gamma=0.5, label_smoothing=0.2)
    expected = CPOTrainer.cpo_loss(trainer, *ratios)[0].mean()
    algorithm = DPO(beta=0.3, label_smoothing=0.2)
    output = algorithm.loss(Forward(logprobs), batch, Totals.of(rows))
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-7)
    (slope,) = torch.autograd.grad(output.loss, logprobs, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, logprobs)
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-8)
