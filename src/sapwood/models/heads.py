"""From hidden states to log-probabilities and entropies, chunk by chunk, so that full logits never exist.

Each distinct (node, temperature) goes through the LM head once, however many rows and targets it serves. Logits are
made by the head module itself (adapters and quantised weights included), with the model's own transforms, and the
softmax is in fp32.

Axis letters: U units (distinct nodes to score), P pairs (unit, target), V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sapwood.models.products import product
from sapwood.models.quantised import frozen_linear

#: Logits that a chunk may hold: 8 Mi values, 32 MiB in fp32, which stays near a CPU's last-level cache.
CHUNK_VALUES = 8 * 2**20


@dataclass(frozen=True)
class LogitTransform:
    """What the model does to its logits. scale multiplies; softcap (0: none) bounds, applied after the scale."""

    scale: float = 1.0
    softcap: float = 0.0

    @staticmethod
    def of(config: Any) -> LogitTransform:
        """Read from a transformers config: logit_scale (Cohere), logits_scaling (Granite), final_logit_softcapping
        (Gemma 2)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return LogitTransform(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits, same shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def score(
    head: nn.Module,
    hidden: Tensor,
    pair_unit: Tensor,
    pair_target: Tensor,
    temperature: Tensor,
    transform: LogitTransform | None = None,
    entropy: bool = True,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [P] of each pair's target and entropies [U], in fp32.

    hidden [U, H]; pair_unit [P] ascending indices into U; pair_target [P]; temperature [U] divides the logits.
    Logits are recomputed in the backward pass, unless the head is a plain frozen Linear: then the gradient with
    respect to the hidden states is formed together with the forward and only [U, H] is kept.
    """
    transform = transform or LogitTransform()
    if not len(hidden):
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32) if entropy else None
    if _is_frozen_linear(head) and transform == LogitTransform() and hidden.requires_grad and torch.is_grad_enabled():
        logprobs, entropies = _FrozenHead.apply(head, hidden, pair_unit, pair_target, temperature, entropy_grad)
        return logprobs, entropies if entropy else None
    function: Callable[..., tuple[Tensor, Tensor]] = _chunk
    parts = []
    for u0, u1, p0, p1 in _chunks(head, len(hidden), pair_unit):
        arguments = (
            head,
            hidden[u0:u1],
            pair_unit[p0:p1] - u0,
            pair_target[p0:p1],
            temperature[u0:u1],
            transform,
        )
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, *arguments, entropy, entropy_grad, use_reentrant=False))
        else:
            parts.append(function(*arguments, entropy, entropy_grad))
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if entropy else None


def _is_frozen_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear and not head.weight.requires_grad and head.bias is None and not head._forward_hooks


def _chunks(head: nn.Module, units: int, pair_unit: Tensor) -> list[tuple[int, int, int, int]]:
    vocabulary = getattr(head, "out_features", None) or 65536
    size = max(16, CHUNK_VALUES // int(vocabulary))
    starts = list(range(0, units, size))
    edges = torch.searchsorted(pair_unit, torch.tensor([*starts, units], device=pair_unit.device)).tolist()
    return [(u0, min(u0 + size, units), edges[i], edges[i + 1]) for i, u0 in enumerate(starts)]


def _chunk(
    head: nn.Module,
    hidden: Tensor,
    pair_unit: Tensor,
    pair_target: Tensor,
    temperature: Tensor,
    transform: LogitTransform,
    entropy: bool,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    # The same product as in the shortcut below, so that scoring and training agree to the last bit.
    logits = frozen_linear(hidden, head) if _is_frozen_linear(head) else head(hidden)
    logits = transform(logits).float() / temperature[:, None]
    logp = torch.log_softmax(logits, dim=-1)
    logprobs = logp[pair_unit, pair_target]
    if not entropy:
        return logprobs, logprobs.new_zeros(0)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        logp = logp if entropy_grad else logp.detach()
        return logprobs, -torch.linalg.vecdot(torch.exp(logp), logp)


class _FrozenHead(torch.autograd.Function):
    """Score through a frozen Linear of weight W [V, H] at temperature T, with p the softmax of a unit's logits:

        d logp(target) / d hidden = (W[target] - p W) / T
        d entropy      / d hidden = -((p * log p) W + entropy * p W) / T

    p W is formed chunk by chunk in the forward pass, so backward needs no logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Linear,
        hidden: Tensor,
        pair_unit: Tensor,
        pair_target: Tensor,
        temperature: Tensor,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        weight = head.weight
        logprobs = torch.empty(len(pair_unit), device=hidden.device)
        entropies = torch.empty(len(hidden), device=hidden.device)
        mean = torch.empty_like(hidden)  # p W
        slope = torch.empty_like(hidden) if entropy_grad else None  # (p log p) W + entropy p W
        for u0, u1, p0, p1 in _chunks(head, len(hidden), pair_unit):
            logits = product(hidden[u0:u1], weight.detach()).float()
            logp = torch.log_softmax(logits.div_(temperature[u0:u1, None]), dim=-1)
            logprobs[p0:p1] = logp[pair_unit[p0:p1] - u0, pair_target[p0:p1]]
            p = torch.exp(logp, out=logits)
            entropies[u0:u1] = -torch.linalg.vecdot(p, logp)
            mean[u0:u1] = product(p.to(weight.dtype), weight.detach().t())
            if slope is not None:
                steep = product(p.mul_(logp).to(weight.dtype), weight.detach().t())
                slope[u0:u1] = steep + entropies[u0:u1, None] * mean[u0:u1]
        ctx.save_for_backward(pair_unit, pair_target, temperature, mean, slope, weight)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pair_unit, pair_target, temperature, mean, slope, weight = ctx.saved_tensors
        by_pair = grads[0] / temperature[pair_unit]
        units = torch.zeros(len(mean), dtype=torch.float32, device=mean.device).index_add_(0, pair_unit, by_pair)
        out = -units[:, None] * mean.float()
        out.index_add_(0, pair_unit, weight[pair_target].float() * by_pair[:, None])
        if slope is not None and grads[1] is not None:
            out -= (grads[1] / temperature)[:, None] * slope.float()
        return None, out.to(mean.dtype), None, None, None, None
