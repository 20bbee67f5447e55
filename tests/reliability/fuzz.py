"""Malformed recipes, data files, checkpoints and replies, each given to the real entry point in a process of its own.

python -m tests.reliability.fuzz --cases 1500 [--seed 0] [--only data] [--out benchmarks/results/fuzz.json]

Cases are drawn by the seed: mutations of valid inputs, in turn of every way that the modules malformed_*.py list.
A case passes where it ends by itself within its limits and either was still valid (exit code 0) or was answered: exit
code 1 or 2 and a sentence of Sapwood's that names the file or the option. A traceback, a raw dump of pydantic's, a
signal, a hang, code that was run, and something that existed and was overwritten or removed are failures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: Processor seconds of a case; one that takes longer hangs. One that only waits is given longer, as others compute too.
CPU_SECONDS, WALL_SECONDS = 10, 60
#: Address space of a case beyond what is taken before it begins: what asks for absurd sizes fails there.
MEMORY = 4 << 30
LARGEST_FILE = 1 << 30
#: A sentence that is longer than this explains nothing.
LONGEST_ANSWER = 5000
#: Created by whatever code a file smuggles in; looked for after every case.
CANARY = "canary"
RAW = ("Traceback (most recent call last)", "For further information visit", "pydantic_core._pydantic_core")


@dataclass(frozen=True)
class Case:
    """run: in the case's folder, in a child; the exit code. names: a refusal must hold one of these.

    kept: files and folders that must stay as they were, whatever the outcome. report: the answer may be on stdout,
    where the command prints what it found. spoken: False for functions, whose result is the answer.
    """

    run: Callable[[], int]
    names: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    report: bool = False
    tidy: bool = False
    spoken: bool = True


#: Writes a malformed input below a folder and says how it is to be given to Sapwood.
Way = Callable[[random.Random, Path], Case]


@dataclass(frozen=True)
class Kind:
    """One kind of input. ways: name -> how it is malformed; prepare: makes what its cases start from, in a folder."""

    ways: dict[str, Way]
    prepare: Callable[[Path], None]


@dataclass(frozen=True)
class Verdict:
    """outcome: "valid", "answered" or "failed"; why, output: of a failure."""

    outcome: str
    why: str = ""
    output: str = ""


@dataclass
class Tally:
    """What came of the cases, by kind and way."""

    counts: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, kind: str, way: str, verdict: Verdict, name: str) -> None:
        """Count one."""
        self.counts.setdefault(kind, {}).setdefault(way, Counter())[verdict.outcome] += 1
        if verdict.outcome == "failed":
            self.failures.append({"case": name, "why": verdict.why, "output": verdict.output})

    def of(self, kind: str) -> Counter[str]:
        """A kind's outcomes."""
        return sum(self.counts.get(kind, {}).values(), Counter())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = {kind: _row(self.of(kind)) for kind in self.counts}
        ways = {f"{kind}/{way}": _row(found) for kind, ways in self.counts.items() for way, found in ways.items()}
        total = sum((self.of(kind) for kind in self.counts), Counter())
        return {"total": _row(total), "kinds": rows, "ways": ways, "failures": self.failures}

    def lines(self) -> list[str]:
        """A table."""
        told = self.to_json()
        rows = {**told["ways"], **{f"{kind} (all)": row for kind, row in told["kinds"].items()}, "all": told["total"]}
        head = f"{'':<34}{'tried':>8}{'valid':>8}{'answered':>10}{'failed':>8}"
        return [
            head,
            *(
                f"{name:<34}{r['tried']:>8}{r['valid']:>8}{r['answered']:>10}{r['failed']:>8}"
                for name, r in rows.items()
            ),
        ]


def _row(found: Counter[str]) -> dict[str, int]:
    return {"tried": found.total(), **{name: found[name] for name in ("valid", "answered", "failed")}}


# --- one case ----------------------------------------------------------------------------------------------------


def try_case(case: Case, folder: Path) -> Verdict:
    """Run a case in a child and judge it."""
    before = {name: digest(folder / name) for name in case.kept}
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    status, hung = _in_child(case, folder, out, err)
    told, said = (path.read_bytes().decode("utf-8", "replace") for path in (out, err))
    if (folder / CANARY).exists():
        return Verdict("failed", "it ran code that the input holds", said)
    found = _judge(case, status, hung, told, said)
    changed = [name for name, known in before.items() if digest(folder / name) != known]
    if found.outcome != "failed" and changed:
        return Verdict("failed", f"changed or removed: {', '.join(changed)}", said)
    left = sorted(path.name for path in folder.glob("*.part"))
    if found.outcome == "answered" and case.tidy and left:
        return Verdict("failed", f"left half-written: {', '.join(left)}", said)
    return found


def _judge(case: Case, status: int, hung: bool, told: str, said: str) -> Verdict:
    answer = said + (told if case.report else "")
    shown = f"{said[-3000:]}\n[stdout]\n{told[-500:]}"

    def failed(why: str) -> Verdict:
        return Verdict("failed", why, shown)

    if hung or status == -signal.SIGXCPU:
        return failed("it hung")
    if status < 0:
        return failed(f"it died of {signal.Signals(-status).name}")
    raw = next((text for text in RAW if text in said or text in told), None)
    if raw is not None:
        return failed(f"it shows {raw!r}")
    if status == 0:
        return Verdict("valid")
    if status not in (1, 2):
        return failed(f"exit code {status}")
    if not case.spoken:
        return Verdict("answered")
    lines = answer.splitlines()
    if not case.report and not any(line.startswith(("sapwood", "usage: sapwood")) for line in lines):
        return failed("no sentence of Sapwood's")
    if not answer.strip():
        return failed("no answer")
    if len(said) > LONGEST_ANSWER:
        return failed(f"an answer of {len(said):,} characters")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said):
        return failed("control characters for the terminal")
    if case.names and not any(name.strip()[:60] in answer for name in case.names):
        return failed(f"it names none of {', '.join(case.names)}")
    return Verdict("answered")


def _in_child(case: Case, folder: Path, out: Path, err: Path) -> tuple[int, bool]:
    """(exit status, negative for a signal; whether it was killed for waiting too long)."""
    pid = os.fork()
    if pid == 0:
        _child(case, folder, out, err)
    until = time.monotonic() + WALL_SECONDS
    pause = 0.001
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL, True
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def _child(case: Case, folder: Path, out: Path, err: Path) -> None:
    """In the child; never returns."""
    import faulthandler

    os.setsid()
    code = 70
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  (for as long as the process lives, as the two below)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        faulthandler.register(signal.SIGXCPU, file=sys.stderr, chain=True)  # says where it hung
        signal.signal(signal.SIGINT, signal.default_int_handler)
        limit()
        code = case.run()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def limit() -> None:
    """Processor time and memory of this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))


def digest(path: Path) -> str:
    """Of a file, or of all below a folder; links aren't followed."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        return json.dumps({item.name: digest(item) for item in sorted(path.iterdir())})
    return "special" if path.exists() else "none"


# --- many cases --------------------------------------------------------------------------------------------------


def kinds() -> dict[str, Kind]:
    """All of them, those that fork the smallest process first."""
    from tests.reliability import (
        malformed_checkpoints,
        malformed_data,
        malformed_pipelines,
        malformed_recipes,
        malformed_replies,
    )

    modules = {
        "recipes": malformed_recipes,
        "data files": malformed_data,
        "replies": malformed_replies,
        "checkpoints": malformed_checkpoints,
        "pipelines": malformed_pipelines,
    }
    return {name: Kind(module.WAYS, module.prepare) for name, module in modules.items()}


#: How many of every hundred cases are of a kind.
SHARES = {"recipes": 34, "data files": 26, "replies": 12, "checkpoints": 16, "pipelines": 12}


def fuzz(
    cases: int, seed: int, folder: Path, *, only: str | None = None, slow: bool = True, show: bool = False
) -> Tally:
    """Draw `cases` cases and try them. only: a kind or KIND/WAY; slow: with those that load and train a model."""
    os.environ["SAPWOOD_CACHE"] = str(folder / "cache")
    tally, began = Tally(), time.monotonic()
    for name, kind in kinds().items():
        wanted = [way for way in kind.ways if only in (None, name, f"{name}/{way}") and (slow or not is_slow(way))]
        count = cases if only is not None else round(cases * SHARES[name] / 100)
        if not wanted:
            continue
        base = folder / name.replace(" ", "_")
        base.mkdir(parents=True, exist_ok=True)
        kind.prepare(base)
        gc.collect()
        gc.freeze()  # so that children share the pages of what is there
        for way, number in _turns(wanted, count):
            where = base / f"{way}-{number}"
            where.mkdir()
            rng = random.Random(f"{seed} {name} {way} {number}")
            verdict = try_case(kind.ways[way](rng, where), where)
            tally.add(name, way, verdict, f"{name}/{way}-{number} of seed {seed}")
            if verdict.outcome == "failed" and show:
                print(f"--- {name}/{way}-{number}: {verdict.why}\n{verdict.output.strip()}\n", flush=True)
            _remove(where)
    tally.seconds = time.monotonic() - began
    return tally


def is_slow(way: str) -> bool:
    """Whether the cases of a way load a model: some hundred times what others take."""
    return way.startswith("model")


def _turns(ways: Sequence[str], count: int) -> Iterator[tuple[str, int]]:
    """Every way in turn; of the slow ones, one in each second turn."""
    given, lap = 0, 0
    while True:
        for way in ways:
            if is_slow(way) and lap % 2 and len(ways) > 1:
                continue
            if given == count:
                return
            given += 1
            yield way, lap
        lap += 1


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for suffix in (".out", ".err"):
        folder.with_suffix(suffix).unlink(missing_ok=True)


def main(given: Sequence[str] | None = None) -> int:
    """Fuzz, print and write the tally; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND[/WAY]")
    parser.add_argument("--fast", action="store_true", help="without the cases that load a model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        tally = fuzz(options.cases, options.seed, Path(folder), only=options.only, slow=not options.fast, show=True)
    print("\n".join(tally.lines()), f"\n{tally.seconds:.0f} s")
    if options.out is not None:
        told = {"cases": options.cases, "seed": options.seed, "seconds": round(tally.seconds), **tally.to_json()}
        options.out.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
