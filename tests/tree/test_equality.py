"""The token tree computes what plain rows compute: values and every gradient, for every family.

The oracle is transformers' own eager attention, one row at a time. Both sides run the same loss: a random weight on
each log-probability and on each entropy, so that an error anywhere shows.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sapwood.errors import ModelError
from sapwood.models.forward import enable_tree, forward_rows, tree_obstacle
from sapwood.models.lora import fuse_lora
from sapwood.tree import pack
from sapwood.tree.attention import AttentionPlan
from sapwood.tree.trie import build_trie
from tests.conftest import FAMILIES, make_row, random_rows, tiny_config, tiny_model, tree_copy


def plain(model, rows):
    """Log-probabilities and entropies one row at a time, with transformers' attention and full logits."""
    logprobs, entropies = [], []
    for row in rows:
        at = np.flatnonzero(row.loss_mask)
        if not len(at):
            continue
        logits = model(torch.from_numpy(row.token_ids)[None]).logits[0].float() / row.temperature
        logp = torch.log_softmax(logits, dim=-1)[at - 1]
        logprobs.append(logp[range(len(at)), row.token_ids[at]])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def weights(rows, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, sum(row.scored for row in rows), generator=generator)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, relative):
    assert ours.keys() == theirs.keys()
    scale = max(float(g.norm()) for g in theirs.values())
    assert scale > 0
    for name, expected in theirs.items():
        # Relative to the parameter's own gradient; one that vanishes is held to the largest one's rounding.
        bound = relative * max(float(expected.norm()), 1e-2 * scale)
        assert float((ours[name] - expected).norm()) <= bound, name


def compare(reference, tested, rows, relative=1e-5, **options):
    w = weights(rows)
    logprobs, entropies = forward_rows(tested, rows, entropy_grad=True, **options)
    expected, expected_entropies = plain(reference, rows)
    torch.testing.assert_close(logprobs, expected, rtol=relative, atol=relative)
    torch.testing.assert_close(entropies, expected_entropies, rtol=relative, atol=relative)
    ours = (logprobs * w[0]).sum() + (entropies * w[1]).sum()
    theirs = (expected * w[0]).sum() + (expected_entropies * w[1]).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=relative, abs=relative)
    assert_same_gradients(gradients(tested, ours), gradients(reference, theirs), relative)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [0, 2, 6])
def test_full_weights(family, depth):
    reference = tiny_model(family)
    compare(reference, tree_copy(reference), random_rows(depth + 1, depth, children=3 if depth < 6 else 2))


@pytest.mark.parametrize("seed", range(6))
def test_random_tries(llama, seed):
    compare(llama, tree_copy(llama), random_rows(seed, depth=seed % 5 + 1, longest=9))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_row(family):
    reference = tiny_model(family)
    compare(reference, tree_copy(reference), [make_row([3, 1, 4, 1, 5, 9, 2, 6], [3, 4, 7])])


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family):
    reference = with_lora(tiny_model(family))
    tested = copy.deepcopy(reference)
    enable_tree(tested)
    assert fuse_lora(tested) > 0
    compare(reference, tested, random_rows(3, 3))


def with_lora(model):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    with torch.no_grad():  # B starts at zero, which would hide A's gradient
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted.eval()


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_gradient_checkpointing(family):
    reference = tiny_model(family)
    tested = tree_copy(reference)
    tested.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tested.train()  # checkpointing is on in training mode only; the tiny configs have no dropout
    compare(reference, tested, random_rows(4, 3))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
def test_flex_kernel_scores_the_same(family):
    # FlexAttention has no backward on a CPU; tests/gpu holds its gradients.
    reference = tiny_model(family)
    rows = random_rows(2, 3)
    with torch.no_grad():
        logprobs, entropies = forward_rows(tree_copy(reference), rows, kernel="flex")
        expected, expected_entropies = plain(reference, rows)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_long_segments_run_unbatched(family, monkeypatch):
    monkeypatch.setattr("sapwood.tree.attention._BATCHED_UP_TO", 2)
    monkeypatch.setattr("sapwood.tree.attention._PLAIN_ROWS", 3)
    reference = tiny_model(family)
    compare(reference, tree_copy(reference), random_rows(5, 3, longest=9))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 12])
def test_sliding_windows_shorter_than_the_trunk_and_across_a_branch(window):
    config = tiny_config("mistral-window")
    config.sliding_window = window
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    trunk = list(range(10, 20))
    rows = [make_row([*trunk, *reply], range(9, 10 + len(reply))) for reply in ([1, 2, 3], [1, 2, 4, 5, 6], [7])]
    compare(reference, tree_copy(reference), rows)


def test_plain_rows_give_the_same(llama):
    compare(llama, copy.deepcopy(llama), random_rows(6, 3))


def test_bf16_errs_no_more_than_plain_bf16_rows():
    reference = tiny_model("llama")
    rows = random_rows(8, 4, longest=9)
    w = weights(rows)

    def run(model, forward):
        logprobs, entropies = forward(model)
        return gradients(model, (logprobs * w[0]).sum() + (entropies * w[1]).sum()), logprobs.detach()

    exact, exact_logprobs = run(reference, lambda m: plain(m, rows))
    half = copy.deepcopy(reference).bfloat16()
    by_rows, rows_logprobs = run(half, lambda m: plain(m, rows))
    by_tree, tree_logprobs = run(tree_copy(half), lambda m: forward_rows(m, rows, entropy_grad=True))

    def error(found):
        return sum(float((found[n].float() - exact[n]).norm() ** 2) for n in exact) ** 0.5

    assert error(by_rows) > 0
    assert error(by_tree) <= 1.5 * error(by_rows)
    assert float((tree_logprobs - exact_logprobs).norm()) <= 1.5 * float((rows_logprobs - exact_logprobs).norm())


def test_packing_never_changes_a_gradient(llama):
    rows = random_rows(9, 3)
    for i, row in enumerate(rows):
        row.group = i % 3
    tested = tree_copy(llama)
    whole = gradients(tested, sum_of(tested, [rows]))
    parts = pack(rows, 30)
    assert len(parts) > 2
    assert_same_gradients(gradients(tested, sum_of(tested, parts)), whole, 1e-5)


def sum_of(model, batches):
    total = sum(row.scored for batch in batches for row in batch)
    return sum(forward_rows(model, batch)[0].pow(2).sum() / total for batch in batches)


def test_the_model_still_works_for_others(llama):
    ids = torch.randint(0, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for family in ("llama", "gemma2", "mistral-window"):
        reference = tiny_model(family)
        for attention_mask in (None, mask):
            a = reference(ids, attention_mask=attention_mask).logits
            b = tree_copy(reference)(ids, attention_mask=attention_mask).logits
            keep = mask.bool() if attention_mask is not None else torch.ones_like(mask).bool()
            torch.testing.assert_close(a[keep], b[keep], rtol=1e-4, atol=1e-4)


def test_an_argument_that_the_kernel_does_not_know_is_an_error(llama):
    from sapwood.tree import TokenTree, TreeContext
    from sapwood.tree.attention import tree_attention

    tree = TreeContext(TokenTree.of([make_row([1, 2, 3], [2])]))
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(ModelError, match="'s_aux'"):
        tree_attention(llama, q, q, q, None, tree=tree, s_aux=torch.zeros(4))
    with pytest.raises(ModelError, match="'dropout'"):
        tree_attention(llama, q, q, q, None, tree=tree, dropout=0.1)


def test_what_the_tree_cannot_serve_says_why(llama):
    assert tree_obstacle(llama) is None
    llama.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic rotary embedding" in (tree_obstacle(llama) or "")
    llama.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    llama.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert "linear_attention" in (tree_obstacle(llama) or "")


def test_no_dense_mask_and_few_blocks():
    # A trunk of 50, 4 prompts of 10 and 8 replies of 5 each: self blocks of up to 32 come in batches by size, longer
    # ones alone, and each segment with descendants is one trunk block: 1 + 4.
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 61, 50)
    prompts = [np.concatenate([trunk, [p], rng.integers(0, 61, 9)]) for p in range(4)]
    trie = build_trie([np.concatenate([p, [r], rng.integers(0, 61, 4)]) for p in prompts for r in range(8)])
    plan = AttentionPlan.of(trie.segments)
    assert [(len(b.index), b.index.shape[1]) for b in plan.batches] == [(32, 5), (4, 10)]
    assert [(b.q1 - b.q0, b.k1 - b.k0) for b in plan.blocks] == [(50, 50), (200, 50)] + [(40, 10)] * 4
