"""Records in an Arrow file that is made once and memory-mapped.

A source is read and normalised once for every version of its files and options; what comes out lies in the cache
folder, and opening it again maps it. Records are decoded one at a time, when they are asked for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sapwood.data import LearnsFrom, Progress, Record
from sapwood.data.read import Input, resolve
from sapwood.data.section import SourceSection
from sapwood.data.shapes import BadRecord, LeftOut, Normaliser
from sapwood.data.words import counted
from sapwood.errors import DataError, StorageError
from sapwood.paths import cache_dir
from sapwood.types import Message

_LAYOUT = 2  # part of every key: raise it when what is stored changes
_FILES = ("records.arrow", "bad.jsonl")
_DEEPEST = 50  # levels of lists and objects within an answer or a metadata field
_BATCH_ROWS, _BATCH_BYTES = 4096, 4 << 20
_STALE = 24 * 3600.0  # seconds after which a half-made folder is that of a process that died
_SCHEMA = pa.schema(
    [
        ("record", pa.large_binary()),  # JSON: prompt, replies, rewards, answer
        ("metadata", pa.large_binary()),  # JSON, empty for none
        ("prompt", pa.uint64()),  # hash of the prompt without system messages
        ("content", pa.uint64()),  # hash of `record`
        ("file", pa.uint32()),
        ("number", pa.uint64()),  # line or row
    ]
)


@dataclass(frozen=True)
class SourceReport:
    """What reading a source found. read: entries; kept: records; left_out: good entries not used, by reason.

    duplicates: records whose content another one had before. shapes: entries by shape.
    """

    path: str
    read: int
    kept: int
    bad: int
    left_out: dict[str, int]
    duplicates: int
    shapes: dict[str, int]
    bad_file: Path = field(repr=False)

    def bad_records(self) -> Iterator[str]:
        """One sentence for every bad record: file, line and what is wrong. Raises DataError for a damaged cache."""
        try:
            with self.bad_file.open(encoding="utf-8") as file:
                for line in file:
                    yield str(json.loads(line))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(_damaged(self.bad_file.parent, self.path)) from error


class Store:
    """The records of one source, memory-mapped. Raises DataError where the folder isn't as it was written."""

    def __init__(self, folder: Path, inputs: Sequence[Input], path: str) -> None:
        self._inputs, self._folder = inputs, folder
        try:
            facts = json.loads((folder / "facts.json").read_text())
            sizes = facts.pop("sizes")
            if sizes != {name: (folder / name).stat().st_size for name in _FILES}:
                raise ValueError("files have other sizes")
            self.report = SourceReport(path=path, bad_file=folder / "bad.jsonl", **facts)
            self._file = pa.ipc.open_file(pa.memory_map(str(folder / "records.arrow")))
            batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)  # a wrong offset would lead out of the map
            if self._file.schema != _SCHEMA or sum(batch.num_rows for batch in batches) != self.report.kept:
                raise ValueError("it holds other records")
        except (
            OSError,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            RecursionError,
            pa.ArrowException,
        ) as error:
            raise DataError(_damaged(folder, path)) from error
        # Zero-copy views of the map, a column at a time: a few kilobytes a batch.
        self._batches = [batch.columns for batch in batches]
        self._starts = np.cumsum([0, *(len(columns[0]) for columns in self._batches)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        columns, row = self._at(index)
        metadata = columns[1][row].as_py()
        try:
            prompt, replies, rewards, answer = json.loads(columns[0][row].as_py())
            return Record(
                prompt=_messages(prompt),
                replies=tuple([_messages(reply) for reply in replies]),
                rewards=tuple(rewards),
                answer=answer,
                metadata=json.loads(metadata) if metadata else {},
                source=self._inputs[columns[4][row].as_py()].where(columns[5][row].as_py()),
            )
        except (ValueError, TypeError, LookupError) as error:
            raise DataError(_damaged(self._folder, self.report.path)) from error

    def where(self, index: int) -> str:
        """File and line (or row) of a record."""
        columns, row = self._at(index)
        return self._inputs[columns[4][row].as_py()].where(columns[5][row].as_py())

    def prompts(self) -> Iterator[NDArray[np.uint64]]:
        """Hashes of the prompts, a batch at a time, as views of the map."""
        return (columns[2].to_numpy() for columns in self._batches)

    def contents(self) -> NDArray[np.uint64]:
        """[N] hashes of whole records, metadata aside."""
        parts = [columns[3].to_numpy() for columns in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)

    def _at(self, index: int) -> tuple[list[Any], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self._batches[number], index - self._starts[number]


def open_store(
    source: SourceSection,
    learns_from: LearnsFrom | None,
    limit: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
    empty: bool = False,
) -> Store:
    """The source's records; read and normalised where the cache doesn't hold them.

    limit: read no further than so many records. Raises DataError for a bad record unless `skip_bad`, and for a source
    without a good one unless `empty`; StorageError where the cache can't be written.
    """
    inputs = resolve(source)
    options = source.model_dump(mode="json", exclude={"path", "weight", "max_samples"})
    key = {
        "layout": _LAYOUT,
        "learns_from": learns_from,
        "options": options,
        "limit": limit,
        "files": [item.fingerprint() for item in inputs],
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "data" / name

    def make() -> Store:
        _make(folder, _Writing(inputs, Normaliser(source, learns_from), limit, skip_bad, progress))
        return Store(folder, inputs, source.path)

    if not (folder / "facts.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        store = make()
    else:
        try:
            store = Store(folder, inputs, source.path)
        except DataError:  # what can be made again is
            shutil.rmtree(folder, ignore_errors=True)
            store = make()
    first = next(store.report.bad_records(), None)
    if first is not None and not skip_bad:
        raise _strict(first)
    if len(store) == 0 and not empty:
        raise DataError(_nothing(store.report, first))
    return store


def _damaged(folder: Path, path: str) -> str:
    return f"{folder}: the cache of {path} is damaged; remove this folder, and it is made again."


def _strict(problem: str) -> DataError:
    return DataError(
        f"{problem.rstrip('.')}. `sapwood data check` lists every bad record; data.on_bad_record=skip leaves them out."
    )


def _nothing(report: SourceReport, first: str | None) -> str:
    if first is not None:
        return f"{report.path}: of {counted(report.read, 'record')} none is good; the first: {first.rstrip('.')}."
    if report.left_out:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in report.left_out.items())
        return f"{report.path}: no record is left to learn from: {reasons}."
    return f"{report.path}: holds no record."


def _messages(pairs: list[list[str]]) -> tuple[Message, ...]:
    return tuple([Message(role, content) for role, content in pairs])


# ---- writing ----------------------------------------------------------------------------------------------


def _make(folder: Path, writing: _Writing) -> None:
    """Write aside, then rename: a folder that is there is whole, whoever was killed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            writing.write(made)
            # Another process may have made the same: the first to rename wins, and the other's copy is as good.
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                try:
                    made.rename(folder)
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
    except OSError as error:
        raise StorageError(
            f"can't write the data cache {folder.parent} ({error.strerror or error}); free some space, or set "
            "SAPWOOD_CACHE to another folder."
        ) from error


def _sweep(parent: Path) -> None:
    """Remove what killed processes left."""
    for item in parent.glob(".making-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - item.stat().st_mtime > _STALE:
                shutil.rmtree(item, ignore_errors=True)


@dataclass
class _Writing:
    """One source on its way into the cache."""

    inputs: Sequence[Input]
    normalise: Normaliser
    limit: int | None
    skip_bad: bool
    progress: Progress | None
    read: int = 0
    kept: int = 0
    bad: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    columns: list[list[Any]] = field(default_factory=lambda: [[] for _ in _SCHEMA])
    size: int = 0

    def write(self, folder: Path) -> None:
        with (
            (folder / "bad.jsonl").open("w", encoding="utf-8") as bad,
            pa.OSFile(str(folder / "records.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as writer,
        ):
            for index, item in enumerate(self.inputs):
                for problem in self._entries(index, item, writer):
                    if not self.skip_bad:
                        raise _strict(problem)
                    bad.write(json.dumps(problem) + "\n")
                if self.progress is not None:
                    self.progress(f"reading {item.name}, percent", 100, 100)
                if self.kept == self.limit:
                    break
            self._flush(writer)
        facts = {
            "read": self.read,
            "kept": self.kept,
            "bad": self.bad,
            "left_out": dict(self.left_out),
            "duplicates": self.kept - _distinct(folder / "records.arrow"),
            "shapes": dict(self.normalise.shapes),
            "sizes": {name: (folder / name).stat().st_size for name in _FILES},
        }
        (folder / "facts.json").write_text(json.dumps(facts))
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    def _entries(self, index: int, item: Input, writer: pa.ipc.RecordBatchFileWriter) -> Iterator[str]:
        """Add the records of one file; yields what is wrong with bad ones."""
        for number, fields, problem in item.read(self._consumed(item)):
            if fields is not None:
                try:
                    for record in self.normalise(fields):
                        self._add(record, index, number)
                        if self.kept == self.limit:
                            break
                except BadRecord as error:
                    problem = str(error)
                except LeftOut as error:
                    self.left_out[str(error)] += 1
            self.read += 1
            if problem:
                self.bad += 1
                yield f"{item.where(number)}: {problem}"
            if len(self.columns[0]) >= _BATCH_ROWS or self.size >= _BATCH_BYTES:
                self._flush(writer)
            if self.kept == self.limit:
                return

    def _consumed(self, item: Input) -> Any:
        progress = self.progress
        if progress is None:
            return None
        title = f"reading {item.name}, percent"
        return lambda done: progress(title, min(100 * done // max(item.size, 1), 99), 100)

    def _add(self, record: Record, file: int, number: int) -> None:
        if any(_deep(value) for value in (record.answer, *record.metadata.values())):
            raise BadRecord(f"holds values nested more than {_DEEPEST} deep")
        prompt = [[m.role, m.content] for m in record.prompt]
        replies = [[[m.role, m.content] for m in reply] for reply in record.replies]
        try:
            core = _dumps([prompt, replies, record.rewards, record.answer]).encode()
        except UnicodeEncodeError:
            raise BadRecord("holds half of a surrogate pair (a \\ud8.. escape without its other half)") from None
        metadata = json.dumps(record.metadata, default=_plain).encode() if record.metadata else b""
        question = "\x1e".join([f"{role}\x1f{content}" for role, content in prompt if role != "system"]).encode()
        for column, value in zip(
            self.columns, (core, metadata, _hash(question), _hash(core), file, number), strict=True
        ):
            column.append(value)
        self.kept += 1
        self.size += len(core) + len(metadata)

    def _flush(self, writer: pa.ipc.RecordBatchFileWriter) -> None:
        if self.columns[0]:
            arrays = [pa.array(column, type=kind.type) for column, kind in zip(self.columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            for column in self.columns:
                column.clear()
            self.size = 0


def _deep(value: Any) -> bool:
    """Whether lists and objects go deeper than can be read back wherever it is needed."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [item for part in level if type(part) in (list, dict) for item in _inside(part)]
        if not level:
            return False
    return True


def _inside(part: Any) -> Any:
    return part.values() if type(part) is dict else part


_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=lambda value: _plain(value)).encode


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _plain(value: Any) -> Any:
    """JSON of what Parquet and hub sets hold besides: dates, decimals, bytes."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _distinct(path: Path) -> int:
    """How many different records an Arrow file holds."""
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        parts = [file.get_batch(i).column(3).to_numpy() for i in range(file.num_record_batches)]
        if not parts:
            return 0
        hashes = np.concatenate(parts)
        hashes.sort()
        return 1 + int(np.count_nonzero(hashes[1:] != hashes[:-1]))
