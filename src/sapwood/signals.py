"""Stopping a run from outside: Ctrl-C, `kill`, a scheduler that wants its machine back.

The first signal asks: work that can be done again (sampling, evaluation) is left at once, an update is finished first,
and the run is saved as it stood. A second Ctrl-C is a KeyboardInterrupt wherever the run is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

#: Ctrl-C; `kill` and schedulers; SLURM's and others' early warning (`--signal=USR1@60`).
WATCHED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(BaseException):
    """Raised inside `Stopping.interruptible`; no Exception, so that no handler of a world or reward takes it."""


class Stopping:
    """Watches the signals of WATCHED inside a `with` block of the main thread; elsewhere it watches nothing.

    requested: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._may_raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def reason(self) -> str:
        """What asked, in words."""
        assert self.requested is not None
        return "Ctrl-C" if self.requested == signal.SIGINT else self.requested.name

    @property
    def exit_code(self) -> int:
        """By the shell's custom: 128 and the signal's number."""
        assert self.requested is not None
        return 128 + int(self.requested)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that changes nothing that is kept: a signal raises Interrupted in it, or before it."""
        self._may_raise = True
        try:
            if self.requested is not None:
                raise Interrupted
            yield
        finally:
            self._may_raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number)
        # Not by `print`: the handler may run in the middle of one, and a buffered stream can't be entered twice.
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, self._answer())
        if self._may_raise:
            self._may_raise = False
            raise Interrupted

    def _answer(self) -> bytes:
        what = "saving" if self._may_raise else "finishing the update, then saving"
        return f"\n{self.reason}: {what}; Ctrl-C stops at once.\n".encode()
