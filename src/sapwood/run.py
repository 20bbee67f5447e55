"""The run folder: what ran, what it measured, what it sampled. Never written twice, but gone on with.

    recipe.yaml  environment.json            the resolved recipe; versions, hardware, commit
    metrics.jsonl                            one line a record, without wall-clock: equal runs give equal bytes
    timing.jsonl                             seconds and rates, apart for that reason
    warnings.jsonl  events.jsonl             what guards found; what happened by the clock (start, stop, resume ...)
    samples/step_000010.jsonl.gz             every rollout of the step
    samples/eval_000010.jsonl.gz             the held-out tasks as played after it
    logs/training_*.log  plots/*.png         what was shown on the terminal; the curves
    tensorboard/ ...  trackers.json          what trackers write; what each calls the run

JSON has no NaN: a number that isn't finite is written as null and read back as NaN.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sapwood.config import Recipe, dump_recipe, load_recipe
from sapwood.environment import describe
from sapwood.errors import SapwoodError, StorageError
from sapwood.paths import FULL
from sapwood.rollout import records
from sapwood.trackers import Status, TrackedRun
from sapwood.trackers._hub import FINISH_SECONDS, STOP_SECONDS, Trackers
from sapwood.types import Group, Ids, Row

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("sapwood")


class Run:
    """An open run folder. Use `Run.create` for training, `Run.resume` to go on, `Run.open` to read; close it, or use
    `with`. when_full: called with a path where the disk is full, to wait for space; an error unless set.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.dir = folder
        self.recipe = recipe
        self._files: dict[str, io.FileIO] = {}
        self._unsynced: list[Path] = []
        self.when_full: Callable[[Path], None] | None = None
        self._handler: logging.Handler | None = None
        self._lock: io.FileIO | None = None
        self._trackers = Trackers(())
        self._notes: list[str] = []
        self._ended: str | None = None
        self._plots = threading.Lock()
        self._plotting: threading.Thread | None = None
        self._plot_after = 0.0

    @staticmethod
    def create(recipe: Recipe) -> Run:
        """Make the folder `run.dir`, write recipe and environment, and start the trackers.

        Raises StorageError if it exists already, ConfigError or MissingExtra for a tracker that can't work here.
        """
        trackers = Trackers(recipe.build_trackers())
        trackers.check()
        folder = recipe.run.dir
        with writing(folder):
            if folder.exists() and not (folder.is_dir() and all(_begun(path) for path in folder.iterdir())):
                going_on = ", or go on with it by --resume" if (folder / "recipe.yaml").is_file() else ""
                raise StorageError(
                    f"{folder}: already exists and a run is never overwritten; choose another folder, "
                    f"e.g. run.dir={free_name(folder)}{going_on}."
                )
            folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder, recipe)
        run._take_lock()
        run.write_text("recipe.yaml", dump_recipe(recipe))
        facts = {**describe(), "seed": recipe.run.seed}
        run.write_text("environment.json", json.dumps(facts, indent=2, sort_keys=True) + "\n")
        run._start_log()
        try:
            run._start_trackers(trackers, None)
        except SapwoodError:
            run.abandon()
            raise
        return run

    @staticmethod
    def resume(recipe: Recipe, step: int, *, pending: bool = False, aside: bool = False) -> Run:
        """Go on with the folder `run.dir` after `step` (0: from the beginning); what was written later is cut.

        pending: the step's evaluation, and so its row, is still to come. aside: keep what is cut in set_aside/TIME.
        Raises StorageError where there is no run, or another process is training it.
        """
        folder = recipe.run.dir
        if not (folder / "recipe.yaml").is_file():
            raise StorageError(
                f"{folder}: there is no run to resume, it has no recipe.yaml; start it without --resume."
            )
        trackers = Trackers(recipe.build_trackers())
        trackers.check()
        _check_files(folder)
        run = Run(folder, recipe)
        run._take_lock()
        with writing(folder):
            _cut(folder, step, pending, _aside(folder) if aside else None)
        run.write_text("recipe.yaml", dump_recipe(recipe))
        run._start_log()
        try:
            run._start_trackers(trackers, step - pending if step else -1)
        except SapwoodError:
            run.close()
            raise
        return run

    def _start_trackers(self, trackers: Trackers, resumed_from: int | None) -> None:
        plain = self.recipe.model_dump(mode="json")
        trackers.start(TrackedRun(self.dir, self.dir.absolute().name, plain, resumed_from))
        self._trackers = trackers

    def _take_lock(self) -> None:
        self._lock = take_lock(self.dir, "is training this run")

    @staticmethod
    def open(folder: Path | str) -> Run:
        """An existing run, to read. Raises StorageError where the folder isn't a run."""
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            raise StorageError(f"{folder}: not a run folder, it has no recipe.yaml.")
        return Run(folder, load_recipe(folder))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("failed" if kind is not None and issubclass(kind, Exception) else None)

    def close(self, status: Status | None = None) -> None:
        """Close the files and end the trackers. What was logged is on disk already.

        status: how the run ended, where its last event doesn't tell.
        """
        if status is None or self._ended == "stop":
            status = "stopped" if self._ended in ("stop", "start", "resume") else "finished"
        # A run that is stopped has to end within seconds; a finished one can let its trackers send what waits.
        self._trackers.finish(status, FINISH_SECONDS if status == "finished" else STOP_SECONDS)
        self._notes += self._trackers.notes()
        for note in self._notes:
            logger.warning("%s", note)
        for file in self._files.values():
            with writing(self.dir):
                file.close()
        self._files.clear()
        if self._handler is not None:
            for name in _LOGGERS:
                logging.getLogger(name).removeHandler(self._handler)
            self._handler.close()
            self._handler = None
            logging.captureWarnings(False)  # without a handler they would vanish
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def path(self, *parts: str) -> Path:
        """A path inside the folder, its parent created."""
        path = self.dir.joinpath(*parts)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a small file whole: readers see the old content or all of the new one."""
        return self._write_bytes(self.path(name), text.encode())

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl. Values: numbers, or 0-d arrays and tensors; keep wall-clock out."""
        record = {name: _plain(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", {"step": step, **record})
        self._trackers.scalars(step, record)

    def log_timing(self, step: int, timing: Mapping[str, Any]) -> None:
        """Append seconds and rates to timing.jsonl."""
        record = {name: _plain(value) for name, value in timing.items()}
        self._append("timing.jsonl", {"step": step, **record})
        self._trackers.scalars(step, record, prefix="timing/")

    def notes(self) -> list[str]:
        """What there is to tell the user about trackers since the last time: where to look, what failed.

        After `close` too, which may find out about the last ones.
        """
        found, self._notes = [*self._notes, *self._trackers.notes()], []
        return found

    def warn(self, record: Mapping[str, Any]) -> None:
        """Append what a guard found (step, name, message, remedies, metrics) to warnings.jsonl."""
        self._append("warnings.jsonl", record)

    def event(self, kind: str, message: str, step: int) -> None:
        """Append something that happened by the clock to events.jsonl.

        kind: start, resume, stop, checkpoint, memory, disk, skip or finish.
        """
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        self._append("events.jsonl", {"time": moment, "step": step, "kind": kind, "message": message})
        logger.info("%s: %s", kind, message)
        if kind in ("start", "resume", "stop", "finish"):
            self._ended = kind

    def sync(self) -> None:
        """See to it that what was written is on the disk, for a checkpoint whose rows must not be missing."""
        unsynced, self._unsynced = self._unsynced, []
        for path in (*unsynced, *(self.dir / name for name in self._files)):
            with contextlib.suppress(OSError):  # some file systems can't, and a picture may be replaced meanwhile
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def save_samples(
        self,
        step: int,
        groups: Sequence[Group],
        rows: Sequence[Row] = (),
        decode: Callable[[Ids], str] | None = None,
        name: str = "step",
    ) -> Path:
        """Write every trajectory, a line each, to samples/step_NNNNNN.jsonl.gz (or another name than step).

        Trackers are shown a few of them and the distributions of all.

        rows: those made from the groups, for what was learnt of them; decode: token ids to text, special tokens kept
        (texts are left empty without it). Equal samples give equal bytes.
        """
        known: dict[bytes, str] = {}  # the members of a group share their prompts

        def text(ids: Ids) -> str:
            if decode is None:
                return ""
            key = ids.tobytes()
            if key not in known:
                known[key] = decode(ids)
            return known[key]

        found = records(groups, rows, text)
        self._trackers.samples(step, found, prefix="" if name == "step" else f"{name}/")
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as packed:
            for record in found:
                packed.write(_line({"step": step, **record}))
        return self._write_bytes(self.path("samples", f"{name}_{step:06d}.jsonl.gz"), buffer.getvalue())

    def abandon(self) -> bool:
        """Remove the folder of a run that failed before it measured anything, so that its name is free again.

        False, with the folder left alone, where there is something to keep.
        """
        kept = ("metrics.jsonl", "samples", "checkpoints", "evidence")
        if any((self.dir / name).exists() for name in kept):
            return False
        self.close()
        with writing(self.dir):
            shutil.rmtree(self.dir)
        return True

    def saved(self) -> str:
        """What the folder holds so far, for a user who stopped the run."""
        return f"saved in {self.dir}: {self.progress_told()}."

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        events = self.dir / "events.jsonl"
        if not events.is_file():
            return (self.dir / "evaluation.json").is_file()
        kinds = [record.get("kind") for record in read_metrics(events)]
        return bool(kinds) and kinds[-1] == "finish"

    def progress_told(self) -> str:
        """How far the run got, in words."""
        metrics = self.dir / "metrics.jsonl"
        try:
            history = read_metrics(metrics) if metrics.is_file() else []
            steps = f"metrics up to step {history[-1].get('step')}" if history else "no finished step"
        except StorageError:
            steps = "metrics with a damaged line"
        checkpoints = sorted((self.dir / "checkpoints").glob("step_*"))
        return f"{steps}, {f'checkpoint {checkpoints[-1]}' if checkpoints else 'no checkpoint'}"

    def plot(self) -> Path | None:
        """Draw all pictures in plots/ from what is logged; returns the overview, None where there is nothing."""
        with self._plots:  # matplotlib's caches aren't made for two threads
            return self._draw()

    def plot_soon(self) -> None:
        """Draw them in a thread of its own, and only so often that it takes a twentieth of the time at most."""
        busy = self._plotting is not None and self._plotting.is_alive()
        if busy or time.monotonic() < self._plot_after:
            return
        self._plotting = threading.Thread(target=self._draw_aside, name="plots", daemon=True)
        self._plotting.start()

    def _draw_aside(self) -> None:
        began = time.monotonic()
        try:
            self.plot()
        except StorageError as error:  # a picture less; the one at the end is told about
            logger.warning("%s", error)
        now = time.monotonic()
        self._plot_after = now + 20 * (now - began)

    def _draw(self) -> Path | None:
        from sapwood.plots import OVERVIEW, History, figures

        def rows(name: str) -> list[dict[str, Any]]:
            path = self.dir / name
            return read_metrics(path) if path.is_file() else []

        history = History(rows("metrics.jsonl"), rows("timing.jsonl"), rows("warnings.jsonl"))
        overview = None
        for name, draw in figures(history, self.dir.absolute().name):
            buffer = io.BytesIO()
            draw().savefig(buffer, format="png", dpi=120)
            path = self._write_bytes(self.path("plots", name), buffer.getvalue())
            overview = path if name == OVERVIEW else overview
        return overview

    def _write_bytes(self, path: Path, content: bytes) -> Path:
        aside = path.with_name(path.name + ".part")

        def write() -> None:
            try:
                with open(aside, "wb") as file:
                    file.write(content)
                os.replace(aside, path)
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    aside.unlink(missing_ok=True)
                raise

        with writing(path):
            self._patiently(path, write)
        self._unsynced.append(path)
        return path

    def _patiently(self, path: Path, write: Callable[[], None]) -> None:
        """Write, and where the disk is full let `when_full` wait and write again. `write` does all or nothing."""
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in FULL or self.when_full is None:
                    raise
                self.when_full(path)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.path(name)
        with writing(path):
            if name not in self._files:
                self._files[name] = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by `close`)
            line = _line(record)
            self._patiently(path, lambda: _write_line(self._files[name], line))

    def _start_log(self) -> None:
        path = self.path("logs", f"training_{time.strftime('%Y%m%d_%H%M%S')}.log")
        with writing(path):
            handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.captureWarnings(True)
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(handler)
        logger.setLevel(logging.INFO)
        self._handler = handler


_LOGGERS = ("sapwood", "py.warnings")


def in_use(folder: Path) -> str | None:
    """The process that is training a run, or None."""
    path = folder / ".lock"
    if fcntl is None or not path.is_file():
        return None
    with writing(path), open(path, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read(20).decode(errors="replace").strip() or "?"
        except OSError:
            return None
    return None


def _begun(path: Path) -> bool:
    """Whether this is what a run leaves that was killed before it wrote its recipe."""
    return path.name == ".lock" or path.name.endswith((".part", ".manifest.json"))


def take_lock(folder: Path, doing: str) -> io.FileIO | None:
    """Hold a folder for this process, until the file that is returned is closed; the system lets go of it when the
    process ends, however it does. None where that can't be had. Raises StorageError where another process holds it.
    """
    if fcntl is None:
        return None
    with writing(folder):
        lock = open(folder / ".lock", "a+b", buffering=0)  # noqa: SIM115  (closed by the caller)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = (lock.seek(0), lock.read(20))[1].decode(errors="replace").strip()
        lock.close()
        raise StorageError(f"{folder}: process {holder or '?'} {doing}; wait for it, or stop it first.") from None
    except OSError:  # a file system without locks
        lock.close()
        return None
    lock.truncate(0)
    lock.write(str(os.getpid()).encode())
    return lock


def _check_files(folder: Path) -> None:
    """Raises StorageError where something else is in the place of a file that is written on (a pipe would block)."""
    for name in (".lock", "metrics.jsonl", "timing.jsonl", "warnings.jsonl", "events.jsonl"):
        path = folder / name
        if os.path.lexists(path) and not path.is_file():
            raise StorageError(f"{path}: not a file, so the run can't go on; remove it, or put the run's own back.")


def _aside(folder: Path) -> Path:
    """An empty folder for what a resumed run leaves behind."""
    target = free_name(folder / "set_aside" / time.strftime("%Y%m%d_%H%M%S"))
    target.mkdir(parents=True)
    return target


def _cut(folder: Path, step: int, pending: bool, aside: Path | None) -> None:
    """Leave what was written up to `step`. Rows and evaluations of a pending step are written again."""
    closed = step - pending
    for name in ("metrics.jsonl", "timing.jsonl", "warnings.jsonl"):
        path = folder / name
        if path.is_file():
            if aside is not None:
                shutil.copy2(path, aside / name)
            _cut_lines(path, closed if step else -1)
    later = [
        *(path for path in (folder / "samples").glob("step_*") if _number(path) > step),
        *(path for path in (folder / "samples").glob("eval_*") if _number(path) > (closed if step else -1)),
        *(path for path in (folder / "evidence").glob("step_*") if _number(path) > step),
        *(path for path in (folder / "checkpoints").glob("step_*") if _number(path) > step),
    ]
    for path in later:
        if aside is not None:
            (aside / path.parent.name).mkdir(exist_ok=True)
            shutil.move(path, aside / path.parent.name / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in (folder / "checkpoints").glob(".step_*"):  # what a killed writer left
        shutil.rmtree(path, ignore_errors=True)


def _number(path: Path) -> int:
    """The step in a name like step_000012_1.jsonl.gz."""
    digits = path.name.split(".")[0].split("_")[1]
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def _cut_lines(path: Path, last: int) -> None:
    """Leave the records up to step `last`; damaged lines, and a torn one at the end, go too."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= last:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(b"".join(kept))
    os.replace(aside, path)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or timing.jsonl; null reads as NaN.

    A last line cut short, as a full disk or a killed process leaves it, is left out. Raises StorageError for any
    other line that isn't JSON, and for a file that can't be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"{path}: can't be read: {error.strerror}.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise StorageError(f"{path} line {number}: not a JSON record.") from error
        found.append({name: math.nan if value is None else value for name, value in record.items()})
    return found


def free_name(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3 ... that doesn't exist."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError below into a StorageError that names the path and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(f"{path}: the disk is full{_free(path)}; free some space. {_KEPT}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"{path}: no permission to write; choose another run.dir.") from error
        raise StorageError(f"{path}: can't be written: {error.strerror or error}. {_KEPT}") from error


_KEPT = "What was written before stays readable."


def _free(path: Path) -> str:
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), None)
    if existing is None:
        return ""
    try:
        return f" ({shutil.disk_usage(existing).free / 2**20:.0f} MiB left)"
    except OSError:
        return ""


def _write_line(file: io.FileIO, line: bytes) -> None:
    """Write all of `line` or, where the disk refuses, none of it."""
    start = file.seek(0, os.SEEK_END)
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):  # a torn last line is tolerated by `read_metrics`
            file.truncate(start)
        raise


def _line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON; half of a surrogate pair, which UTF-8 lacks, is escaped as JSON does it."""
    text = json.dumps(_finite(record), sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain)
    return (text + "\n").encode("utf-8", "backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """A value that JSON can hold: 0-d arrays and tensors as numbers, arrays as lists, anything else as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    convert = getattr(value, "tolist", None)
    return _finite(convert()) if convert else str(value)
