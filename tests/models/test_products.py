"""The product with frozen weights is the same whichever library makes it, and through every layer that uses it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sapwood.models import products
from sapwood.models.heads import score
from sapwood.models.products import product
from sapwood.models.quantised import frozen_linear


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_product_in_every_layout(rows, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 48), torch.randn(40, 48)
    added = torch.randn(40) if bias else None
    expected = x.double() @ weight.double().t() + (0 if added is None else added.double())
    strided = torch.randn(rows, 96)[:, ::2].copy_(x)
    for left in (x, x.t().contiguous().t(), strided):
        for right in (weight, weight.t().contiguous().t()):
            torch.testing.assert_close(product(left, right, added).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not products._ONEDNN, reason="oneDNN's product is for x86")
def test_onednn_is_asked_from_enough_rows_on(monkeypatch):
    calls = []
    monkeypatch.setattr(products.F, "linear", lambda *given: calls.append(len(given[0])) or given[0] @ given[1].t())
    for rows in (63, 64):
        product(torch.randn(rows, 8), torch.randn(8, 8))
    assert calls == [63]


def test_an_adapted_layer_has_the_gradients_of_plain_autograd():
    torch.manual_seed(1)
    layer = nn.Linear(48, 40).requires_grad_(False)
    x = torch.randn(96, 48, requires_grad=True)
    a, b = torch.randn(8, 48, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    g = torch.randn(96, 40)
    ours = torch.autograd.grad(frozen_linear(x, layer, a, b, 0.5), (x, a, b), g)
    theirs = torch.autograd.grad(layer(x) + 0.5 * (x @ a.t()) @ b.t(), (x, a, b), g)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_a_frozen_head_over_many_units_has_the_gradients_of_plain_autograd(entropy_grad):
    torch.manual_seed(2)
    head = nn.Linear(32, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(130, 32, requires_grad=True)
    unit, target, heat = torch.arange(130), torch.randint(0, 50, (130,)), torch.full((130,), 0.7)
    logprobs, entropies = score(head, hidden, unit, target, heat, entropy_grad=entropy_grad)
    logp = torch.log_softmax(head(hidden) / 0.7, -1)
    plain = logp[unit, target].sum() - (logp.exp() * logp).sum() * entropy_grad
    assert entropies is not None
    ours = logprobs.sum() + (entropies.sum() if entropy_grad else 0)
    torch.testing.assert_close(entropies.detach(), -(logp.exp() * logp).sum(-1).detach(), rtol=1e-4, atol=1e-4)
    [mine], [expected] = torch.autograd.grad(ours, hidden), torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # scoring and training agree to the last bit
        assert torch.equal(score(head, hidden, unit, target, heat)[0], logprobs.detach())
