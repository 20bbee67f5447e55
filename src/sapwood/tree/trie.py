"""Rows -> trie -> segments: the token tree of a batch.

Rows are sorted as token strings, so that neighbours share the longest prefixes; what a row adds to its predecessor
becomes a run of nodes. Nodes are therefore numbered in depth-first order, which makes every subtree an interval:
the descendants of a segment are the nodes from its end to its `subtree_end`. All of attention rests on that.

Axis letters: R rows, N nodes (distinct tokens), K segments, S scored tokens (all rows, in row order),
P distinct (node, target, temperature) triples, U distinct (node, temperature) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.types import Ids, Row

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """Runs of nodes without a branch, in depth-first order.

    start, end [K]: the segment's nodes are start..end-1; subtree_end [K]: its descendants are end..subtree_end-1;
    parent [K]: the segment above, -1 for a root; depth [K]: position of its first node.
    """

    start: Ints
    end: Ints
    subtree_end: Ints
    parent: Ints
    depth: Ints

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Trie:
    """Distinct prefixes of some token sequences.

    token_ids [N], positions [N] (depth), parents [N] (-1 for a root); paths: for every sequence its nodes [L].
    """

    token_ids: Ints
    positions: Ints
    parents: Ints
    paths: tuple[Ints, ...]
    segments: Segments

    def __len__(self) -> int:
        return len(self.token_ids)


def sort_order(sequences: Sequence[Ids]) -> list[int]:
    """Indices that sort the sequences as token strings; ties keep their order.

    Big-endian bytes compare like the integers they encode, so one bytes comparison orders two sequences.
    """
    keys = [np.ascontiguousarray(sequence, dtype=">u4").tobytes() for sequence in sequences]
    return sorted(range(len(keys)), key=keys.__getitem__)


def shared_prefix(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def distinct_tokens(sequences: Sequence[Ids]) -> int:
    """Number of distinct prefixes, that is of nodes in the trie of these sequences."""
    order = sort_order(sequences)
    total, previous = 0, np.empty(0, dtype=np.int64)
    for index in order:
        total += len(sequences[index]) - shared_prefix(previous, sequences[index])
        previous = sequences[index]
    return total


def build_trie(sequences: Sequence[Ids]) -> Trie:
    """Merge sequences into a trie with depth-first node numbers. Empty sequences get empty paths."""
    paths: list[Ints] = [np.empty(0, dtype=np.int64)] * len(sequences)
    tokens: list[Ids] = []
    positions: list[Ints] = []
    parents: list[Ints] = []
    count = 0
    previous, path = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for index in sort_order(sequences):
        sequence = np.asarray(sequences[index], dtype=np.int64)
        shared = shared_prefix(previous, sequence)
        fresh = np.arange(count, count + len(sequence) - shared)
        if len(fresh):
            above = np.concatenate([path[shared - 1 : shared] if shared else [-1], fresh[:-1]])
            tokens.append(sequence[shared:])
            positions.append(np.arange(shared, len(sequence)))
            parents.append(above.astype(np.int64))
        path = np.concatenate([path[:shared], fresh])
        paths[index], previous, count = path, sequence, count + len(fresh)
    empty = [np.empty(0, dtype=np.int64)]
    all_parents = np.concatenate(parents or empty)
    all_positions = np.concatenate(positions or empty)
    return Trie(
        token_ids=np.concatenate(tokens or empty),
        positions=all_positions,
        parents=all_parents,
        paths=tuple(paths),
        segments=_segments(all_parents, all_positions),
    )


def _segments(parents: Ints, positions: Ints) -> Segments:
    n = len(parents)
    children = np.bincount(parents[parents >= 0], minlength=n) if n else np.empty(0, dtype=np.int64)
    # A node continues its predecessor's segment if it is that node's only child.
    starts = np.ones(n, dtype=bool)
    if n > 1:
        follows = parents[1:] == np.arange(n - 1)
        starts[1:] = ~(follows & (children[:-1] == 1))
    start = np.flatnonzero(starts)
    end = np.append(start[1:], n) if n else start
    segment_of = np.cumsum(starts) - 1
    above = parents[start] if n else start
    parent = np.where(above >= 0, segment_of[np.maximum(above, 0)], -1) if n else start
    subtree_end = end.copy()
    for k in range(len(start) - 1, -1, -1):
        if parent[k] >= 0:
            subtree_end[parent[k]] = max(subtree_end[parent[k]], subtree_end[k])
    return Segments(start, end, subtree_end, parent, positions[start] if n else start)


@dataclass(frozen=True)
class TokenTree:
    """The rows of a micro-batch as a trie, plus what each row scores where.

    token_ids, positions [N]; subtree_end [N]: last descendant + 1 of every node (for mask functions).
    score_node [U]: nodes whose hidden state reaches the LM head; pair_unit [P] (index into U, ascending),
    pair_target [P]: each distinct target of such a node; scored_pair [S]: index into P of every scored token;
    unit_temperature [U]. last_node [R]: the node of each row's last token (for scalar heads).
    """

    trie: Trie
    token_ids: Tensor
    positions: Tensor
    score_node: Tensor
    unit_temperature: Tensor
    pair_unit: Tensor
    pair_target: Tensor
    scored_pair: Tensor
    last_node: Tensor

    def __len__(self) -> int:
        return len(self.trie)

    @property
    def segments(self) -> Segments:
        """The trie's segments."""
        return self.trie.segments

    @cached_property
    def subtree_end(self) -> Tensor:
        """[N]: one past the last descendant of every node's segment; equal for nodes of one segment."""
        segments = self.segments
        return torch.from_numpy(np.repeat(segments.subtree_end, segments.end - segments.start)).to(
            self.token_ids.device
        )

    @staticmethod
    def of(rows: Sequence[Row], device: torch.device | str = "cpu") -> TokenTree:
        """Merge rows. Every row keeps its own end, mask and targets: a node may serve several, and a row may be a
        prefix of another."""
        trie = build_trie([row.token_ids for row in rows])
        nodes, targets, temperatures = [], [], []
        for row, path in zip(rows, trie.paths, strict=True):
            at = np.flatnonzero(row.loss_mask)
            nodes.append(path[at - 1])
            targets.append(row.token_ids[at])
            temperatures.append(np.full(len(at), row.temperature))
        node = np.concatenate(nodes) if nodes else np.empty(0, dtype=np.int64)
        target = np.concatenate(targets) if targets else node
        temperature = np.concatenate(temperatures) if temperatures else np.empty(0)
        units, unit_of = np.unique(np.stack([node.astype(np.float64), temperature]), axis=1, return_inverse=True)
        pairs, pair_of = np.unique(np.stack([unit_of.ravel(), target]), axis=1, return_inverse=True)
        last = np.array([path[-1] if len(path) else 0 for path in trie.paths], dtype=np.int64)

        def tensor(array: NDArray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return TokenTree(
            trie=trie,
            token_ids=tensor(trie.token_ids),
            positions=tensor(trie.positions),
            score_node=tensor(units[0].astype(np.int64)),
            unit_temperature=tensor(units[1].astype(np.float32)),
            pair_unit=tensor(pairs[0].astype(np.int64)),
            pair_target=tensor(pairs[1].astype(np.int64)),
            scored_pair=tensor(pair_of.ravel().astype(np.int64)),
            last_node=tensor(last),
        )
