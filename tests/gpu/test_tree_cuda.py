"""The token tree's CUDA kernels against plain rows on the CPU, in fp32 and bf16, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch

from sapwood.models.forward import forward_rows
from tests.conftest import random_rows, tiny_model, tree_copy
from tests.tree.test_equality import assert_same_gradients, gradients, plain, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kernel", ["grouped", "flex", "auto"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
def test_fp32(family, kernel):
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = tiny_model(family)
    rows = random_rows(3, 3)
    w = weights(rows)
    expected, expected_entropies = plain(reference, rows)
    theirs = gradients(reference, (expected * w[0]).sum() + (expected_entropies * w[1]).sum())
    tested = tree_copy(reference).cuda()
    logprobs, entropies = forward_rows(tested, rows, device="cuda", entropy_grad=True, kernel=kernel)
    assert entropies is not None
    ours = gradients(tested, (logprobs * w[0].cuda()).sum() + (entropies * w[1].cuda()).sum())
    torch.testing.assert_close(logprobs.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients({name: g.cpu() for name, g in ours.items()}, theirs, 1e-3)


@pytest.mark.parametrize("kernel", ["grouped", "flex"])
def test_bf16(kernel):
    reference = tiny_model("llama")
    rows = random_rows(4, 3)
    w = weights(rows)[0]
    exact = gradients(reference, (plain(reference, rows)[0] * w).sum())
    half = copy.deepcopy(reference).bfloat16()
    by_rows = gradients(half, (plain(half, rows)[0] * w).sum())
    tested = tree_copy(half).cuda()
    by_tree = gradients(tested, (forward_rows(tested, rows, device="cuda", kernel=kernel)[0] * w.cuda()).sum())

    def error(found):
        return sum(float((found[n].cpu().float() - exact[n]).norm() ** 2) for n in exact) ** 0.5

    assert error(by_tree) <= 1.5 * error(by_rows)
