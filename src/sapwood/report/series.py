"""Columns of a metrics file, thinned to what a chart can show."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapwood.report.reading import finite, shorter, whole

#: Points of a curve in the page; longer ones keep the least and the greatest value of every stretch.
POINTS = 2000
#: Names above this are left out, and so is a name that is longer: a page of that many curves would help nobody.
NAMES, NAME_LENGTH = 600, 300

Steps = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass
class Series:
    """Values by name and step. A value that isn't a finite number is a gap in its curve (NaN)."""

    _columns: dict[str, tuple[array[int], array[float]]] = field(default_factory=dict)
    records: int = 0
    last_step: int | None = None
    bad_records: int = 0
    left_out: set[str] = field(default_factory=set)

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()

    @property
    def names(self) -> list[str]:
        """Of all metrics, in the order in which they came."""
        return list(self._columns)

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
        if name not in self._columns:
            if len(name) > NAME_LENGTH or len(self._columns) >= NAMES:
                if len(self.left_out) < NAMES:
                    self.left_out.add(name[:NAME_LENGTH])
                return
            self._columns[name] = (array("q"), array("d"))
        steps, values = self._columns[name]
        steps.append(step)
        values.append(math.nan if number is None else number)

    def column(self, name: str) -> tuple[Steps, Values]:
        """(steps, values), every step once and in order; of a step that was written twice the later value."""
        found = self._columns.get(name)
        if found is None:
            return np.zeros(0, np.int64), np.zeros(0)
        steps, values = np.array(found[0], np.int64), np.array(found[1], np.float64)
        if np.all(steps[1:] > steps[:-1]):
            return steps, values
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(steps[1:] != steps[:-1], True)
        return steps[last], values[last]

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever the value is a finite number."""
        steps, values = self.column(name)
        known = np.isfinite(values)
        return list(zip(steps[known].tolist(), values[known].tolist(), strict=True))

    def at(self, name: str, step: int) -> float | None:
        """The value of a metric at a step."""
        return next((value for at, value in self.points(name) if at == step), None)

    def curves(self) -> list[dict[str, Any]]:
        """One {"name", "x", "y", "gaps"} a metric that has a finite value, for the page; gaps: values that aren't."""
        found = []
        for name in self._columns:
            steps, values = self.column(name)
            if np.isfinite(values).any():
                found.append({"name": name, **curve(steps, values), "gaps": int(np.isnan(values).sum())})
        return found


def curve(steps: Steps, values: Values) -> dict[str, Any]:
    """{"x", "y"} as plain lists, thinned, values shortened, gaps as None."""
    kept = thin(values, POINTS)
    return {"x": steps[kept].tolist(), "y": [shorter(value) for value in values[kept].tolist()]}


def thin(values: Values, points: int) -> NDArray[np.int64]:
    """Indices of at most about `points` values: first and last, and of every stretch the least and the greatest.

    A stretch without a finite value keeps one gap.
    """
    n = len(values)
    if n <= points:
        return np.arange(n)
    size = -(-n // (points // 2))
    padded = np.full(-(-n // size) * size, np.nan)
    padded[:n] = values
    stretches = padded.reshape(-1, size)
    starts = np.arange(len(stretches)) * size
    least = starts + np.argmin(np.where(np.isnan(stretches), np.inf, stretches), axis=1)
    greatest = starts + np.argmax(np.where(np.isnan(stretches), -np.inf, stretches), axis=1)
    return np.unique(np.concatenate([[0, n - 1], least, greatest]))


def clock(timing: Series) -> dict[str, Any]:
    """{"x", "y"}: steps, and seconds spent in steps up to and with that one (all columns that end in "_seconds")."""
    spent: dict[int, float] = {}
    for name in timing.names:
        if name.endswith("_seconds"):
            for step, value in timing.points(name):
                spent[step] = spent.get(step, 0.0) + value
    steps = np.array(sorted(spent), np.int64)
    return curve(steps, np.cumsum([spent[step] for step in sorted(spent)]))


def longest_seconds(timing: Series) -> float:
    """Seconds of the longest step or more, 0 where none is known."""
    names = [name for name in timing.names if name.endswith("_seconds")]
    return sum(max((value for _, value in timing.points(name)), default=0.0) for name in names)
