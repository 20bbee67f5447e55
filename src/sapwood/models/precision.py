"""Mixed precision: products in half precision, everything else as it is.

Torch's autocast on devices that have one. The meta device has none, so there the dtype is kept aside: the layers of
this package follow it, and a plan of a run sees what they would keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_ON_META: ContextVar[torch.dtype | None] = ContextVar("sapwood_meta_autocast", default=None)


@contextlib.contextmanager
def mixed_precision(device: torch.device | str, dtype: torch.dtype | None) -> Iterator[None]:
    """Products in this dtype; None for no change."""
    kind = torch.device(device).type
    if dtype is None:
        yield
    elif kind == "meta":
        token = _ON_META.set(dtype)
        try:
            yield
        finally:
            _ON_META.reset(token)
    else:
        with torch.autocast(kind, dtype=dtype):
            yield


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No mixed precision inside."""
    if device.type == "meta":
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def product_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products where mixed precision is on, or None."""
    if device.type == "meta":
        return _ON_META.get()
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
