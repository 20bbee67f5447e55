"""All trackers of a run, each behind a queue in a thread of its own, so that none of them can hold up training.

A call that raises is told once and tried again after PAUSES; then its record is lost, and after LOST_IN_A_ROW such
records the tracker is given up for the session. A tracker that is slow has its oldest records dropped. The run folder
keeps everything in any case.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from sapwood.errors import SapwoodError
from sapwood.trackers import Status, TrackedRun, Tracker

logger = logging.getLogger("sapwood.trackers")

#: Seconds before a call that failed is tried again.
PAUSES = (1.0, 5.0, 30.0, 60.0)
#: Records in a row that may be lost before a tracker is given up.
LOST_IN_A_ROW = 5
#: Records that may wait for a tracker.
WAITING = 2000
#: Seconds that training waits for trackers to start, and a finished or a stopped run for them to send what waits.
START_SECONDS, FINISH_SECONDS, STOP_SECONDS = 5.0, 30.0, 3.0
#: In the run folder: what each tracker calls the run.
IDS = "trackers.json"

Call = tuple[str, int, Mapping[str, Any]]


class Trackers:
    """The trackers of a run: `start`, then numbers and samples, then `finish`. `notes` is for the user."""

    def __init__(self, named: Sequence[tuple[str, Tracker]], pauses: Sequence[float] = PAUSES) -> None:
        """named: the recipe's entries, by name; pauses: before a failed call is tried again."""
        self._named = _labelled(named)
        self._pauses = tuple(pauses)
        self._workers: list[_Worker] = []
        self._notes: deque[str] = deque()

    def __bool__(self) -> bool:
        return bool(self._named)

    def check(self) -> None:
        """Raise a SapwoodError for the first tracker that can't work here: a missing package, no login."""
        for _, tracker in self._named:
            tracker.check()

    def start(self, run: TrackedRun, seconds: float = START_SECONDS) -> None:
        """Start all, and wait for them `seconds` at most; one that takes longer goes on by itself.

        Raises the SapwoodError of the first one that says what a user can mend; the others are ended then.
        """
        if self._named:
            watch_stdout()
        ids = _Ids(run.dir / IDS)
        known = ids.read()
        for label, tracker in self._named:
            own = replace(run, id=known.get(label))
            self._workers.append(_Worker(label, tracker, own, self._notes.append, ids, self._pauses))
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            if not worker.started.wait(max(0.0, deadline - time.monotonic())):
                worker.awaited = False
                self._notes.append(
                    f"tracker {worker.label}: not ready after {seconds:g} s; training doesn't wait for it."
                )
        refused = next((worker.refused for worker in self._workers if worker.refused is not None), None)
        if refused is not None:
            self.finish("failed")
            raise refused

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Show the finite numbers among `values`."""
        numbers = {prefix + name: float(value) for name, value in values.items() if _is_number(value)}
        self._put(("scalars", step, numbers))

    def samples(self, step: int, records: Sequence[Mapping[str, Any]], prefix: str = "") -> None:
        """Show a few of the sample records (see `sapwood.rollout.records`) and the distributions of all of them."""
        if not self._workers:
            return
        self._put(("texts", step, {f"{prefix}samples/{name}": text for name, text in picked(records).items()}))
        spread = {f"{prefix}histograms/{name}": values for name, values in distributions(records).items()}
        self._put(("histograms", step, spread))

    def notes(self) -> list[str]:
        """What has been found out since the last time, a sentence each."""
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._notes.popleft())
        return found

    def finish(self, status: Status, seconds: float = FINISH_SECONDS) -> None:
        """End the session, waiting at most `seconds` for what hasn't been sent. A second call does nothing."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close(status)
        deadline = time.monotonic() + seconds
        for worker in workers:
            left = worker.wait(max(0.0, deadline - time.monotonic()))
            if left is not None:
                self._notes.append(
                    f"tracker {worker.label}: {left} records were not sent within {seconds:g} s; the run folder has "
                    "them all."
                )

    def _put(self, call: Call) -> None:
        if call[2]:
            for worker in self._workers:
                worker.put(call)


class _Worker:
    """One tracker, its queue and its thread."""

    def __init__(
        self,
        label: str,
        tracker: Tracker,
        run: TrackedRun,
        tell: Callable[[str], None],
        ids: _Ids,
        pauses: Sequence[float],
    ) -> None:
        self.label = label
        self.started = threading.Event()
        self.refused: SapwoodError | None = None
        self.awaited = True  # whether `refused` will be raised
        self._tracker, self._run, self._ids, self._pauses = tracker, run, ids, pauses
        self._tell = lambda text: tell(f"tracker {label}: {text}")
        self._calls: deque[Call] = deque()
        self._wake = threading.Condition()
        self._closing: Status | None = None
        self._given_up = False
        self._overrun = False
        self._failed_before = False
        self._lost = 0
        # A daemon, because a tracker that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{label}", daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        """Leave a call for the thread; never waits."""
        with self._wake:
            if self._given_up:
                return
            self._calls.append(call)
            if len(self._calls) > WAITING:
                self._calls.popleft()
                if not self._overrun:
                    self._overrun = True
                    self._tell(f"it is too slow, so its oldest records are dropped beyond {WAITING} that wait.")
            self._wake.notify()

    def close(self, status: Status) -> None:
        """End once the queue is empty."""
        with self._wake:
            self._closing = status
            self._wake.notify()

    def wait(self, seconds: float) -> int | None:
        """Wait for the thread to end; None, or how many calls were left after `seconds`."""
        self._thread.join(seconds)
        return len(self._calls) + 1 if self._thread.is_alive() else None

    # ---- in the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        began = self._start()
        self.started.set()
        while began and not self._given_up:
            call = self._next()
            if call is None:
                break
            told = self._try(lambda call=call: getattr(self._tracker, call[0])(*call[1:]))
            self._lost = 0 if told else self._lost + 1
            if self._lost >= LOST_IN_A_ROW:
                self._give_up()
        if began:
            # What was given up is still ended, so that it can save what it has; nobody waits for it then.
            self._try(lambda: self._tracker.finish(self._closing or "failed"), last=True)

    def _start(self) -> bool:
        begun: list[str | None] = []
        try:
            if not self._try(lambda: begun.append(self._tracker.start(self._run)), refusal=True):
                self._give_up()
                return False
        except SapwoodError as error:
            if self.awaited:
                self.refused = error
            else:
                self._tell(str(error))
            self._given_up = True
            return False
        name = begun[0]
        if name is not None and name != self._run.id:
            self._try(lambda: self._ids.keep(self.label, name), last=True)
        self._try(self._say_where, last=True)
        return True

    def _say_where(self) -> None:
        address = self._tracker.address()
        if address:
            self._tell(address)

    def _try(self, call: Callable[[], Any], *, refusal: bool = False, last: bool = False) -> bool:
        """Whether the call succeeded, at once or in one of its further attempts.

        refusal: let a SapwoodError through, which says what a user can mend; last: a single attempt.
        """
        for attempt, pause in enumerate((*(() if last else self._pauses), None)):
            try:
                with quiet_stdout():
                    call()
            except Exception as error:  # the boundary to code that isn't ours
                if refusal and isinstance(error, SapwoodError):
                    raise
                self._report(error, pause is not None)
                if pause is None or (self._pause(pause) and attempt > 0):  # at the end of a run, two attempts
                    return False
            else:
                return True
        return False

    def _report(self, error: Exception, again: bool) -> None:
        logger.debug("tracker %s", self.label, exc_info=error)
        if not self._failed_before:
            self._failed_before = True
            what = "it is tried again, and training goes on." if again else "training goes on."
            self._tell(f"{_said(error)}; {what}")

    def _pause(self, seconds: float) -> bool:
        """Wait before another attempt, but not where the run ends; whether it does."""
        with self._wake:
            return self._wake.wait_for(lambda: self._closing is not None, seconds)

    def _next(self) -> Call | None:
        with self._wake:
            self._wake.wait_for(lambda: self._calls or self._closing is not None)
            return self._calls.popleft() if self._calls else None

    def _give_up(self) -> None:
        with self._wake:
            self._given_up = True
            self._calls.clear()
        self._tell("it kept failing and is left out from here on; the run folder has every number.")


@dataclass
class _Ids:
    """What each tracker calls the run, in trackers.json."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> dict[str, str]:
        """By label; {} where there is none, or none that can be read."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def keep(self, label: str, name: str) -> None:
        """Add one, whole or not at all."""
        with self._lock:
            aside = self.path.with_name(self.path.name + ".part")
            aside.write_text(json.dumps({**self.read(), label: name}, indent=2, sort_keys=True) + "\n", "utf-8")
            os.replace(aside, self.path)


# ---- samples ---------------------------------------------------------------------------------------------------

#: Characters of a prompt and of a reply that are shown, and turns of an episode.
PROMPT_SHOWN, REPLY_SHOWN, TURNS_SHOWN = 1200, 2000, 4


def picked(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The first record, the best and the worst by reward, as texts; fewer where they are the same."""
    valid = [record for record in records if not record.get("error")] or list(records)
    if not valid:
        return {}
    ranked = sorted(valid, key=lambda record: _reward(record))
    chosen: dict[str, Mapping[str, Any]] = {"first": valid[0]}
    if _reward(ranked[-1]) > _reward(ranked[0]):
        chosen |= {"best": ranked[-1], "worst": ranked[0]}
    return {name: shown(record) for name, record in chosen.items()}


def shown(record: Mapping[str, Any]) -> str:
    """A sample record as a plain text: what was earned for it, then its turns."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in (record.get("reward_parts") or {}).items())
    lines = [
        f"task {record.get('task')}   group {record.get('group')}, member {record.get('member')}",
        f"reward {_reward(record):.4g}" + (f"   ({parts})" if parts else ""),
        *([f"error: {record['error']}"] if record.get("error") else []),
    ]
    turns = record.get("turns") or []
    for number, turn in enumerate(turns[-TURNS_SHOWN:], max(0, len(turns) - TURNS_SHOWN) + 1):
        prompt, reply = str(turn.get("prompt") or ""), str(turn.get("reply") or "")
        lines += [f"--- prompt of turn {number} ---", _end(prompt, PROMPT_SHOWN)] if prompt else []
        lines += [f"--- reply {number} ({turn.get('stop_reason')}) ---", _start(reply, REPLY_SHOWN)]
    return "\n".join(lines).encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def distributions(records: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Rewards of the trajectories, lengths of the replies; advantages and log-probability ratios of their tokens."""
    valid = [record for record in records if not record.get("error")]
    turns = [turn for record in valid for turn in record.get("turns") or []]
    found = {
        "rewards": [_reward(record) for record in valid],
        "reply_tokens": [len(turn.get("token_ids") or ()) for turn in turns],
        "advantages": [value for turn in turns for value in turn.get("advantages") or ()],
        "log_ratios": np.log(np.maximum(np.array(_all_tokens(turns, "ratios"), np.float64), 1e-30)),
    }
    arrays = {name: np.asarray(values, np.float64) for name, values in found.items()}
    finite = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    return {name: values for name, values in finite.items() if values.size}


def _all_tokens(turns: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [math.nan if value is None else value for turn in turns for value in turn.get(name) or ()]


def _reward(record: Mapping[str, Any]) -> float:
    value = record.get("reward")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _end(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"[{len(text) - limit:,} characters before]\n{text[-limit:]}"


def _start(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}\n[{len(text) - limit:,} more characters]"


# ---- the rest --------------------------------------------------------------------------------------------------


class _Stdout:
    """Standard output that drops what the threads in `silent` print: trackers greet there, and `--json` is read."""

    def __init__(self, real: TextIO) -> None:
        self.real = real
        self.silent: Counter[int] = Counter()

    def write(self, text: str) -> int:
        return len(text) if self.silent[threading.get_ident()] else self.real.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_stdout_lock = threading.Lock()


def watch_stdout() -> None:
    """Put a `_Stdout` in place of standard output, for the rest of the process; call it in the main thread.

    Never while another thread may print, and never from one: `print` looks the stream up without holding on to it, so
    that a stream which is replaced meanwhile is freed under it, and the process dies.
    """
    if not isinstance(sys.stdout, _Stdout):
        sys.stdout = _Stdout(sys.stdout)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Drop what this thread prints to standard output, once `watch_stdout` was called; others print as ever."""
    thread, stream = threading.get_ident(), sys.stdout
    if not isinstance(stream, _Stdout):
        yield
        return
    with _stdout_lock:
        stream.silent[thread] += 1
    try:
        yield
    finally:
        with _stdout_lock:
            stream.silent[thread] -= 1
            stream.silent += Counter()  # only those that are still counted


def _labelled(named: Sequence[tuple[str, Tracker]]) -> list[tuple[str, Tracker]]:
    """Names made different: mlflow, mlflow-2."""
    seen: Counter[str] = Counter()
    found = []
    for name, tracker in named:
        seen[name] += 1
        found.append((name if seen[name] == 1 else f"{name}-{seen[name]}", tracker))
    return found


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
