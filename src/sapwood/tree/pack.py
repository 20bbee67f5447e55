"""Packing: which rows share a micro-batch. It decides memory, never a gradient.

The budget counts distinct tokens. Groups stay whole where they fit; a group that doesn't is cut between its sorted
rows, each part repeating the trunk it needs. Neighbouring groups that share a prefix share a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapwood.errors import BudgetError
from sapwood.tree.trie import distinct_tokens, shared_prefix, sort_order
from sapwood.types import Ids, Row


def pack(
    rows: Sequence[Row], token_budget: int, *, atomic: bool = False, max_groups: int | None = None
) -> list[list[Row]]:
    """Micro-batches of at most `token_budget` distinct tokens and `max_groups` groups each; every row in exactly one.

    atomic: the rows of a group share a micro-batch. Raises BudgetError, naming the row or group, where one exceeds the
    budget.
    """
    units: dict[int, list[Row]] = {}
    for row in rows:
        if len(row.token_ids) > token_budget:
            raise BudgetError(
                f"a row of group {row.group} (member {row.member}) has {len(row.token_ids)} tokens, more than "
                f"optim.token_budget = {token_budget}; raise the budget or shorten prompts or replies."
            )
        units.setdefault(row.group, []).append(row)
    heads = [min(unit, key=lambda row: row.token_ids.astype(">u4").tobytes()) for unit in units.values()]
    in_order = [list(units.values())[i] for i in sort_order([head.token_ids for head in heads])]
    batches: list[list[Row]] = []
    current: list[Row] = []
    members = 0
    for unit in in_order:
        if current and (max_groups is None or members < max_groups) and _cost(current + unit) <= token_budget:
            current, members = current + unit, members + 1
            continue
        if current:
            batches.append(current)
        cost = _cost(unit)
        if atomic and cost > token_budget:
            raise BudgetError(
                f"group {unit[0].group} has {cost} distinct tokens that can't be split, more than optim.token_budget = "
                f"{token_budget}; raise the budget or shorten prompts or replies."
            )
        parts = [unit] if cost <= token_budget else _split(unit, token_budget)
        batches.extend(parts[:-1])
        current, members = parts[-1], 1
    if current:
        batches.append(current)
    return batches


def _cost(rows: Sequence[Row]) -> int:
    return distinct_tokens([row.token_ids for row in rows])


def _split(unit: Sequence[Row], token_budget: int) -> list[list[Row]]:
    parts: list[list[Row]] = [[]]
    previous: Ids = np.empty(0, dtype=np.int64)
    used = 0
    for index in sort_order([row.token_ids for row in unit]):
        row = unit[index]
        extra = len(row.token_ids) - shared_prefix(previous, row.token_ids)
        if parts[-1] and used + extra > token_budget:
            parts.append([])
            used, extra = 0, len(row.token_ids)
        parts[-1].append(row)
        used += extra
        previous = row.token_ids
    return parts
