"""Tolerant reading of files that may be half written, damaged or made by someone else.

What can be read is used; what can't is told in a sentence, in `Problems`, and never stops the page. Nothing here
executes or follows what a file says: links that lead out of the run folder, pipes and devices are left alone.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

#: A JSON or YAML file above this is left out: the page would not open.
MAX_FILE = 128 * 2**20
#: A line above this is left out.
MAX_LINE = 64 * 2**20
#: A gzip file is read so far and no further.
MAX_UNPACKED = 16 * 2**30
_BLOCK = 2**20


class Damaged(Exception):
    """A file that can't be read to its end."""


@dataclass
class Problems:
    """Sentences for the reader of the page, each once; further ones of a kind are only counted."""

    limit: int = 50
    _found: dict[str, None] = field(default_factory=dict)
    _more: int = 0

    def add(self, sentence: str) -> None:
        """Keep a sentence."""
        if sentence in self._found:
            return
        if len(self._found) < self.limit:
            self._found[sentence] = None
        else:
            self._more += 1

    def told(self) -> list[str]:
        """All sentences, and one that says how many more there were."""
        more = [f"{self._more:,} further problems of this kind are not listed."] if self._more else []
        return [*self._found, *more]


def regular(folder: Path, name: str, problems: Problems) -> Path | None:
    """The file `name` of a folder; None where there is none, or where it isn't a plain file of this folder."""
    path = folder / name
    try:
        if not path.is_file():
            if path.is_symlink() or path.exists():
                problems.add(f"{name}: not a plain file; left out.")
            return None
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.add(f"{name}: a link that leads out of the run folder; left out.")
            return None
    except OSError as error:
        problems.add(f"{name}: can't be read: {error.strerror or error}; left out.")
        return None
    return path


def read_text(folder: Path, name: str, problems: Problems) -> str | None:
    """A small text file, or None; what isn't UTF-8 is replaced."""
    path = regular(folder, name, problems)
    if path is None:
        return None
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            problems.add(f"{name}: {size:,} bytes are too many; left out.")
            return None
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        problems.add(f"{name}: can't be read: {error.strerror or error}; left out.")
        return None


def read_json(folder: Path, name: str, problems: Problems) -> Any:
    """A JSON file, or None."""
    text = read_text(folder, name, problems)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        problems.add(f"{name}: not JSON, or cut short; left out.")
        return None


def read_yaml(folder: Path, name: str, problems: Problems) -> dict[str, Any]:
    """A YAML mapping; {} where there is none. Only plain data is built."""
    text = read_text(folder, name, problems)
    if text is None:
        return {}
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        problems.add(f"{name}: not YAML, or cut short; left out.")
        return {}
    if isinstance(found, dict):
        return {str(key): value for key, value in found.items()}
    problems.add(f"{name}: not a mapping of sections; left out.")
    return {}


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a line, or None."""
    try:
        record = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def finite(value: Any) -> float | None:
    """A finite number as float; None for anything else, truth values too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole(value: Any) -> int | None:
    """A whole number within 53 bits, as a page can hold it; None for anything else."""
    number = finite(value)
    return int(number) if number is not None and number.is_integer() and abs(number) < 2**53 else None


def shorter(number: float | None, digits: int = 7) -> float | int | None:
    """The number with so many significant digits, whole ones without a point: a page needs no more."""
    if number is None or not math.isfinite(number):
        return None
    short = float(f"{number:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


class Tail:
    """The records of a JSONL file that grows while it is read.

    `read` gives the records that came since the last call. A line without an end is taken once it is a whole object.
    Where the file was cut or replaced, as resuming does, `read` starts again from its top and says so.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.problems = Problems(limit=8)
        self.torn = False
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._before = b""
        self._line = 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether these records replace all earlier ones, records)."""
        self.torn = False
        path = regular(self.folder, self.name, self.problems)
        if path is None:
            started = self._offset > 0
            self._reset()
            return started, []
        try:
            with open(path, "rb") as file:
                again = self._offset > 0 and not self._unchanged(file)
                if again:
                    self._reset()
                    self.problems = Problems(limit=8)
                file.seek(self._offset)
                return again, self._rest(file)
        except OSError as error:
            self.problems.add(f"{self.name}: can't be read: {error.strerror or error}.")
            return False, []

    def _unchanged(self, file: Any) -> bool:
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def _rest(self, file: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while line := file.readline(MAX_LINE):
            whole_line = line.endswith(b"\n")
            record = parse_line(line) if line.strip() else None
            if not whole_line and record is None:
                self.torn = True
                break
            self._line += 1
            if record is not None:
                found.append(record)
            elif line.strip():
                self.problems.add(f"{self.name} line {self._line}: not a JSON record; left out.")
            self._offset += len(line)
            self._before = line[-64:]
        return found


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzip or plain text by its first bytes.

    A gzip file that is cut short or damaged gives the lines before that; then Damaged is raised. Raises OSError.
    """
    with open(path, "rb") as file:
        head = file.read(2)
        file.seek(0)
        yield from _split(_inflate(file) if head == b"\x1f\x8b" else iter(lambda: file.read(_BLOCK), b""))


def _split(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    damage: Damaged | None = None
    while True:
        try:
            block = next(blocks, None)
        except Damaged as error:
            block, damage = None, error
        if block is None:
            break
        *whole_lines, rest = (rest + block).split(b"\n")
        yield from whole_lines
        if len(rest) > MAX_LINE:
            raise Damaged(f"a line is longer than {MAX_LINE:,} bytes")
    # What stands after the last end of line is whole in a file that ends without one, and torn in a damaged one.
    if damage is not None:
        raise damage
    if rest:
        yield rest


def _inflate(file: Any) -> Iterator[bytes]:
    decoder, pending, total = None, b"", 0
    while pending or (pending := file.read(2**16)):
        if decoder is None:  # a member begins; padding between members is allowed
            pending = pending.lstrip(b"\0")
            if not pending:
                continue
            decoder = zlib.decompressobj(wbits=31)
        try:
            made = decoder.decompress(pending, _BLOCK)
        except zlib.error as error:
            raise Damaged("the gzip data is damaged") from error
        total += len(made)
        if total > MAX_UNPACKED:
            raise Damaged(f"it unpacks to more than {MAX_UNPACKED:,} bytes")
        if made:
            yield made
        if decoder.eof:
            pending, decoder = decoder.unused_data, None
        else:
            pending = decoder.unconsumed_tail
    if decoder is not None:
        yield decoder.flush()
        if not decoder.eof:
            raise Damaged("the file is cut short")
