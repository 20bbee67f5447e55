"""Kills real runs with SIGKILL at random moments, goes on with them, and compares all that they leave byte for byte.

python -m tests.reliability.kills --kills 100 [--seed 0] [--out benchmarks/results/kills.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.learning import save_tiny_model
from tests.reliability.runs import RUNS, left, recipe, write_data
from tests.reliability.zygote import Zygote


@dataclass
class Tally:
    """kills: that ended a process; writing: of them in the middle of a checkpoint; runs: compared with the undisturbed
    one; differences: files that weren't equal, or a run that didn't go on, by run."""

    kills: int = 0
    writing: int = 0
    runs: int = 0
    differences: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Killer:
    """Kills runs in a folder; the undisturbed run of each kind is made once."""

    zygote: Zygote
    folder: Path
    rng: random.Random
    tally: Tally = field(default_factory=Tally)
    _wanted: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = save_tiny_model(self.folder / "tiny")
        self.data = write_data(self.folder, self.model)

    def wanted(self, name: str) -> tuple[dict[str, str], float]:
        """What the undisturbed run leaves, and its seconds."""
        if name not in self._wanted:
            began = time.monotonic()
            folder = self.folder / f"{name}-whole"
            status = self.zygote.wait(self._start(name, folder))
            if status:
                raise RuntimeError(f"{name} failed: {self._log(folder)}")
            self._wanted[name] = left(folder), time.monotonic() - began
        return self._wanted[name]

    def kill(self, name: str, times: int) -> None:
        """Kill one run of a kind up to `times` times, let it finish, and compare."""
        wanted, seconds = self.wanted(name)
        folder = self.folder / f"{name}-{self.tally.runs}"
        for _ in range(times):
            pid = self._start(name, folder)
            self._await_moment(folder, seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if self.zygote.wait(pid) != -signal.SIGKILL:
                break  # it was done before
            self.tally.kills += 1
            self.tally.writing += bool(list((folder / "checkpoints").glob(".step_*")))
        status = self.zygote.wait(self._start(name, folder))
        found = left(folder) if status == 0 else {f"exit status {status}: {self._log(folder)[-400:]}": ""}
        different = sorted(file for file in {*wanted, *found} if wanted.get(file) != found.get(file))
        self.tally.runs += 1
        if different:
            self.tally.differences.setdefault(name, []).extend(different)

    def _await_moment(self, folder: Path, seconds: float) -> None:
        """Any moment of the run, or one inside the writing of a checkpoint."""
        if self.rng.random() < 0.5:
            time.sleep(self.rng.uniform(0.0, seconds))
            return
        writing = self.rng.randint(1, 4)
        seen: set[str] = set()
        until = time.monotonic() + 2 * seconds
        while len(seen) < writing and time.monotonic() < until:
            # A folder's inode tells one writing of a step from the next.
            seen |= {f"{path.name}-{_inode(path)}" for path in (folder / "checkpoints").glob(".step_*.partial")}
        time.sleep(self.rng.uniform(0.0, 0.01))

    def _start(self, name: str, folder: Path) -> int:
        log = folder.with_suffix(".log")
        resume = (folder / "recipe.yaml").is_file()
        return self.zygote.start(recipe(name, self.model, self.data, folder), log, resume=resume)

    def _log(self, folder: Path) -> str:
        return folder.with_suffix(".log").read_text()


def _inode(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino
    return 0


def survive(names: Sequence[str], kills: int, folder: Path, seed: int = 0, log: bool = False) -> Tally:
    """Kill runs of these kinds in turn until `kills` of them were killed."""
    rng = random.Random(seed)
    with Zygote() as zygote:
        killer = Killer(zygote, folder, rng)
        turn = 0
        while killer.tally.kills < kills:
            name = names[turn % len(names)]
            killer.kill(name, rng.randint(1, 3))
            turn += 1
            if log:
                print(f"{killer.tally.kills}/{kills} {name}: {killer.tally.differences.get(name, 'equal')}", flush=True)
        return killer.tally


def main() -> int:
    """Kill, print and write the tally; 1 where anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = survive(list(RUNS), given.kills, Path(folder), given.seed, log=True)
    told: dict[str, Any] = {
        "kills": tally.kills,
        "in_checkpoint_writing": tally.writing,
        "runs_compared": tally.runs,
        "runs_that_differed": sum(map(len, tally.differences.values())),
        "kinds": list(RUNS),
    }
    print(json.dumps(told, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if tally.differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
