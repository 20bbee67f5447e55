"""Passes on models without weights against the same passes for real: equal memory, equal products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapwood.models.adapters import first_adapter, lora_config
from sapwood.models.forward import causal_lm, enable_tree, tree_obstacle
from sapwood.models.load import Policy
from sapwood.models.role import recompute_contexts
from sapwood.models.roles import Models
from sapwood.ops.batch import Needs
from sapwood.plan.meter import Meter
from sapwood.plan.passes import ACTIVATIONS, GRADIENTS, LOGITS, Passes
from sapwood.sections import LoraSection
from sapwood.types import Row
from tests.conftest import FAMILIES, VOCABULARY, tiny_config, tiny_model

NEEDS = Needs(reference_logprobs=True)


def rows(prompts: int = 2, members: int = 4) -> list[Row]:
    """30 tokens that all share, 20 of each prompt, 15 of each reply."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, VOCABULARY, 30)
    made = []
    for group in range(prompts):
        prompt = np.concatenate([trunk, rng.integers(0, VOCABULARY, 20)])
        for member in range(members):
            ids = np.concatenate([prompt, rng.integers(0, VOCABULARY, 15)])
            made.append(Row(ids, np.arange(65) >= 50, np.zeros(15, np.int32), group=group, member=member))
    return made


def models(family: str, *, outline: bool, lora: bool = True, checkpointing: bool = False) -> Models:
    from transformers import AutoModelForCausalLM

    if outline:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(family))
    else:
        model = tiny_model(family)
    fallback = tree_obstacle(model)
    enable_tree(model)
    if lora:
        model = first_adapter(model, lora_config(LoraSection(rank=4)), 0, scalar=False)
    if checkpointing:
        how = {"use_reentrant": False, "context_fn": recompute_contexts}
        causal_lm(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return Models(Policy(model, None, torch.device("cpu"), 128, "tiny", fallback), NEEDS)


def really(what: Models) -> Meter:
    what.train()
    with Meter() as meter:
        what.forward(rows(), NEEDS).logprobs.sum().backward()
    return meter


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planned_training_pass_takes_what_the_real_one_takes(family):
    real = really(models(family, outline=False))
    planned = Passes(models(family, outline=True), "cpu").learn(rows(), NEEDS)
    assert planned.peak.total == pytest.approx(real.peak.total, rel=0.05)
    if "window" not in family and family not in ("gemma2", "gemma3"):  # whose attention has products of its own
        assert planned.work.flops == real.work.flops


@pytest.mark.parametrize(("lora", "checkpointing"), [(False, False), (True, True), (False, True)])
def test_so_it_does_with_all_weights_and_with_checkpointing(lora, checkpointing):
    options = {"lora": lora, "checkpointing": checkpointing}
    real = really(models("qwen3", outline=False, **options))
    planned = Passes(models("qwen3", outline=True, **options), "cpu").learn(rows(), NEEDS)
    assert planned.peak.total == pytest.approx(real.peak.total, rel=0.07)
    assert planned.work.flops == real.work.flops


def test_a_planned_scoring_pass_takes_what_the_real_one_takes():
    real_models = models("llama", outline=False)
    with Meter() as real:
        real_models.score([rows()], NEEDS)
    planned = Passes(models("llama", outline=True), "cpu").score(rows(), NEEDS)
    assert planned.peak.total == pytest.approx(real.peak.total, rel=0.15)
    assert planned.work.flops == real.work.flops


def test_checkpointing_saves_memory_and_costs_products():
    plain = Passes(models("llama", outline=True), "cpu").learn(rows(), NEEDS)
    saving = Passes(models("llama", outline=True, checkpointing=True), "cpu").learn(rows(), NEEDS)
    assert saving.peak.total < 0.6 * plain.peak.total
    assert saving.work.flops > 1.2 * plain.work.flops


def test_gradients_are_those_of_what_is_trained_and_stay():
    what = models("llama", outline=True, lora=False)
    trained = sum(p.numel() for p in what.policy.parameters())
    once = Passes(what, "cpu").learn(rows(), NEEDS)
    assert once.left == 4 * trained
    again = Passes(what, "cpu").learn(rows(), NEEDS, again=True)
    assert again.left == once.left
    # The second micro-batch's activations come on top of the first one's gradients.
    assert again.peak.total > once.peak.total
    assert again.peak.by_label[GRADIENTS] == once.left
    assert again.work.flops == once.work.flops


def test_logits_are_told_apart():
    planned = Passes(models("llama", outline=True, lora=False), "cpu").learn(rows(), NEEDS)
    units = 8 * 14 + 2  # the first token of a group's replies is predicted at one node
    assert planned.units == units
    assert planned.nodes == 30 + 2 * 20 + 8 * 15
    # A trained head's chunk is computed again for its backward: logits, tempered ones, log-probabilities and gradient.
    logits = units * VOCABULARY * 4
    assert 4 * logits <= planned.peak.by_label[LOGITS] <= 5 * logits
    assert planned.peak.total == sum(planned.peak.by_label.values())


def test_plain_rows_in_place_of_the_tree_take_more():
    tree = models("llama", outline=True)
    plain = models("llama", outline=True)
    plain.policy.fallback = "model.tree is false"
    assert (
        Passes(plain, "cpu").learn(rows(), NEEDS).peak.total > 1.8 * Passes(tree, "cpu").learn(rows(), NEEDS).peak.total
    )


def test_mixed_precision_halves_what_layers_keep():
    full, half = models("llama", outline=True), models("llama", outline=True)
    half.autocast = torch.bfloat16
    kept = [Passes(what, "cpu").learn(rows(), NEEDS).peak.by_label[ACTIVATIONS] for what in (full, half)]
    assert kept[1] < 0.85 * kept[0]
