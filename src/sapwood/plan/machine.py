"""What this machine has: memory that a run may take, and how fast it multiplies and moves numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sapwood.models.products import product
from sapwood.tree import TokenTree, TreeContext
from sapwood.tree.attention import Scores, _Grouped

try:
    import resource
except ImportError:  # Windows
    resource = None

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Room:
    """Memory that a run may have in all, what is in use of this process included. limit: what bounds it, in words."""

    bytes: int
    limit: str


def resident() -> int:
    """Resident memory of this process."""
    return _status("VmRSS") or 0


def _status(key: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is none."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    lines = (line for line in path.read_text().splitlines() if line.startswith(f"{key}:"))
    return next((int(line.split()[1]) * 1024 for line in lines), None)


def room(device: torch.device) -> Room | None:
    """What a run on this device may take; None where the system doesn't say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Room(int(free), f"free on {torch.cuda.get_device_name(device)}")
    own = resident()
    found = [limit for limit in (_machine(own), _group(own), _address_space(own)) if limit is not None]
    return min(found, key=lambda limit: limit.bytes, default=None)


def _machine(own: int) -> Room | None:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return Room(int(line.split()[1]) * 1024 + own, "that this machine has to spare")
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return Room(total, "that this machine has")


#: Limit and use of a control group's memory, version 2 and 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _group(own: int) -> Room | None:
    for limit, used in _GROUPS:
        if Path(limit).is_file() and Path(used).is_file():
            told = Path(limit).read_text().strip(), Path(used).read_text().strip()
            if all(text.isdigit() for text in told):
                # Files that the group has read count as used, but give way.
                return Room(max(int(told[0]) - max(int(told[1]) - own, 0), 0), "that this control group has to spare")
    return None


def _address_space(own: int) -> Room | None:
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    mapped = _status("VmSize")
    if limit == resource.RLIM_INFINITY or mapped is None:
        return None
    return Room(max(own + limit - mapped, 0), "under this process's limit on address space (ulimit -v)")


@dataclass(frozen=True)
class Speed:
    """What a second, or an operation, comes to.

    flops: of matrix products with as many rows as a micro-batch; skinny, packed: seconds a parameter of a decode step's
    products, with plain weights and with packed ones; moved: bytes that elementwise operations read and write;
    attention: flops of the tree's attention; call: seconds that any operation takes at least.
    """

    flops: float
    skinny: float
    packed: float
    moved: float
    attention: float
    call: float = 8e-6


def measure(
    hidden: int, inner: int, heads: tuple[int, int, int], tree: TokenTree, batch: int, dtype: torch.dtype
) -> Speed:
    """Measure it on the CPU, in a second or two, with the shapes of a model: hidden and inner width, (heads, key and
    value heads, head width), the tree of a micro-batch, rows of a decode step."""
    hidden, inner = min(hidden, 4096), min(inner, 8192)
    rows = min(max(len(tree), 16), 1024)
    x, wide = torch.ones(rows, hidden, dtype=dtype), torch.ones(rows, inner, dtype=dtype)
    weights = [
        torch.full((inner, hidden), 0.01, dtype=dtype) for _ in range(max(2, (64 * MIB) // (inner * hidden * 4)))
    ]
    dense = _seconds(lambda i: product(x, weights[i % len(weights)]), 0.4)
    few = torch.ones(batch, hidden, dtype=dtype)
    # Each time another weight, so that it comes from memory as it does in a model.
    skinny = _seconds(lambda i: torch.nn.functional.linear(few, weights[i % len(weights)]), 0.3)
    packed = skinny
    if packs(dtype):
        laid_out = [torch.ops.mkldnn._reorder_linear_weight(weight, batch) for weight in weights]
        pointwise = torch.ops.mkldnn._linear_pointwise
        packed = _seconds(lambda i: pointwise(few, laid_out[i % len(laid_out)], None, "none", [], ""), 0.3)
    moved = _seconds(lambda i: wide * 1.5, 0.2)
    return Speed(
        flops=2.0 * rows * hidden * inner / dense,
        skinny=skinny / (hidden * inner),
        packed=packed / (hidden * inner),
        moved=2.0 * wide.numel() * wide.element_size() / moved,
        attention=_attention_rate(heads, tree, dtype),
    )


def packs(dtype: torch.dtype) -> bool:
    """Whether the local engine packs its widest weights on this CPU."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return known and dtype is torch.float32


def _attention_rate(heads: tuple[int, int, int], tree: TokenTree, dtype: torch.dtype) -> float:
    """Flops a second of forward and backward together, over the real tree."""
    query_heads, kv_heads, width = heads
    n = len(tree)
    shapes = ((query_heads, n, width), (kv_heads, n, width), (kv_heads, n, width))
    how = Scores(width**-0.5, 0.0, 0, tree.positions)
    plan = TreeContext(tree).plan
    pairs = float((tree.trie.positions + 1).sum())

    def run(_: int) -> Tensor:
        q, k, v = (torch.ones(shape, dtype=dtype).requires_grad_() for shape in shapes)
        result = _Grouped.apply(q, k, v, plan, how)
        assert isinstance(result, Tensor)
        result.sum().backward()
        return result

    return 14.0 * query_heads * width * pairs / _seconds(run, 0.3)


def _seconds(run: Callable[[int], Tensor], budget: float) -> float:
    """The median time of a call, after one that isn't counted."""
    run(0)
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < 3 or (time.perf_counter() - began < budget and len(found) < 200):
        start = time.perf_counter()
        run(len(found) + 1)
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]
