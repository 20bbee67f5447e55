"""The measured side of a benchmark: a process that sets up once, then measures whenever it is asked.

Ours and the peers speak the same protocol, so that runs alternate between them and each has a peak memory of its own.
The parent passes the path of a JSON spec as the only argument and writes one JSON line per measurement to stdin; the
worker answers with one JSON line on stdout: first {"event": "ready"}, then {"event": "result"} each time, and
{"event": "done", "peak_rss_mib"} once stdin is closed. Whatever libraries print goes to stderr.

Standard library only: peers import it in an environment without Sapwood.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Measures once, given the arguments of the request; returns at least {"seconds": ...}.
Measure = Callable[[dict[str, Any]], dict[str, Any]]


def peak_rss_mib() -> float:
    """Peak resident memory of this process in MiB.

    VmHWM where there is one: ru_maxrss survives exec, so a child may report its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


class Channel:
    """The worker's end. spec: what the parent asked for."""

    def __init__(self) -> None:
        self.spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # progress bars and banners must not mix with the answers

    def ready(self, **info: Any) -> None:
        """Say that set-up is over."""
        self._send("ready", info)

    def wait(self) -> dict[str, Any] | None:
        """Arguments of the next measurement, or None when the parent wants no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line.strip() else None

    def reply(self, **result: Any) -> None:
        """Answer one measurement."""
        self._send("result", result)

    def finish(self) -> None:
        """Report the peak memory; the last call."""
        self._send("done", {"peak_rss_mib": peak_rss_mib()})

    def _send(self, event: str, fields: dict[str, Any]) -> None:
        self._out.write(json.dumps({"event": event, **fields}) + "\n")
        self._out.flush()


def serve(set_up: Callable[[dict[str, Any]], tuple[Measure, dict[str, Any]]]) -> None:
    """Set up, then measure until the parent closes stdin. `set_up` takes the spec, gives a function and its facts."""
    channel = Channel()
    measure, facts = set_up(channel.spec)
    channel.ready(**facts)
    while (arguments := channel.wait()) is not None:
        channel.reply(**measure(arguments))
    channel.finish()
