"""Quantised layers by one dequantised product on the CPU.

bitsandbytes' int8 product on the CPU rounds activations too, differs between train and eval mode, and lets a row
depend on its neighbours. Here a layer's weight is dequantised for the product and again for its backward, so that
sampling, scoring and training agree and no dense copy outlives a call. On a GPU bitsandbytes' own kernels stay.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.models.precision import product_dtype
from sapwood.models.products import product


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer holds bitsandbytes' packed weight."""
    return type(getattr(module, "weight", None)).__name__ in ("Int8Params", "Params4bit")


def dense_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] of a linear layer as numbers; the layer's own tensor where nothing has to be done."""
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Int8Params":
        scale = (weight.SCB if weight.SCB is not None else module.state.SCB).to(weight.device)
        # A row's largest magnitude stands for 127.
        return weight.data.to(dtype or torch.float32) * (scale / 127.0).to(dtype or torch.float32)[:, None]
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        state = weight.quant_state
        # bitsandbytes' CPU kernel takes blocks row by row, and misreads rows that end within one.
        whole = weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0
        dense = dequantize_4bit(weight.data, state) if whole else _four_bits(weight.data, state)
        return dense if dtype is None else dense.to(dtype)
    return weight if dtype is None else weight.to(dtype)


def _four_bits(packed: Tensor, state: Any) -> Tensor:
    """Look the codes up: two a byte, the high half first, scaled block by block over the flattened weight."""
    from bitsandbytes.functional import dequantize_blockwise

    scale = state.absmax
    if state.nested:
        scale = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1).long()
    values = state.code[codes][: state.shape.numel()]
    return (values * scale.repeat_interleave(state.blocksize)[: len(values)]).reshape(state.shape).to(state.dtype)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T with frozen W; A and B may be None.

    x [N, in], A [r, in], B [out, r]. W is taken from `module` in both passes, so that a quantised one is dense only
    while it is used.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, module: nn.Module, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
    ) -> Tensor:
        weight = dense_weight(module, x.dtype).detach()
        y = product(x, weight, None if bias is None else bias.detach().to(x.dtype))
        low = None
        if a is not None and b is not None:
            low = product(x, a.detach().to(x.dtype))
            y.addmm_(low, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x if a is not None else None, a, b, low)
        ctx.module, ctx.scale = module, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        g = grads[0].contiguous()
        gx = product(g, dense_weight(ctx.module, g.dtype).detach().t()) if ctx.needs_input_grad[0] else None
        if a is None:
            return gx, None, None, None, None, None
        # A product with r = 8 to 64 columns is several times slower where its long operand is the transposed one, so
        # the small operand is turned instead.
        g_low = product(g, b.detach().to(g.dtype).t().contiguous())
        if gx is not None:
            gx.addmm_(g_low, a.to(g.dtype), alpha=ctx.scale)
        ga = product(g_low.t(), x.t()).to(a.dtype).mul_(ctx.scale)
        gb = product(low.t(), g.t()).t().to(b.dtype) * ctx.scale
        return gx, None, None, ga, gb, None


def frozen_linear(
    x: Tensor, module: Any, a: Tensor | None = None, b: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """x [..., in] through a frozen linear layer and, if given, an adapter -> [..., out]; in autocast's dtype, if on."""
    dtype = product_dtype(x.device) or x.dtype
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    y = _FrozenLinear.apply(flat, module, module.bias, a, b, scale)
    assert isinstance(y, Tensor)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Dense:
    """The forward of a quantised linear layer by its dense weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return frozen_linear(x, self)


@lru_cache
def _dense(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Dense, kind), {"__module__": kind.__module__})


def unify_products(model: nn.Module) -> None:
    """Send every quantised layer on the CPU through the dequantised product; idempotent."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    for module in model.modules():
        own = isinstance(module, nn.Linear) and is_quantised(module) and not isinstance(module, _Dense)
        if own and module.weight.device.type == "cpu":
            object.__setattr__(module, "__class__", _dense(type(module)))
