"""A tracker of your own in one file: a line a step in a table that a spreadsheet opens.

trackers:
  - tensorboard
  - {name: "examples/custom_tracker.py:Table", columns: [reward, entropy, eval/return]}

It runs in a thread of its own: what it raises is told and tried again, and training goes on.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from sapwood.trackers import Status, TrackedRun, Tracker


class Table(Tracker):
    """Writes the columns of every step to RUN/table.csv; a column that a step doesn't have stays empty."""

    columns: tuple[str, ...] = ("loss", "reward")

    _path: Path = PrivateAttr()
    _rows: dict[int, dict[str, Any]] = PrivateAttr(default_factory=dict)

    def start(self, run: TrackedRun) -> None:
        """Begin, or take up the rows that a resumed run keeps."""
        self._path = run.dir / "table.csv"
        if run.resumed_from is not None and self._path.is_file():
            with open(self._path, newline="", encoding="utf-8") as file:
                kept = {int(row["step"]): row for row in csv.DictReader(file)}
            self._rows.update({step: row for step, row in kept.items() if step <= run.resumed_from})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A step has several calls: of its metrics, and of its times."""
        found = {name: values[name] for name in self.columns if name in values}
        if found:
            self._rows.setdefault(step, {"step": step}).update(found)
            with open(self._path, "w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, ["step", *self.columns])
                table.writeheader()
                table.writerows(self._rows.values())

    def address(self) -> str:
        """Where to look."""
        return str(self._path)

    def finish(self, status: Status) -> None:
        """Everything is written already."""
