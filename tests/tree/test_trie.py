"""The trie of a batch, by hand and against a set of prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.tree import TokenTree, build_trie, distinct_tokens
from tests.conftest import make_row


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def test_a_hand_drawn_trie():
    #      1 2 ─┬─ 3 4          nodes in depth-first order: 1 2 3 4 5 6 | 9
    #           └─ 5 6          segments: [1 2] [3 4] [5 6] [9]
    #      9
    trie = build_trie([ids(1, 2, 5, 6), ids(1, 2, 3, 4), ids(9), ids(1, 2)])
    assert trie.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert trie.positions.tolist() == [0, 1, 2, 3, 2, 3, 0]
    assert trie.parents.tolist() == [-1, 0, 1, 2, 1, 4, -1]
    assert [path.tolist() for path in trie.paths] == [[0, 1, 4, 5], [0, 1, 2, 3], [6], [0, 1]]
    segments = trie.segments
    assert segments.start.tolist() == [0, 2, 4, 6]
    assert segments.end.tolist() == [2, 4, 6, 7]
    assert segments.subtree_end.tolist() == [6, 4, 6, 7]
    assert segments.parent.tolist() == [-1, 0, 0, -1]
    assert segments.depth.tolist() == [0, 2, 2, 0]


def test_a_row_that_is_a_prefix_does_not_cut_a_segment():
    trie = build_trie([ids(1, 2, 3), ids(1, 2)])
    assert len(trie.segments) == 1
    assert trie.paths[1].tolist() == [0, 1]


def test_tokens_are_ordered_as_numbers_not_as_bytes():
    # 255 < 256 in value, while little-endian bytes would order them the other way round.
    assert build_trie([ids(256), ids(255)]).token_ids.tolist() == [255, 256]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=12))
def test_every_distinct_prefix_is_one_node(sequences):
    rows = [np.array(sequence, dtype=np.int64) for sequence in sequences]
    trie = build_trie(rows)
    prefixes = {tuple(row[: n + 1]) for row in sequences for n in range(len(row))}
    assert len(trie) == len(prefixes) == distinct_tokens(rows)
    for row, path in zip(rows, trie.paths, strict=True):
        assert trie.token_ids[path].tolist() == row.tolist()
        assert trie.positions[path].tolist() == list(range(len(row)))
    for k in range(len(trie.segments)):  # a subtree is exactly the interval up to subtree_end
        start, end = int(trie.segments.start[k]), int(trie.segments.subtree_end[k])
        below = {n for n in range(len(trie)) if _has_ancestor(trie.parents, n, start)}
        assert below == set(range(start, end))


def _has_ancestor(parents: np.ndarray, node: int, ancestor: int) -> bool:
    while node >= 0:
        if node == ancestor:
            return True
        node = int(parents[node])
    return False


def test_a_node_serves_several_targets_and_temperatures_once_each():
    # Node 1 (token 2 after 1) is asked for targets 3 and 4 at temperature 1, and for 3 again at temperature 0.5.
    rows = [make_row([1, 2, 3], [2]), make_row([1, 2, 4], [2]), make_row([1, 2, 3], [2], temperature=0.5)]
    tree = TokenTree.of(rows)
    assert tree.score_node.tolist() == [1, 1]
    assert sorted(tree.unit_temperature.tolist()) == [0.5, 1.0]
    assert len(tree.pair_unit) == 3
    pairs = [(float(tree.unit_temperature[tree.pair_unit[p]]), int(tree.pair_target[p])) for p in tree.scored_pair]
    assert pairs == [(1.0, 3), (1.0, 4), (0.5, 3)]


def test_an_empty_batch_and_an_unscored_row():
    assert len(TokenTree.of([])) == 0
    tree = TokenTree.of([make_row([1, 2], [])])
    assert len(tree) == 2
    assert len(tree.score_node) == 0
