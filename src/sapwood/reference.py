"""The reference's log-probabilities of a data set, computed once and kept in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sapwood.data.dataset import Dataset
from sapwood.data.groups import Grouper
from sapwood.ops.batch import Needs
from sapwood.rollout import to_rows
from sapwood.run import writing
from sapwood.types import Group, Row

#: Records that are read and scored together.
CHUNK = 64
Pack = Callable[[Sequence[Row]], list[list[Row]]]
Score = Callable[[Sequence[Row], Needs], None]


@dataclass
class ReferenceCache:
    """A flat file of float32 log-probabilities, record after record and reply after reply; on disk, not in memory.

    start [N + 1]: where each record's values begin. then: called once all is scored, as nothing here asks the
    reference any more.
    """

    path: Path
    dataset: Dataset
    grouper: Grouper
    then: Callable[[Pack], None] | None = None
    _start: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64), init=False)
    _values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), init=False)

    def build(
        self,
        score: Score,
        pack: Pack,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Score every record, unless a run that goes on has done so already.

        pack: for `then`, which sees what follows. Raises StorageError where the run folder can't hold the values
        (4 bytes a token).
        """
        starts = self.path.with_name("start.npy")
        if not starts.is_file():  # written last
            self._score(score, starts, progress)
        self._open(np.load(starts, allow_pickle=False))
        if self.then is not None:
            self.then(pack)

    def _score(self, score: Score, starts: Path, progress: Callable[[str, int, int], None] | None) -> None:
        total = len(self.dataset)
        counts = np.zeros(total, np.int64)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("wb") as file:
                for first in range(0, total, CHUNK):
                    indices = range(first, min(first + CHUNK, total))
                    groups = [self.grouper.group(self.dataset[i], i) for i in indices]
                    rows = to_rows([group for group in groups if group is not None], 1.0)
                    score(rows, Needs(reference_logprobs=True))
                    kept = [i for i, group in zip(indices, groups, strict=True) if group is not None]
                    for row in rows:
                        assert row.reference_logprobs is not None
                        counts[kept[row.group]] += row.scored
                        file.write(row.reference_logprobs.astype(np.float32).tobytes())
                    if progress is not None:
                        progress("reference", indices[-1] + 1, total)
            with starts.with_suffix(".part").open("wb") as file:
                np.save(file, np.concatenate([[0], np.cumsum(counts)]))
            starts.with_suffix(".part").replace(starts)

    def _open(self, start: np.ndarray) -> None:
        self._start = start
        self._values = np.memmap(self.path, np.float32, mode="r") if start[-1] else np.zeros(0, np.float32)

    def fill(self, groups: Sequence[Group], rows: Sequence[Row]) -> None:
        """Give these rows, all rows of their groups, their reference log-probabilities."""
        at = {g: int(self._start[group.task.metadata["index"]]) for g, group in enumerate(groups)}
        for row in rows:  # in the order of `to_rows`, which is that of the file
            row.reference_logprobs = np.array(self._values[at[row.group] : at[row.group] + row.scored])
            at[row.group] += row.scored

    def rest(self, needs: Needs) -> Needs:
        """What is still to be scored."""
        return replace(needs, reference_logprobs=False)
