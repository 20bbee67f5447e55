"""Matrix products with frozen weights, by the fastest library that the machine has.

Torch sends fp32 products on a CPU to MKL, which on other makers' processors stays with instructions half as wide as
they have; oneDNN, which is part of torch too, uses them. Which of the two computes a product is decided by its shape
alone, so that equal runs give equal numbers; but for a process whose memory is limited, in which oneDNN crashes where
MKL raises an error that can be caught.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

#: Rows from which on oneDNN's set-up is repaid.
_ENOUGH_ROWS = 64
_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def memory_limited() -> bool:
    """Whether this process may not take all the memory that it wants (`ulimit -v`, RLIMIT_AS, RLIMIT_DATA)."""
    if resource is None:
        return False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, in] weight [out, in]^T + bias -> [N, out], without gradient. Either may be the transpose of a matrix."""
    plain = x.dtype is torch.float32 and weight.dtype is torch.float32 and x.device.type == "cpu"
    enough = plain and max(len(x), x.shape[1]) >= _ENOUGH_ROWS
    if not (_ONEDNN and enough and _dense(x) and _dense(weight)) or memory_limited():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(matrix: Tensor) -> bool:
    """Whether its values lie one after the other, by rows or by columns; oneDNN is slow over any other layout."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()
