"""Log-probabilities and entropies through the LM head: by hand, by autograd, chunk by chunk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sapwood.models import heads
from sapwood.models.heads import LogitTransform, score


def head_of(weight) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)
    return layer


def test_by_hand():
    # Hidden state 1 meets weights 0 and ln 3: logits (0, ln 3), probabilities (1/4, 3/4).
    # log p = (-1.3863, -.2877); entropy = 1/4 * 1.3863 + 3/4 * .2877 = .5623.
    # At temperature 2 the logits are (0, ln 3 / 2) = (0, .5493): p = 1 / (1 + sqrt 3) = .3660, .6340.
    log3 = 1.0986123
    hidden = torch.tensor([[1.0], [1.0]])
    logprobs, entropies = score(
        head_of([[0.0], [log3]]),
        hidden,
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 0]),
        torch.tensor([1.0, 2.0]),
    )
    assert logprobs.tolist() == pytest.approx([-1.3863, -0.2877, -1.0051], abs=1e-4)
    assert entropies is not None
    assert entropies.tolist() == pytest.approx([0.5623, 0.6568], abs=1e-4)


def test_the_gradient_by_hand():
    # d log p(0) / d hidden = (W[0] - p W) / T = 0 - 3/4 ln 3 = -.8240 at temperature 1.
    # d entropy / d hidden = -sum p (log p + H) W = -3/4 (-.2877 + .5623) ln 3 = -.2263.
    for weight_on, expected in (((1.0, 0.0), -0.8240), ((0.0, 1.0), -0.2263)):
        hidden = torch.tensor([[1.0]], requires_grad=True)
        head = head_of([[0.0], [1.0986123]])
        zero = torch.tensor([0])
        logprobs, entropies = score(head, hidden, zero, zero, torch.ones(1), entropy_grad=True)
        assert entropies is not None
        (weight_on[0] * logprobs.sum() + weight_on[1] * entropies.sum()).backward()
        assert hidden.grad is not None
        assert hidden.grad.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 10**9])
def test_chunks_and_shortcut_equal_full_logits(monkeypatch, trained_head, chunk):
    monkeypatch.setattr(heads, "CHUNK_VALUES", chunk)
    torch.manual_seed(0)
    head = nn.Linear(8, 50, bias=False, dtype=torch.float32)
    head.weight.requires_grad_(trained_head)
    hidden = torch.randn(40, 8)
    unit = torch.arange(40).repeat_interleave(2)[:70]
    target = torch.randint(0, 50, (70,))
    temperature = torch.rand(40) + 0.5
    w = torch.randn(70), torch.randn(40)

    def run(function):
        h = hidden.clone().requires_grad_()
        head.weight.grad = None
        logprobs, entropies = function(h)
        ((logprobs * w[0]).sum() + (entropies * w[1]).sum()).backward()
        return logprobs.detach(), entropies.detach(), h.grad, head.weight.grad

    def full(h):
        logp = torch.log_softmax(head(h) / temperature[:, None], -1)
        return logp[unit, target], -(logp.exp() * logp).sum(-1)

    ours = run(lambda h: score(head, h, unit, target, temperature, entropy_grad=True))
    for a, b in zip(ours, run(full), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_entropy_has_no_gradient_unless_asked():
    hidden = torch.randn(3, 4, requires_grad=True)
    for trained in (False, True):
        head = nn.Linear(4, 9, bias=False)
        head.weight.requires_grad_(trained)
        _, entropies = score(head, hidden, torch.arange(3), torch.arange(3), torch.ones(3))
        assert entropies is not None
        assert not entropies.requires_grad


def test_transforms_of_the_families():
    # Granite divides logits, Cohere multiplies them, Gemma 2 bounds them: 2 tanh(6 / 2) = 1.9901.
    granite = LogitTransform.of(SimpleNamespace(logits_scaling=4.0))
    cohere = LogitTransform.of(SimpleNamespace(logit_scale=0.25))
    gemma = LogitTransform.of(SimpleNamespace(final_logit_softcapping=2.0))
    six = torch.tensor([6.0])
    assert granite(six).item() == cohere(six).item() == 1.5
    assert gemma(six).item() == pytest.approx(1.9901, abs=1e-4)


def test_nothing_to_score():
    logprobs, entropies = score(
        nn.Linear(4, 9), torch.zeros(0, 4), *(torch.zeros(0, dtype=torch.long),) * 2, torch.zeros(0)
    )
    assert logprobs.shape == (0,)
    assert entropies is not None
    assert entropies.shape == (0,)
