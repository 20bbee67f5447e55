"""Trackers for tests, at module level so that a recipe can name them: "tests.tracking:Recorder"."""

from __future__ import annotations

import itertools
import time
from typing import Any, ClassVar

from sapwood.errors import ConfigError
from sapwood.trackers import Tracker


class Recorder(Tracker):
    """Keeps every call, in `calls` of the class; a run's `start` begins them anew unless the run goes on."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    numbers: ClassVar[Any] = itertools.count(1)

    def start(self, run):
        if run.id is None and (not self.calls or self.calls[-1][0] == "finish"):
            type(self).numbers = itertools.count(1)
            self.calls.clear()
        self.calls.append(("start", run))
        return run.id or f"the-run-{next(self.numbers)}"

    def scalars(self, step, values):
        self.calls.append(("scalars", step, dict(values)))

    def texts(self, step, values):
        self.calls.append(("texts", step, dict(values)))

    def histograms(self, step, values):
        self.calls.append(("histograms", step, dict(values)))

    def finish(self, status):
        self.calls.append(("finish", status))


class Refuses(Recorder):
    """Says at its start what a user can mend."""

    def start(self, run):
        raise ConfigError("trackers: there is no such project.")


class Broken(Recorder):
    """Fails in the middle of a run, and stays so."""

    after: int = 1

    def scalars(self, step, values):
        if step > self.after:
            raise ConnectionError("the server is gone")
        super().scalars(step, values)


class Hangs(Recorder):
    """Never answers."""

    def scalars(self, step, values):
        time.sleep(3600)
