"""TensorBoard event files in the run folder, the default: look with `tensorboard --logdir runs`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import yaml
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from sapwood.errors import ConfigError
from sapwood.trackers import Status, TrackedRun, Tracker, as_code

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard. A resumed run writes on, and what was written after its checkpoint is purged."""

    flush_seconds: int = Field(default=10, ge=1, description="how often what waits is written to the file")

    _writer: Any = PrivateAttr(default=None)

    def check(self) -> None:
        """Whether the package is there."""
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "trackers: tensorboard needs the package of that name: pip install tensorboard, or set trackers=[]."
            )

    def start(self, run: TrackedRun) -> None:
        """Open an event file; the recipe is its first text."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if run.resumed_from is None else run.resumed_from + 1
        self._writer = SummaryWriter(str(run.dir / FOLDER), purge_step=purge, flush_secs=self.flush_seconds)
        recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)
        self._writer.add_text("recipe", as_code(recipe), max(run.resumed_from or 0, 0))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """As code blocks, because TensorBoard renders Markdown."""
        for name, text in values.items():
            self._writer.add_text(name, as_code(text), step)

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """With TensorBoard's own bins."""
        for name, array in values.items():
            self._writer.add_histogram(name, array, step)

    def finish(self, status: Status) -> None:
        """Write what waits and close the file."""
        self._writer.close()


PLUGIN = TensorBoard
