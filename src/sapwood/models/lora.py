"""LoRA linear layers whose forward and backward are a few matrix products and no temporaries.

PEFT's layer computes W x, then A x, B A x, a scaling and a sum, each its own pass over [N, out]. Here the adapter's
product is accumulated into W x by the product itself (addmm), and likewise in the backward pass. Numbers agree to
rounding; anything beyond plain LoRA on a plain Linear (dropout, DoRA, quantised base, several adapters) goes through
PEFT's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T. x [N, in], W [out, in], A [r, in], B [out, r]; W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a_, b_ = a.to(x.dtype), b.to(x.dtype)
        y = nn.functional.linear(x, weight, bias)
        low = x @ a_.t()
        y.addmm_(low, b_.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        g = grads[0]
        # A product with r = 8 to 64 columns is several times slower where its long operand is the transposed one, so
        # the small operand is turned instead.
        g_low = nn.functional.linear(g, b.to(g.dtype).t().contiguous())
        gx = None
        if ctx.needs_input_grad[0]:
            gx = g @ weight
            gx.addmm_(g_low, a.to(g.dtype), alpha=ctx.scale)
        ga = (g_low.t() @ x).to(a.dtype).mul_(ctx.scale)
        gb = (low.t() @ g).t().to(b.dtype) * ctx.scale
        return gx, None, None, ga, gb, None


class FusedLoraLinear(peft_layer.Linear):
    """PEFT's LoRA Linear with the fused path where it applies. Made by `fuse_lora`, never constructed."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        active = self.active_adapters
        plain = not (args or kwargs or self.disable_adapters or self.merged) and len(active) == 1
        if not plain or active[0] not in self.lora_A or active[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)
        base: Any = self.get_base_layer()
        if x.dtype != base.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y = _LoraLinear.apply(
            flat, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        assert isinstance(y, Tensor)
        return y.view(*x.shape[:-1], y.shape[-1])


def fuse_lora(model: nn.Module) -> int:
    """Give every eligible LoRA layer of a PEFT model the fused path; returns how many."""
    count = 0
    for module in model.modules():
        if type(module) is not peft_layer.Linear:
            continue
        base = module.get_base_layer()
        frozen = type(base) is nn.Linear and not base.weight.requires_grad
        biased = any(getattr(b, "bias", None) is not None for b in module.lora_B.values())
        if frozen and not biased and not module.fan_in_fan_out:
            # Still PEFT's layer in every respect but its forward.
            module.__class__ = FusedLoraLinear
            count += 1
    return count
