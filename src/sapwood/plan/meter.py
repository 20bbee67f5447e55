"""What a piece of torch code needs, counted while it runs: memory at its peak, products, bytes moved.

Counting looks at shapes alone, so the code may run on torch's meta device, where nothing is computed and nothing is
stored; it then takes milliseconds for a model of any size. What happens inside of one operation (a kernel's scratch
memory) is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Matrix products, and which argument's last dimension is summed over.
_PRODUCTS = {"mm": 0, "bmm": 0, "linear": 0, "matmul": 0, "addmm": 1, "baddbmm": 1, "_linear_pointwise": 0}
#: Blocks above this size glibc takes from the system and gives back at once; smaller ones it keeps.
HEAP_BLOCK = 32 * 2**20
#: Operations that only make room, or that copy nothing.
_IDLE = ("empty", "new_empty", "detach", "lift", "alias", "is_same_size")


@dataclass
class Work:
    """flops: of matrix products; products: their number; moved: bytes that all other operations read and write; calls:
    their number; attention: flops of attention, reported by whoever computes it; churn: bytes that come and go in
    blocks that an allocator keeps (up to HEAP_BLOCK)."""

    flops: float = 0.0
    products: int = 0
    moved: float = 0.0
    calls: int = 0
    attention: float = 0.0
    churn: float = 0.0

    def times(self, factor: float) -> Work:
        """So much work `factor` times over."""
        return Work(*(value * factor for value in vars(self).values()))

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Peak:
    """The most that was alive at once. by_label: bytes at that moment by the label under which they came to be."""

    total: int = 0
    by_label: Mapping[str, int] = field(default_factory=dict)


class Meter(TorchDispatchMode):
    """Counts while it is entered. live: bytes alive by label; peak: their largest sum; work: what was computed.

    Memory of tensors that were there before isn't counted. `label` names what comes to be from then on.
    """

    def __init__(self, label: str = "activations") -> None:
        super().__init__()
        self.label = label
        self.live: Counter[str] = Counter()
        self.peak = Peak()
        self.work = Work()
        self._total = 0
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    @property
    def total(self) -> int:
        """Bytes alive."""
        return self._total

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What comes to be inside has this label."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Move tensors that are alive to another label (gradients, which are known as such at the end)."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._known:
                reference, old, size = self._known[key]
                self.live[old] -= size
                self.live[label] += size
                self._known[key] = reference, label, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values())))
        if len({tensor.is_meta for tensor in inputs}) == 2:  # values that are looked at (indices) meet shapes
            args, kwargs = _on_meta(args), _on_meta(kwargs)
        result = func(*args, **kwargs)
        outputs = list(_tensors((result,)))
        self._keep(inputs, outputs)
        self._count(func, args, inputs, outputs)
        return result

    def _keep(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Notice storages that came to be, and be told when they go."""
        theirs = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if not size or key in theirs or key in self._known:
                continue
            self._known[key] = weakref.ref(storage, partial(self._gone, key)), self.label, size
            self.live[self.label] += size
            self._total += size
            self.work.churn += size if size <= HEAP_BLOCK else 0
            if self._total > self.peak.total:
                self.peak = Peak(self._total, dict(self.live))

    def _gone(self, key: int, _: object) -> None:
        _, label, size = self._known.pop(key)
        self.live[label] -= size
        self._total -= size

    def _count(self, func: Any, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _PRODUCTS:
            inner = args[_PRODUCTS[name]].shape[-1]
            self.work.flops += 2.0 * inner * sum(tensor.numel() for tensor in outputs)
            self.work.products += 1
        elif not name.startswith(_IDLE) and not _is_view(func):
            self.work.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
            self.work.calls += 1


def _is_view(func: Any) -> bool:
    """Whether the result only looks at an argument's memory in another way."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return (
        any(alias is not None and not alias.is_write for alias in aliases) or func._schema.name == "aten::_unsafe_view"
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _on_meta(value: Any) -> Any:
    """The same arguments, every tensor without values."""
    if isinstance(value, Tensor):
        return value if value.is_meta else meta(value)
    if isinstance(value, list | tuple):
        return type(value)(_on_meta(item) for item in value)
    return {key: _on_meta(item) for key, item in value.items()} if isinstance(value, dict) else value


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors."""
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


def meta(tensor: Tensor) -> Tensor:
    """Its shape and type without its values."""
    return torch.empty_like(tensor, device="meta")
