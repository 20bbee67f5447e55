"""What all benchmarks share: workers in processes of their own, the machine in words, rows, tables and result files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
REPOSITORY = ROOT.parent
RESULTS = ROOT / "results"
LOGS = REPOSITORY / "build" / "benchmarks"
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


class BenchmarkError(Exception):
    """A side that could not be measured; the message is the reason that its row gives."""


class TimedOut(BenchmarkError):
    """A side that did not finish in time. elapsed: seconds it was given."""

    def __init__(self, name: str, elapsed: float) -> None:
        super().__init__(f"{name} did not finish within {elapsed:.0f} s")
        self.elapsed = elapsed


@dataclass(frozen=True)
class Row:
    """One line of a result file. ratio: how many times better ours is than the peer (in `unit`), or a share.

    peer and ratio are None where the peer could not be measured; note says why, and what is counted.
    samples: every single measurement behind `ours` and `peer`.
    """

    name: str
    ours: float | None
    peer: float | None
    ratio: float | None
    unit: str
    shape: str
    dtype: str
    machine: dict[str, Any]
    peer_name: str = ""
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)


def time_ratio(ours: float | None, peer: float | None) -> float | None:
    """peer / ours, for what should be small (seconds, MiB)."""
    return peer / ours if ours and peer is not None else None


def rate_ratio(ours: float | None, peer: float | None) -> float | None:
    """ours / peer, for what should be large (tokens/s, FLOP/s)."""
    return ours / peer if peer and ours is not None else None


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return statistics.median(values) if values else None


#: The peers' environments: name -> (folder, variable that names another interpreter, what builds it).
_ENVIRONMENTS = {
    "bench": (".venv-bench", "SAPWOOD_BENCH_PYTHON", "benchmarks/make_env.sh"),
    "ppo": (".venv-trlppo", "SAPWOOD_PPO_PYTHON", "benchmarks/make_env_ppo.sh"),
}


def peer_python(environment: str = "bench") -> Path:
    """Python of a peers' environment. Raises BenchmarkError if it has not been built."""
    folder, variable, script = _ENVIRONMENTS[environment]
    path = Path(os.environ.get(variable, REPOSITORY / folder / "bin" / "python"))
    if not path.is_file():
        raise BenchmarkError(f"no peers' environment at {path}: run {script}")
    return path


def machine(threads: int) -> dict[str, Any]:
    """The machine in words: CPU, instruction sets that matter for matrix products, cores, memory, versions."""
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key in ("model name", "Model"):
                model = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def model_folder() -> str:
    """Folder with SmolLM2-135M-Instruct as safetensors and its tokenizer; made on the first call.

    Runs in a process of its own, so that this one stays free of torch.
    """
    code = "from sapwood.models.load import resolve; print(resolve('smollm2-135m'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"no model: {_last_line(done.stderr)}")
    return done.stdout.strip().splitlines()[-1]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it printed nothing"


class Worker:
    """The parent's end of a `_worker` process. Use as a context manager; `run` measures once.

    script: path below benchmarks/; python: the interpreter; timeout: seconds that set-up may take.
    facts: what the worker said when it was ready.
    """

    def __init__(self, name: str, python: str | Path, script: str, spec: dict[str, Any], timeout: float = 600) -> None:
        self.name, self._timeout = name, timeout
        self._command = [str(python), str(ROOT / script)]
        self._spec = spec
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.facts: dict[str, Any] = {}
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name.replace(' ', '_').replace('/', '_')}.log"

    def __enter__(self) -> Worker:
        handle, self._spec_path = tempfile.mkstemp(suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump(self._spec, file)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*self._command, self._spec_path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(int(self._spec["threads"])),
                start_new_session=True,  # so that a time-out ends its helpers too
            )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.facts = self._answer("ready", self._timeout)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, timeout: float = 1800, **arguments: Any) -> dict[str, Any]:
        """One measurement. Raises TimedOut (the worker is then gone) or BenchmarkError with the worker's last words."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise BenchmarkError(f"{self.name} is gone: {_last_line(self.log.read_text())}") from error
        return self._answer("result", timeout)

    def close(self, timeout: float = 60) -> dict[str, Any]:
        """End the worker; gives its peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._answer("done", timeout)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def _answer(self, event: str, timeout: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._stop()
            raise TimedOut(self.name, timeout) from None
        if answer is None:
            raise BenchmarkError(f"{self.name} failed: {_last_line(self.log.read_text())} (log: {self.log.name})")
        if answer.pop("event") != event:
            raise BenchmarkError(f"{self.name} answered out of turn")
        return answer

    def _stop(self) -> None:
        Path(self._spec_path).unlink(missing_ok=True)
        if self._process.poll() is None:
            try:
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def _environment(threads: int) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(threads))
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # vLLM: engine in this process, so that its memory and time are the worker's own; one thread a core.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[:threads])),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


@dataclass(frozen=True)
class Options:
    """Options that all benchmarks take."""

    quick: bool
    bf16: bool
    threads: int
    time_limit: float
    tiny: bool

    @staticmethod
    def parser(description: str) -> argparse.ArgumentParser:
        """The parser of these options; a benchmark may add its own."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--quick", action="store_true", help="fewer repeats")
        parser.add_argument("--bf16", action="store_true", help="bfloat16 rows too (slow without native bf16)")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--time-limit", type=float, default=900, help="seconds that one peer step may take")
        parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that all sides run")
        return parser

    @staticmethod
    def of(arguments: argparse.Namespace) -> Options:
        """The options of parsed arguments."""
        return Options(arguments.quick, arguments.bf16, arguments.threads, arguments.time_limit, arguments.tiny)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes to measure."""
        return ("float32", "bfloat16") if self.bf16 else ("float32",)


@dataclass(frozen=True)
class Side:
    """One contestant. script: below benchmarks/; peer: runs in the peers' environment `python`.

    variants: label -> arguments of one measurement, each measured in every round; warm_up: measure once unrecorded.
    """

    name: str
    script: str
    spec: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    peer: bool = True
    warm_up: bool = False
    python: str = "bench"


@dataclass
class Outcome:
    """results: label -> every measurement; facts, peaks (MiB): by side; reasons: why something is missing.

    bounds: label -> seconds that a measurement was given and did not finish in.
    """

    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    bounds: dict[str, float] = field(default_factory=dict)

    def seconds(self, label: str) -> list[float]:
        """Seconds of every measurement of a variant."""
        return [result["seconds"] for result in self.results.get(label, ())]

    def rates(self, label: str) -> list[float]:
        """Tokens per second of every measurement of a variant."""
        return [result["tokens"] / result["seconds"] for result in self.results.get(label, ())]

    def fail(self, reason: str) -> None:
        """Keep why something is missing."""
        self.reasons.append(reason)
        say(reason)


def take_turns(sides: Sequence[Side], rounds: int, limit: float) -> Outcome:
    """Measure all variants of all sides in turn, `rounds` times; a side that fails is left out from there on.

    limit: seconds that set-up and one measurement may take. Side names and variant labels must be unique.
    """
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[Side, Worker]] = {}
        for side in sides:
            try:
                python = peer_python(side.python) if side.peer else sys.executable
                worker = Worker(side.name, python, side.script, side.spec, limit)
                running[side.name] = side, stack.enter_context(worker)
                outcome.facts[side.name] = worker.facts
                if side.warm_up:
                    worker.run(limit, **next(iter(side.variants.values())))
            except BenchmarkError as error:
                running.pop(side.name, None)
                outcome.fail(str(error))
        for _ in range(rounds):
            for name, (side, worker) in list(running.items()):
                if not _one_turn(side, worker, limit, outcome):
                    del running[name]
        for name, (_, worker) in running.items():
            try:
                outcome.peaks[name] = worker.close()["peak_rss_mib"]
            except BenchmarkError as error:
                outcome.fail(str(error))
    return outcome


def _one_turn(side: Side, worker: Worker, limit: float, outcome: Outcome) -> bool:
    for label, arguments in side.variants.items():
        try:
            result = worker.run(limit, **arguments)
        except TimedOut as error:
            outcome.bounds[label] = error.elapsed
            outcome.fail(str(error))
            return False
        except BenchmarkError as error:
            outcome.fail(str(error))
            return False
        outcome.results.setdefault(label, []).append(result)
        say(f"{side.name}, {label}: {result['seconds']:.2f} s")
    return True


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def publish(file: str, rows: Sequence[Row], options: Options) -> None:
    """Print the rows and, unless the shape is the tiny one, write benchmarks/results/FILE.json.

    Rows that this run did not measure (a dtype left out) are kept from the file.
    """
    print(table(rows))
    if options.tiny:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file}.json"
    key = ("name", "dtype")
    fresh = [asdict(row) for row in rows]
    measured = {tuple(row[k] for k in key) for row in fresh}
    kept = [row for row in read_rows(path) if tuple(row[k] for k in key) not in measured]
    path.write_text(json.dumps(kept + fresh, indent=1) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; none if it does not exist."""
    return json.loads(path.read_text()) if path.is_file() else []


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text in columns."""
    head = ("name", "ours", "peer", "ratio", "unit", "dtype", "shape", "peer name")
    cells = [head] + [
        (r.name, number(r.ours), number(r.peer), number(r.ratio), r.unit, r.dtype, r.shape, r.peer_name) for r in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = [f"{row.name} {row.dtype}: {row.note}" for row in rows if row.note]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *dict.fromkeys(notes)])
