"""The contract test of a tracker: what `sapwood.trackers` promises, tried out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sapwood.errors import ConfigError
from sapwood.trackers import Status, TrackedRun, Tracker

#: What names and texts may hold, because they come from users, environments and models.
NAMES = ("loss", "eval/pass@8", "reward/a part, with é", "x" * 300)
TEXTS = (
    "",
    "two\nlines",
    "<script>alert(1)</script> ![x](http://localhost/x.png)",
    "$\\n % \x1b[2J \ud83d",
    "é" * 9000,
)


def check_tracker(make: type[Tracker] | Tracker, folder: Path) -> None:
    """Track two sessions of a run in `folder`, the second resumed. Raises ConfigError for a promise that is broken.

    make: the tracker with its options, or a class whose options all have defaults. Whatever the tracker itself raises
    passes through.
    """
    tracker = make() if isinstance(make, type) else make
    again = type(tracker).model_validate(tracker.model_dump())
    run = TrackedRun(folder, folder.name, {"run": {"dir": str(folder), "seed": 0}, "env": None, "rewards": []})
    name = _session(tracker, run, range(4), "stopped")
    _require(name is None or isinstance(name, str), "start must return a text that names the run, or None")
    other = _session(again, replace(run, resumed_from=2, id=name), range(3, 6), "finished")
    _require(other == name, f"start must return the same name for a resumed run: {name!r}, then {other!r}")


def _session(tracker: Tracker, run: TrackedRun, steps: range, status: Status) -> str | None:
    rng = np.random.default_rng(0)
    tracker.check()
    name = tracker.start(run)
    address = tracker.address()
    _require(address is None or isinstance(address, str), "address must be a text or None")
    for step in steps:
        tracker.scalars(step, dict.fromkeys(NAMES, step / 3))
        tracker.scalars(step, {"timing/tokens_per_second": 1e9})
        tracker.texts(step, {f"samples/{i}": _valid(text) for i, text in enumerate(TEXTS)})
        tracker.histograms(step, {"histograms/rewards": np.zeros(1), "histograms/advantages": rng.normal(size=99)})
    tracker.finish(status)
    return name


def _valid(text: str) -> str:
    """As the hub gives it: no lone half of a character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _require(kept: bool, promise: str) -> None:
    if not kept:
        raise ConfigError(f"the tracker breaks its contract: {promise}.")
