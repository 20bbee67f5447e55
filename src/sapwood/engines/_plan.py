"""The attention plan of one forward: which queries read which stored keys and values.

A plan is a list of blocks over the prefix trie. All queries below a shared segment read its keys in one block,
without a mask; a segment that is being prefilled adds a causal block over itself; the private tails of the running
rows are one padded batch. What a query gets from its blocks is merged by log-sum-exp, as flash attention merges tiles
(Dao et al. 2022, https://arxiv.org/abs/2205.14135).

Axis letters: N queries, K key/value heads, G query heads per key/value head, D head width, L keys of a block,
T columns of the tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
#: Stands for the log of no mass at all; finite, so that differences of two of them are 0 and never NaN.
_NOTHING = -1e30


@dataclass(frozen=True)
class Heads:
    """How a layer scores: scale times q.k, bounded by softcap, keys at a distance of `window` or more unseen."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Block:
    """The queries `rows` read keys[layer] [K, L, D], which sit at positions start, start+1 ...

    causal: the i-th query sits at the i-th key's position. rows: a slice of the N queries, or their indices.
    low, high: least and greatest position of the queries.
    """

    rows: slice | Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    start: int
    low: int
    high: int
    causal: bool = False


@dataclass(frozen=True)
class Write:
    """Queries a:b store their keys and values in keys[layer] [K, b-a, D]."""

    a: int
    b: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True)
class TailBlock:
    """All N queries, one a row, store into column `column` of keys[layer] [N, K, T, D], then read base:column+1.

    mask [N, 1, 1, T]: 0 or -inf, None if every row fills all columns from `base` on.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    base: int
    column: int
    mask: Tensor | None


@dataclass
class Plan:
    """One forward. tokens [N], positions [N] (int64), blocks in an order where the first one of a query comes first.

    sample: the queries whose hidden states are wanted (indices), None for all. last: the plan of these queries
    alone for the last layer, where nothing else is needed of the others than their keys and values.
    """

    tokens: Tensor
    positions: Tensor
    blocks: list[Block]
    writes: list[Write] = field(default_factory=list)
    tail: TailBlock | None = None
    sample: Tensor | None = None
    last: Plan | None = None
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep this layer's keys and values. k, v [N, K, D]."""
        if self.tail is not None:
            self.tail.keys[layer][:, :, self.tail.column] = k
            self.tail.values[layer][:, :, self.tail.column] = v
            return
        for write in self.writes:
            write.keys[layer].copy_(k[write.a : write.b].transpose(0, 1))
            write.values[layer].copy_(v[write.a : write.b].transpose(0, 1))

    def attend(self, layer: int, q: Tensor, heads: Heads) -> Tensor:
        """q [N, K, G, D] -> [N, K, G, D]. `store` comes first."""
        merged = _Merged(q)
        if self.tail is not None:
            merged.add(slice(0, q.shape[0]), *_attend_tail(q, self.tail, layer, heads))
        for number, block in enumerate(self.blocks):
            mask = self._mask(number, block, heads)
            if mask is not None and mask.numel() == 0:
                continue
            part = q[block.rows]
            if block.causal and mask is None:
                merged.add(block.rows, *_attend_causal(part, block.keys[layer], block.values[layer], heads))
            else:
                merged.add(block.rows, *_attend_full(part, block.keys[layer], block.values[layer], heads, mask))
        return merged.out()

    def _mask(self, number: int, block: Block, heads: Heads) -> Tensor | None:
        """[n, L] bool of what is seen; None: everything, or plain causal order; empty: nothing."""
        window, length = heads.window, block.keys[0].shape[1]
        if block.causal:
            fused = heads.softcap is None and self.positions.device.type == "cpu"
            if fused and (window is None or length <= window):
                return None
        elif window is None or block.high - block.start < window:
            return None
        elif block.low - (block.start + length - 1) >= window:
            return self.positions.new_empty((0, length), dtype=torch.bool)
        key = (number, window)
        if key not in self._masks:
            where = torch.arange(block.start, block.start + length, device=self.positions.device)
            distance = self.positions[block.rows][:, None] - where[None, :]
            seen = distance >= 0
            self._masks[key] = seen if window is None else seen & (distance < window)
        return self._masks[key]


class _Merged:
    """What the queries have gathered so far: outputs weighted by the mass behind them."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._out: Tensor | None = None
        self._mass: Tensor | None = None

    def add(self, rows: slice | Tensor, out: Tensor, logmass: Tensor) -> None:
        """out [n, K, G, D], logmass [n, K, G] (float32, at least _NOTHING)."""
        if self._out is None and out.shape[0] == self._q.shape[0] and isinstance(rows, slice):
            self._out, self._mass = out, logmass
            return
        if self._out is None:
            self._out = torch.zeros_like(self._q)
            self._mass = torch.full(self._q.shape[:-1], _NOTHING, dtype=torch.float32, device=self._q.device)
        assert self._mass is not None
        before = self._mass[rows]
        share = torch.sigmoid(logmass - before).to(out.dtype)[..., None]
        if isinstance(rows, slice):
            self._out[rows].lerp_(out, share)
        else:
            self._out[rows] = torch.lerp(self._out[rows], out, share)
        self._mass[rows] = torch.logaddexp(before, logmass)

    def out(self) -> Tensor:
        """[N, K, G, D]."""
        assert self._out is not None
        return self._out


def _attend_tail(q: Tensor, tail: TailBlock, layer: int, heads: Heads) -> tuple[Tensor, Tensor]:
    end = tail.column + 1
    base = tail.base if heads.window is None else max(tail.base, end - heads.window)
    keys, values = tail.keys[layer][:, :, base:end], tail.values[layer][:, :, base:end]
    mask = None if tail.mask is None else tail.mask[..., base:end]
    if q.device.type == "cpu" and heads.softcap is None:
        if mask is not None:
            mask = mask.expand(q.shape[0], 1, q.shape[2], end - base)
        return _flash(q, keys, values, attn_mask=mask, scale=heads.scale)
    scores = _bounded(q @ keys.transpose(-1, -2), heads)
    if mask is not None:
        scores = scores + mask
    mass = scores.logsumexp(-1)
    return (scores - mass[..., None]).exp_().to(q.dtype) @ values, mass


def _attend_causal(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """q [n, K, G, D] on its own keys k [K, n, D]. Heads of a group share keys through a stride of 0."""
    shape = (k.shape[0], q.shape[2], *k.shape[1:])
    out, mass = _flash(
        q.permute(1, 2, 0, 3), k[:, None].expand(shape), v[:, None].expand(shape), 0.0, True, scale=heads.scale
    )
    return out.permute(2, 0, 1, 3), mass.permute(2, 0, 1)


def _attend_full(q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [n, K, G, D], k and v [K, L, D], mask [n, L]: the heads of a group are folded into the queries."""
    n, kv, group, width = q.shape
    folded = q.transpose(0, 1).reshape(kv, n * group, width)
    if mask is None and heads.softcap is None and q.device.type == "cpu":
        out, mass = _flash(folded[None], k[None], v[None], scale=heads.scale)
        out, mass = out[0], mass[0]
    else:
        scores = _bounded(folded @ k.transpose(-1, -2), heads)
        if mask is not None:
            scores = scores.masked_fill(~mask.repeat_interleave(group, 0), -torch.inf)
        mass = scores.logsumexp(-1).clamp_(min=_NOTHING)
        out = (scores - mass[..., None]).exp_().to(q.dtype) @ v
    return out.view(kv, n, group, width).transpose(0, 1), mass.view(kv, n, group).transpose(0, 1)


def _bounded(scores: Tensor, heads: Heads) -> Tensor:
    scores = scores.float() * heads.scale
    return scores if heads.softcap is None else heads.softcap * torch.tanh(scores / heads.softcap)
