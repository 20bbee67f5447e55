"""Whether a run goes on, from what it left: it may have been killed without a word."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A run that wrote nothing for so long, and for so many times its longest step, is taken for dead. Where its lock is
#: there and nobody holds it, as seen from this machine, a shorter silence is enough.
QUIET_SECONDS, QUIET_STEPS, UNLOCKED_SECONDS = 600.0, 8.0, 90.0


@dataclass(frozen=True)
class Status:
    """state: "running", "finished", "stopped", "died" or "empty"; detail: a sentence."""

    state: str
    detail: str


def status_of(
    events: Sequence[dict[str, Any]],
    done: int | None,
    total: int | None,
    evaluated: bool,
    longest: float,
    *,
    quiet: float | None,
    held: bool | None = None,
) -> Status:
    """The status of a run.

    done, total: steps; evaluated: whether the final evaluation is there; longest: seconds of the longest step; quiet:
    seconds since anything was written, None where nothing was; held: whether a process holds the run's lock, None
    where that can't be told.
    """
    if held:
        return Status("running", "A process on this machine is training it.")
    decisive = [event for event in events if event["kind"] in ("start", "resume", "stop", "finish")]
    last = decisive[-1] if decisive else None
    if last is not None and last["kind"] == "finish":
        return Status("finished", last["message"] or "The run came to its end.")
    if last is not None and last["kind"] == "stop":
        return Status("stopped", last["message"] or "The run was stopped.")
    complete = total is not None and done is not None and done >= total
    if evaluated and (complete or last is None):
        return Status("finished", "All steps are done and the final evaluation is there.")
    if quiet is None:
        return Status("empty", "Nothing has been written yet.")
    patience = UNLOCKED_SECONDS if held is False else max(QUIET_SECONDS, QUIET_STEPS * longest)
    if quiet <= patience:
        return Status("running", f"Last written to {ago(quiet)} ago.")
    if complete and last is None:
        return Status("finished", "All steps are done.")
    return Status("died", f"Nothing was written for {ago(quiet)} and no end was recorded: it was probably killed.")


def lock_held(folder: Path) -> bool | None:
    """Whether a process of this machine holds the folder's lock, without touching it; None where that can't be told.

    Asking by taking the lock could refuse it to a run that begins at that moment, so the kernel's list is read.
    """
    try:
        found = os.stat(folder / ".lock")
        listed = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return any(place in line.split() for line in listed.splitlines())


def ago(seconds: float) -> str:
    """A rough length of time in words."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(seconds, 0):.0f} seconds"
