"""LoRA linear layers whose forward and backward are a few matrix products and no temporaries.

PEFT's layer computes W x, then A x, B A x, a scaling and a sum, each its own pass over [N, out]. Here the adapter's
product is accumulated into W x by the product itself (addmm), and likewise in the backward pass. Numbers agree to
rounding; anything beyond plain LoRA on a frozen linear layer (dropout, DoRA, several adapters at once, quantised
weights on a GPU) goes through PEFT's own code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from sapwood.models.precision import product_dtype
from sapwood.models.quantised import frozen_linear, is_quantised, unify_products
from sapwood.models.role import obey_roles


class FusedLoraLinear:
    """A PEFT LoRA layer's forward with the fused path where it applies; mixed in by `fuse_lora`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        active = self.active_adapters
        if self.disable_adapters and not (args or kwargs or self.merged) and self._same_dtype(x):
            # By the same product as with an adapter, so that one at zero gives the base's numbers exactly.
            return frozen_linear(x, self.get_base_layer())
        plain = not (args or kwargs or self.disable_adapters or self.merged) and len(active) == 1
        if not plain or active[0] not in self.lora_A or active[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name = active[0]
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)  # type: ignore[misc]
        if not self._same_dtype(x):
            return super().forward(x)  # type: ignore[misc]
        return frozen_linear(
            x, self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )

    def _same_dtype(self: Any, x: Tensor) -> bool:
        base = self.get_base_layer()
        return x.dtype == base.weight.dtype or is_quantised(base) or product_dtype(x.device) is not None


@lru_cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (FusedLoraLinear, kind), {"__module__": kind.__module__})


def fuse_lora(model: nn.Module) -> int:
    """Give every eligible LoRA layer of a PEFT model the fused path, and make all follow roles; returns how many."""
    obey_roles(model)
    unify_products(model)
    count = 0
    for module in model.modules():
        if not isinstance(module, peft_layer.LoraLayer) or not isinstance(module, nn.Module):
            continue
        base: Any = module.get_base_layer()
        quantised = is_quantised(base) and base.weight.device.type == "cpu"
        frozen = isinstance(module, peft_layer.Linear) and type(base) is nn.Linear and not base.weight.requires_grad
        biased = any(getattr(b, "bias", None) is not None for b in module.lora_B.values())
        if isinstance(module, FusedLoraLinear) or biased or module.fan_in_fan_out or not (frozen or quantised):
            continue
        # Still PEFT's layer in every respect but its forward.
        object.__setattr__(module, "__class__", _fused(type(module)))
        count += 1
    return count
