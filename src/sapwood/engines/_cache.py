"""Keys and values by prefix: a radix trie of shared segments, and the private tails of the running rows.

Axis letters: K key/value heads, D head width, L tokens of a segment, R rows, C columns of the tails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sapwood.types import Ids


@dataclass(frozen=True)
class KvShape:
    """What one token's keys and values take."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, *middle: int) -> Tensor:
        """[2 (keys, values), layers, *middle, D], uninitialised."""
        return torch.empty((2, self.layers, *middle, self.width), dtype=self.dtype, device=self.device)


class Segment:
    """A run of tokens without a branch, and what was computed for it.

    tokens [L]; start: depth of the first one; kv [2, layers, K, L, D] or None; ready: how many tokens of it are
    computed; hidden [H]: final hidden state of the last token, if some prompt ended there; users: running rows and
    kept episodes whose prompt ends with this segment.
    """

    def __init__(self, tokens: Ids, start: int, parent: Segment | None) -> None:
        self.tokens = tokens
        self.start = start
        self.parent = parent
        self.children: dict[int, Segment] = {}
        self.kv: Tensor | None = None
        self.keys: Sequence[Tensor] = ()
        self.values: Sequence[Tensor] = ()
        self.ready = 0
        self.hidden: Tensor | None = None
        self.users = 0
        self.last_used = 0

    @property
    def end(self) -> int:
        """Depth after the last token."""
        return self.start + len(self.tokens)

    def hold(self, kv: Tensor) -> None:
        """Keep keys and values, with a view for each layer."""
        self.kv = kv
        self.keys, self.values = kv[0].unbind(0), kv[1].unbind(0)

    def path(self) -> list[Segment]:
        """From the first segment to this one; the trie's empty root is left out."""
        nodes: list[Segment] = []
        node: Segment | None = self
        while node is not None and node.end > 0:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def common_prefix(a: Ids, b: Ids) -> int:
    """Number of leading tokens that a and b share."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size


class PrefixCache:
    """The radix trie of prompts. `tokens` counts what it holds."""

    def __init__(self) -> None:
        self.root = Segment(np.empty(0, np.int64), 0, None)
        self.tokens = 0
        self._clock = 0

    def insert(self, prompt: Ids) -> Segment:
        """The segment that ends exactly where the prompt ends; segments are added or split as needed."""
        node, depth = self.root, 0
        while depth < len(prompt):
            child = node.children.get(int(prompt[depth]))
            if child is None:
                child = Segment(prompt[depth:].copy(), depth, node)
                node.children[int(prompt[depth])] = child
                self.tokens += len(child.tokens)
                return child
            shared = common_prefix(child.tokens, prompt[depth:])
            if shared < len(child.tokens):
                child = self._split(child, shared)
            node, depth = child, depth + shared
        return node

    def missing(self, prompt: Ids) -> int:
        """How many tokens `insert` would add."""
        node, depth = self.root, 0
        while depth < len(prompt):
            child = node.children.get(int(prompt[depth]))
            if child is None:
                break
            shared = common_prefix(child.tokens, prompt[depth:])
            depth += shared
            if shared < len(child.tokens):
                break
            node = child
        return len(prompt) - depth

    def _split(self, lower: Segment, at: int) -> Segment:
        """Put the first `at` tokens of a segment into a parent of its own, which is returned.

        The given object stays the lower part, so that whoever ends with it still does. Both parts get storage of
        their own: evicting one then really frees it.
        """
        assert lower.parent is not None
        upper = Segment(lower.tokens[:at], lower.start, lower.parent)
        upper.last_used = lower.last_used
        upper.parent = lower.parent
        lower.parent.children[int(upper.tokens[0])] = upper
        lower.parent, lower.tokens, lower.start = upper, lower.tokens[at:], lower.start + at
        upper.children[int(lower.tokens[0])] = lower
        if lower.kv is not None:
            kv = lower.kv
            upper.hold(kv[:, :, :, :at].clone())
            lower.hold(kv[:, :, :, at:].clone())
        upper.ready, lower.ready = min(lower.ready, at), max(lower.ready - at, 0)
        return upper

    def retain(self, leaf: Segment) -> None:
        """Protect a path from eviction until `release`."""
        leaf.users += 1

    def release(self, leaf: Segment) -> None:
        """Undo one `retain`; the path becomes the most recently used."""
        leaf.users -= 1
        self._clock += 1
        for node in leaf.path():
            node.last_used = self._clock

    def evict(self, surplus: int) -> int:
        """Forget at least `surplus` tokens of unused segments, least recently used first; returns how many."""
        freed = 0
        while freed < surplus:
            idle = [node for node in self._nodes() if not node.children and not node.users]
            if not idle:
                break
            victim = min(idle, key=lambda node: node.last_used)
            assert victim.parent is not None
            del victim.parent.children[int(victim.tokens[0])]
            freed += len(victim.tokens)
        self.tokens -= freed
        return freed

    def held(self) -> int:
        """Tokens that can't be evicted: those on a path that somebody uses."""
        used: dict[int, int] = {}
        for leaf in self._nodes():
            if leaf.users:
                used.update((id(node), len(node.tokens)) for node in leaf.path())
        return sum(used.values())

    def _nodes(self) -> Iterator[Segment]:
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


class Tails:
    """Private keys and values of the running rows, right-aligned: every row's newest token is in the last column.

    So one decode step writes one column for all rows, and a row that joined late is masked on its left; the masks
    only change when rows join or leave. keys, values: for each layer [R, K, C, D].
    """

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        self.rows = 0
        self.column = 0
        self.lengths: list[int] = []
        self._kv = shape.empty(0, shape.heads, 0)
        self._mask: Tensor | None = None

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the rows in use, for each layer [R, K, C, D]."""
        view = self._kv[:, :, : self.rows]
        return list(view[0].unbind(0)), list(view[1].unbind(0))

    @property
    def base(self) -> int:
        """First column that some row uses."""
        return self.column - max(self.lengths, default=0)

    def mask(self) -> Tensor | None:
        """[R, 1, 1, C] of 0 and -inf by column, None where all rows begin in the same column."""
        if len(set(self.lengths)) <= 1:
            return None
        if self._mask is None:
            first = torch.tensor([self.column - length for length in self.lengths])
            unseen = torch.arange(self._kv.shape[4])[None] < first[:, None]
            mask = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
            self._mask = mask.to(self.shape.device, self.shape.dtype)[:, None, None]
        return self._mask

    def advance(self) -> None:
        """The last column was written for every row."""
        self.column += 1
        self.lengths = [length + 1 for length in self.lengths]

    def add(self, histories: Sequence[Sequence[Tensor]], room: int) -> None:
        """Append rows. histories: for each its pieces [2, layers, K, m, D]; room: columns that will be written."""
        lengths = [sum(piece.shape[3] for piece in pieces) for pieces in histories]
        live = max([*self.lengths, *lengths], default=0)
        self._reserve(self.rows + len(histories), live, room)
        for row, (pieces, length) in enumerate(zip(histories, lengths, strict=True), start=self.rows):
            column = self.column - length
            if column:
                # Masked columns are read all the same, and 0 * NaN would spoil the sum.
                self._kv[:, :, row, :, :column] = 0
            for piece in pieces:
                self._kv[:, :, row, :, column : column + piece.shape[3]] = piece
                column += piece.shape[3]
        self.rows += len(histories)
        self.lengths += lengths
        self._mask = None

    @property
    def full(self) -> bool:
        """No column is left to write."""
        return self.column == self._kv.shape[4]

    def reserve(self, room: int) -> None:
        """Leave `room` columns to write."""
        self._reserve(self.rows, max(self.lengths, default=0), room)
        self._mask = None

    def _reserve(self, rows: int, live: int, room: int) -> None:
        """Make `column` at least `live` and leave `room` columns behind it, moving what is there."""
        have_rows, have_columns = self._kv.shape[2], self._kv.shape[4]
        if rows <= have_rows and self.column >= live and self.column + room <= have_columns:
            return
        window = max(self.lengths, default=0)
        kept = self._kv[:, :, : self.rows, :, self.column - window : self.column]
        fits = rows <= have_rows and live + room <= have_columns
        if fits:
            kept = kept.clone()
        else:
            # Growing by half bounds how often a long run of joins has to move everything.
            columns = live + room if live + room <= have_columns else max(live + room, have_columns * 3 // 2)
            self._kv = self.shape.empty(max(rows, have_rows), self.shape.heads, columns)
        self.column = live
        self._kv[:, :, : self.rows, :, : live - window] = 0
        self._kv[:, :, : self.rows, :, live - window : live] = kept

    def take(self, row: int) -> Tensor:
        """A copy of a row's keys and values [2, layers, K, length, D]."""
        return self._kv[:, :, row, :, self.column - self.lengths[row] : self.column].clone()

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            base = self.base
            self._kv[:, :, row, :, base : self.column] = self._kv[:, :, last, :, base : self.column]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.rows = last
        self._mask = None
        if not last:
            self.column = 0

    def shrink(self) -> None:
        """Give the memory back; only without rows."""
        assert not self.rows
        self._kv = self.shape.empty(0, self.shape.heads, 0)
        self.column = 0
