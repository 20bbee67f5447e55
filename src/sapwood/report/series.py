"""Columns of a metrics file, thinned to what a chart can show."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sapwood.report.reading import finite, shorter, whole

#: Points of a curve in the page; longer ones keep the least and the greatest value of every stretch.
POINTS = 2000
#: Names above this are left out, and so is a name that is longer: a page of that many curves would help nobody.
NAMES, NAME_LENGTH = 600, 300

Column = tuple[list[int], list[float | None]]


@dataclass
class Series:
    """Values by name and step. A value that isn't a finite number is a gap in its curve, and counted."""

    columns: dict[str, Column] = field(default_factory=dict)
    records: int = 0
    last_step: int | None = None
    bad_records: int = 0
    bad_values: dict[str, int] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records, each with its "step"."""
        for record in records:
            step = whole(record.get("step"))
            if step is None:
                self.bad_records += 1
                continue
            self.records += 1
            self.last_step = step if self.last_step is None else max(self.last_step, step)
            for name, value in record.items():
                if name != "step":
                    self._put(name, step, value)

    def _put(self, name: str, step: int, value: Any) -> None:
        number = finite(value)
        if number is None and value is not None and not isinstance(value, float):
            return  # a text or a list is no point of a curve
        if name not in self.columns:
            if len(name) > NAME_LENGTH or len(self.columns) >= NAMES:
                if len(self.left_out) < NAMES:
                    self.left_out.add(name[:NAME_LENGTH])
                return
            self.columns[name] = ([], [])
        if number is None:
            self.bad_values[name] = self.bad_values.get(name, 0) + 1
        steps, values = self.columns[name]
        steps.append(step)
        values.append(number)

    def column(self, name: str) -> Column:
        """(steps, values), every step once and in order; of a step that was written twice the later value."""
        steps, values = self.columns.get(name, ([], []))
        if all(a < b for a, b in itertools.pairwise(steps)):
            return steps, values
        latest = dict(sorted(zip(steps, values, strict=True), key=lambda point: point[0]))
        return list(latest), list(latest.values())

    def at(self, name: str, step: int) -> float | None:
        """The value of a metric at a step."""
        steps, values = self.column(name)
        return next((value for at, value in zip(steps, values, strict=True) if at == step), None)

    def curves(self) -> list[dict[str, Any]]:
        """One {"name", "x", "y", "thinned"} a metric that has a finite value, for the page."""
        found = []
        for name in self.columns:
            steps, values = self.column(name)
            if all(value is None for value in values):
                continue
            kept = thin(values, POINTS)
            found.append(
                {
                    "name": name,
                    "x": [steps[i] for i in kept],
                    "y": [shorter(values[i]) for i in kept],
                    "thinned": len(kept) < len(values),
                }
            )
        return found


def thin(values: Sequence[float | None], points: int) -> list[int]:
    """Indices of at most about `points` values: first and last, and of every stretch the least and the greatest.

    A stretch without a finite value keeps one gap.
    """
    n = len(values)
    if n <= points:
        return list(range(n))
    stretches = points // 2
    kept = {0, n - 1}
    for k in range(stretches):
        stretch = range(k * n // stretches, (k + 1) * n // stretches)
        known = [i for i in stretch if values[i] is not None]
        if not known:
            kept.add(stretch[0])
            continue
        kept.add(min(known, key=lambda i: values[i] or 0.0))
        kept.add(max(known, key=lambda i: values[i] or 0.0))
    return sorted(kept)


def seconds_by_step(timing: Series) -> Column:
    """(steps, seconds spent in steps up to and with that one): the sum of all columns that end in "_seconds".

    Thinned as a curve is.
    """
    spent: dict[int, float] = {}
    for name in timing.columns:
        if not name.endswith("_seconds"):
            continue
        for step, value in zip(*timing.column(name), strict=True):
            spent[step] = spent.get(step, 0.0) + (value or 0.0)
    steps, total = sorted(spent), 0.0
    sums: list[float | None] = []
    for step in steps:
        total += spent[step]
        sums.append(shorter(total))
    kept = thin(sums, POINTS)
    return [steps[i] for i in kept], [sums[i] for i in kept]


def longest_seconds(timing: Series) -> float:
    """Seconds of the longest step, 0 where none is known."""
    columns = [timing.columns[name][1] for name in timing.columns if name.endswith("_seconds")]
    return sum(max((value or 0.0 for value in values), default=0.0) for values in columns)
