"""What tells two models apart, so that a recording is learnt from by the model that made it and no other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from sapwood.models.adapters import adapter_parameters
from sapwood.models.load import Policy

#: Weights of each parameter that are looked at: a hash of billions would take minutes, and training moves them all.
_LOOK = 64


def identity(policy: Policy) -> dict[str, Any]:
    """{"name": the public name of the base, "adapter": digest or None, "weights": digest of the base}.

    adapter: None where the policy equals its base. Weights count as they are loaded: another dtype that rounds them,
    or quantisation, gives another digest.
    """
    adapter = None
    if policy.has_lora and not policy.starts_at_base:
        adapter = _digest(adapter_parameters(policy.model, policy.adapter), None)
    base = [p for name, p in policy.model.named_parameters() if "lora_" not in name and p.is_floating_point()]
    return {"name": policy.public_name, "adapter": adapter, "weights": _digest(base, _LOOK)}


def _digest(parameters: Iterable[torch.Tensor], look: int | None) -> str:
    """Of the parameters, or of some evenly spread weights of each, in their order."""
    digest = hashlib.sha256()
    for parameter in parameters:
        flat = parameter.detach().flatten()
        if look is not None and flat.numel() > look:
            flat = flat[:: flat.numel() // look][:look]
        digest.update(flat.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
