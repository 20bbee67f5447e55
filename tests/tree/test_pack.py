"""Packing: what fits together, what is split and what is refused."""

from __future__ import annotations

import pytest

from sapwood.errors import BudgetError
from sapwood.tree import distinct_tokens, pack
from tests.conftest import make_row, random_rows


def sizes(batches):
    return [distinct_tokens([row.token_ids for row in batch]) for batch in batches]


def test_groups_that_share_a_trunk_are_packed_together():
    # Each group costs 3 alone; the groups that begin with 1 1 cost 2 + 1 + 1 = 4 together and fit a budget of 4.
    rows = [make_row([1, 1, 5], [2], group=0), make_row([7, 7, 7], [2], group=1), make_row([1, 1, 6], [2], group=2)]
    batches = pack(rows, 4)
    assert [[row.group for row in batch] for batch in batches] == [[0, 2], [1]]
    assert sizes(batches) == [4, 3]


def test_a_group_too_large_repeats_its_trunk():
    # Trunk of 2, four leaves of 2: 10 distinct tokens. A budget of 6 takes two leaves at a time: 2 + 2 + 2.
    rows = [make_row([1, 1, leaf, leaf], [2, 3]) for leaf in (2, 3, 4, 5)]
    assert sizes(pack(rows, 6)) == [6, 6]
    assert sizes(pack(rows, 10)) == [10]


def test_a_row_that_cannot_fit_is_named():
    with pytest.raises(BudgetError, match=r"group 3 .* 5 tokens.*token_budget = 4"):
        pack([make_row([1, 2, 3, 4, 5], [1], group=3)], 4)


@pytest.mark.parametrize("budget", [40, 80, 10_000])
def test_every_row_is_in_exactly_one_batch_within_budget(budget):
    rows = [row for g in range(5) for row in _grouped(random_rows(g, 2), g)]
    batches = pack(rows, budget)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(id(row) for row in rows)
    assert all(size <= budget for size in sizes(batches))
    assert pack(rows, budget)[0][0] is batches[0][0]


def _grouped(rows, group):
    unique = {id(row): row for row in rows}
    for row in unique.values():
        row.group = group
    return list(unique.values())
