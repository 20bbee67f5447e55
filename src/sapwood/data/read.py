"""Files and hub sets as streams of entries: never more than a buffer of a file is in memory.

An entry is (number, fields, problem): the line or row it stands on, its fields, or None and what is wrong with it.
What makes the rest of a file unreadable (a cut-short archive, an array that isn't JSON) raises DataError.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from sapwood.data.section import SourceSection
from sapwood.data.words import described
from sapwood.errors import DataError, printable
from sapwood.paths import expanded

Entry = tuple[int, "dict[str, Any] | None", str]
#: Called with the bytes (or rows) consumed so far.
Consumed = Callable[[int], None]

SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_EVERY = 2000  # entries between two reports of progress
_CHUNK = 1 << 20
_TOO_LONG = "is longer than any record"
_LONGEST = 256 << 20  # characters of one JSON value; what is longer has lost its closing bracket


class Input(ABC):
    """One file or hub set. name: for messages; unit: "line" or "row"; size: what `consumed` counts up to."""

    name: str
    unit: str
    size: int

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """JSON-serialisable; differs where the content does."""

    @abstractmethod
    def read(self, consumed: Consumed | None = None) -> Iterator[Entry]:
        """The entries, in order. Raises DataError for a file that can't be read on."""

    def where(self, number: int) -> str:
        """The place of an entry, for messages."""
        return f"{self.name} {self.unit} {number}"


def resolve(source: SourceSection) -> list[Input]:
    """The files of a source, or its hub set. Raises DataError for a path that leads nowhere."""
    path = expanded(source.path)
    if not os.path.exists(path) and names_function(source.path):
        from sapwood.data.function import FunctionInput  # which imports this module

        return [FunctionInput(source)]
    if source.format == "hub" or (source.format == "auto" and _looks_like_hub(source.path, path)):
        return [HubInput(source)]
    if source.revision is not None:
        raise DataError(f"{source.path}: revision is for hub sets, and this is a file or folder; remove it.")
    if os.path.isdir(path):
        return [FileInput(file, source.format) for file in _folder(path, source)]
    if source.split is not None or source.subset is not None:
        key = "split" if source.split is not None else "subset"
        raise DataError(f"{source.path}: {key} chooses among the files of a folder or hub set; remove it.")
    if any(character in source.path for character in "*?[") and not os.path.exists(path):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
        if not found:
            raise DataError(f"{printable(source.path)}: no file matches; check the pattern.")
        return [FileInput(file, source.format) for file in found]
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{source.path}: this path is a device or a pipe; write it to a file first.")
    if not os.path.isfile(path):
        raise DataError(f"{printable(source.path)}: no such file or folder{_nearest(path)}")
    return [FileInput(path, source.format)]


def names_function(path: str) -> bool:
    """Whether a source's path is "file.py:name" or "package.module:name"."""
    module, colon, name = path.rpartition(":")
    return bool(colon) and name.isidentifier() and (module.endswith(".py") or module.replace(".", "").isidentifier())


def _looks_like_hub(text: str, path: Path) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not os.path.exists(path) and kind_of(path) is None


def kind_of(path: Path) -> str | None:
    """The format that a file's name tells, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _nearest(path: Path) -> str:
    folder = path.parent
    there = os.path.isdir(folder)
    names = [item.name for item in folder.iterdir()] if there else []
    near = difflib.get_close_matches(path.name[:255], names, n=1)
    if near:
        return f"; did you mean {str(folder / near[0])!r}?"
    return "; a hub set is written owner/name." if there else f"; there is no folder {printable(str(folder))!r}."


def _folder(path: Path, source: SourceSection) -> list[Path]:
    """The data files of a folder, those of the split if one is asked for."""
    root = path / source.subset if source.subset else path
    if not root.is_dir():
        subfolders = sorted(item.name for item in path.iterdir() if item.is_dir())
        raise DataError(f"{path}: no subfolder {source.subset!r}; there are {', '.join(subfolders) or 'none'}.")
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and kind_of(file)]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise DataError(f"{root}: holds no data file (known endings: {', '.join(SUFFIXES)}, each also with .gz).")
    splits = {file: _splits_of(file.relative_to(root)) for file in files}
    if source.split is not None:
        chosen = [file for file in files if source.split.lower() in splits[file]]
        if not chosen:
            raise DataError(f"{root}: no file is named after the split {source.split!r}; there are {_names(files)}.")
        return chosen
    named = {split for found in splits.values() for split in found if split in _SPLITS}
    if len(named) > 1:
        raise DataError(
            f"{root}: holds files of several splits ({', '.join(sorted(named))}), and learning from all of them would "
            "leave none to test on; set split, e.g. split: train."
        )
    return files


def _splits_of(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", str(path).lower()))


def _names(files: list[Path]) -> str:
    shown = ", ".join(file.name for file in files[:5])
    return shown if len(files) <= 5 else f"{shown} and {len(files) - 5} more"


# ---- files ------------------------------------------------------------------------------------------------


@dataclass
class FileInput(Input):
    """A JSON, JSONL, CSV or Parquet file; text may be gzipped."""

    path: Path
    format: str = "auto"

    def __post_init__(self) -> None:
        self.name = str(self.path)
        kind = kind_of(self.path) if self.format == "auto" else self.format
        if kind is None:
            raise DataError(
                f"{self.path}: the ending tells no format (known: {', '.join(SUFFIXES)}, each also with .gz); "
                "rename it or set format."
            )
        self.kind = kind
        self.unit = "row" if kind == "parquet" else "line"
        try:
            stat = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: can't be read: {error.strerror or error}.") from error
        self.size, self.modified = stat.st_size, stat.st_mtime_ns

    def fingerprint(self) -> list[Any]:
        """Path, size and time of modification."""
        return [str(self.path.resolve()), self.kind, self.size, self.modified]

    def read(self, consumed: Consumed | None = None) -> Iterator[Entry]:
        """The file's entries."""
        if self.size == 0:
            raise DataError(f"{self.name}: the file is empty.")
        try:
            if self.kind == "parquet":
                yield from _parquet(self, consumed)
            else:
                yield from self._text(consumed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.name}: the gzip archive is damaged or cut short ({error}); download or copy it again."
            ) from error
        except OSError as error:
            raise DataError(f"{self.name}: can't be read: {error.strerror or error}.") from error

    def _text(self, consumed: Consumed | None) -> Iterator[Entry]:
        with self.path.open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if zipped else raw)
            head: bytes = stream.peek(4096)[:4096]  # type: ignore[attr-defined]
            _check_head(self.name, head)
            first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            if self.kind == "csv":
                entries = _csv(stream, self)
            elif first == b"[" or (first == b"{" and self.kind == "json" and not _first_line_is_json(head)):
                entries = _json_values(stream, self.name)
            else:
                entries = _json_lines(stream)
            for count, entry in enumerate(entries):
                if consumed is not None and count % _EVERY == 0:
                    consumed(raw.tell())
                yield entry


def _check_head(name: str, head: bytes) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in head:
        raise DataError(f"{name}: not UTF-8 text (UTF-16, or a binary file); save it as UTF-8.")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{name}: a pointer of Git LFS, not the data; run `git lfs pull` where it came from.")
    if not head.strip():
        raise DataError(f"{name}: the file is empty.")


def _first_line_is_json(head: bytes) -> bool:
    """Whether a file that begins with an object is JSON lines; a first line longer than the head is taken for one."""
    line, newline, _ = head.partition(b"\n")
    if not newline:
        return True
    try:
        json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return False
    return True


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8."""
    return f"byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8; save the file as UTF-8"


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: stream.readline(_LONGEST), b"")


def _json_lines(stream: IO[bytes]) -> Iterator[Entry]:
    loads = json.loads
    for number, line in enumerate(_lines(stream), 1):
        if len(line) == _LONGEST:  # an archive may unpack to any size
            yield number, None, _TOO_LONG
            return
        try:
            text = line.decode()
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text.isspace() or not text:
                continue
            value = loads(text)
        except UnicodeDecodeError as error:
            yield number, None, not_utf8(error)
        except json.JSONDecodeError as error:
            yield number, None, f"not JSON ({error.msg} at column {error.colno})"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            yield number, None, f"not usable JSON ({error})"
        else:
            yield _object(number, value)


def _object(number: int, value: Any) -> Entry:
    if type(value) is dict:
        return number, value, ""
    return number, None, f"must be a JSON object with named fields, not {described(value)}"


class _Buffer:
    """A window on a text that is read on demand. at: where the next value begins, on line `line`."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._grow = _CHUNK

    def more(self) -> None:
        """Read on; doubles what it reads while one value is still incomplete."""
        kept = self.text[self.at :]
        self._grow = self._grow * 2 if len(kept) * 2 > self._grow else _CHUNK
        chunk = self._stream.read(self._grow)
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = self.line + kept.count("\n") + error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise DataError(f"{self._name} line {line}: 0x{byte:02x} is not UTF-8; save the file as UTF-8.") from error
        self.ended = not chunk
        self.text, self.at = kept + text, 0

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.advance(found.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to


_SPACE = re.compile(r"[ \t\r\n\ufeff]*")


def _json_values(stream: IO[bytes], name: str) -> Iterator[Entry]:
    """Elements of an array, or values one after another."""
    buffer = _Buffer(stream, name)
    array = buffer.peek() == "["
    if array:
        buffer.advance(buffer.at + 1)
    count = 0
    while character := buffer.peek():
        if array and character == "]":
            buffer.advance(buffer.at + 1)
            if buffer.peek():
                raise DataError(f"{name} line {buffer.line}: text after the end of the array; remove it.")
            return
        if array and count:
            if character != ",":
                raise DataError(f"{name} line {buffer.line}: not JSON (a comma is missing between two entries).")
            buffer.advance(buffer.at + 1)
            buffer.peek()
        line = buffer.line
        yield _object(line, _next_value(buffer, name))
        count += 1
    if array:
        raise DataError(f"{name} line {buffer.line}: the array has no end, the file is cut short; copy it again.")


def _next_value(buffer: _Buffer, name: str) -> Any:
    decode = _DECODER.raw_decode
    while True:
        try:
            value, end = decode(buffer.text, buffer.at)
        except json.JSONDecodeError as error:
            open_ended = error.msg.startswith("Unterminated string") or error.pos >= len(buffer.text) - 16
            if open_ended and not buffer.ended and len(buffer.text) - buffer.at < _LONGEST:
                buffer.more()
                continue
            line = buffer.line + buffer.text.count("\n", buffer.at, error.pos)
            if buffer.ended and open_ended:
                raise DataError(
                    f"{name} line {line}: not JSON ({error.msg}): the file is cut short; copy it again."
                ) from error
            raise DataError(f"{name} line {line}: not JSON ({error.msg} at column {error.colno}).") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} line {buffer.line}: not usable JSON ({error}).") from error
        # A number at the very end of the window may go on beyond it.
        if end == len(buffer.text) and not buffer.ended and not isinstance(value, dict | list | str):
            buffer.more()
            continue
        buffer.advance(end)
        return value


_DECODER = json.JSONDecoder()


def _csv(stream: IO[bytes], file: FileInput) -> Iterator[Entry]:
    """Rows as objects of text. A row's number is the line that it begins on."""
    csv.field_size_limit(_LONGEST)
    broken: list[str] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(_lines(stream), 1):
            if len(line) == _LONGEST:
                raise DataError(f"{file.name} line {number}: {_TOO_LONG}.")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                broken.append(not_utf8(error))
                text = line.decode(errors="replace")
            yield text.removeprefix("\ufeff") if number == 1 else text

    source = lines()
    first = next(source, "")
    delimiter = "\t" if ".tsv" in file.path.suffixes else max(",;\t", key=first.count)
    reader = csv.reader(_chain(first, source), delimiter=delimiter, strict=True)
    begins = 1
    try:
        header = next(reader, [])
        _check_header(header, file.name)
        begins = reader.line_num + 1
        for row in reader:
            number, begins = begins, reader.line_num + 1
            if broken:
                yield number, None, broken.pop()
                broken.clear()
            elif len(row) == len(header):
                yield number, dict(zip(header, row, strict=True)), ""
            elif row:
                yield number, None, f"{len(row)} columns where the header has {len(header)}; quote what holds a comma"
    except csv.Error as error:
        raise DataError(
            f"{file.name} line {begins}: the row that begins here can't be read as CSV ({error}); is a quote not "
            "closed, or not doubled inside a quoted field?"
        ) from error


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _check_header(header: list[str], name: str) -> None:
    if len(set(header)) < len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise DataError(f"{name} line 1: the column {twice!r} is there twice; rename one.")
    if all(not column.strip() for column in header):
        raise DataError(f"{name} line 1: the header names no column; the first line must name them.")


def _parquet(file: FileInput, consumed: Consumed | None) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        opened = pq.ParquetFile(file.path)
        total = max(opened.metadata.num_rows, 1)
        for batch in opened.iter_batches(batch_size=1024):
            if consumed is not None:
                consumed(file.size * number // total)
            for row, problem in _rows(batch):
                number += 1
                yield number, row, problem
    except (pa.ArrowException, OSError) as error:
        first = printable(str(error).splitlines()[0].rstrip("."), 120) if str(error) else type(error).__name__
        at = f" row {number + 1}" if number else ""
        raise DataError(
            f"{file.name}{at}: not a readable Parquet file, or one that is cut short ({first}); copy it again."
        ) from error


def _rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """The rows of a batch, or what is wrong with them.

    Parquet doesn't check that its text is UTF-8, and has dates and time zones that Python lacks.
    """
    try:
        yield from [(row, "") for row in batch.to_pylist()]
    except (ValueError, LookupError, OverflowError):
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0], ""
            except UnicodeDecodeError as error:
                yield None, not_utf8(error)
            except (ValueError, LookupError, OverflowError) as error:
                yield None, f"holds a value that can't be read ({type(error).__name__}: {printable(str(error))})"


# ---- hub --------------------------------------------------------------------------------------------------


@dataclass
class HubInput(Input):
    """A set that `datasets` opens: a hub id, or a local folder with the same layout."""

    source: SourceSection

    def __post_init__(self) -> None:
        self.unit = "row"
        self._opened: Any = _load_hub(self.source)
        self.name = f"{self.source.path} ({self.source.split or 'train'})"
        self.size = len(self._opened)

    def fingerprint(self) -> list[Any]:
        """What `datasets` says of the content."""
        return [self.source.path, self._opened._fingerprint]

    def read(self, consumed: Consumed | None = None) -> Iterator[Entry]:
        """The set's rows."""
        for number, row in enumerate(self._opened, 1):
            if consumed is not None and number % _EVERY == 0:
                consumed(number)
            yield number, row, ""


def _load_hub(source: SourceSection) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    split = source.split or "train"
    hint = "check the id, subset, split and network, or give a local file"
    # A subset that the set doesn't declare is a folder of it, as helpful-base of Anthropic/hh-rlhf.
    ways: list[Mapping[str, Any]] = [{"name": source.subset}]
    if source.subset is not None:
        ways.append({"data_dir": source.subset})
    problem: Exception | None = None
    for way in ways:
        try:
            return datasets.load_dataset(source.path, split=split, revision=source.revision, **way)
        except (ValueError, OSError, RuntimeError, KeyError, DatasetsError) as error:
            problem = problem or error
            if not isinstance(error, ValueError):  # not of the subset's name: asking again would only wait again
                break
    first = (str(problem).strip() or type(problem).__name__).splitlines()[0].rstrip(".")
    raise DataError(f"{source.path}: can't be opened as a hub set ({first[:200]}); {hint}.") from problem
