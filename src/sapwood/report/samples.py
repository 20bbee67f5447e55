"""Trajectories for the page: an index to filter and sort by, and compressed chunks that are opened one by one.

A file of samples becomes an index (a row a trajectory) and chunks of neighbouring trajectories. A chunk has two parts,
both gzip: texts, which searching needs, and tokens with their numbers, which only an open trajectory needs.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sapwood.report.building import is_building, records
from sapwood.report.reading import Damaged, Problems, finite, lines, parse_line, read_json, shorter, whole

#: A chunk ends at so many trajectories, or so many characters.
CHUNK_ROWS, CHUNK_CHARACTERS = 48, 400_000
#: A text beyond so many characters is cut in the page, and the page says so.
TEXT = 4_000_000
#: Tokens of a turn that the page gets with their numbers.
TOKENS = 200_000
SNIPPET = 96

PARSE_FAILED, FALLBACK, ERROR, TRUNCATED, CUT = 1, 2, 4, 8, 16
_FILE = re.compile(r"(step|eval)_(\d{1,15})\.jsonl(\.gz)?")
_COMPACT = (",", ":")
_NUMBERS = ("advantages", "ratios", "logprobs", "sampled_logprobs")


@dataclass(frozen=True)
class SampleFile:
    """A file of trajectories. kind: "eval" (held-out tasks played after `step`), "step" (learnt from) or "file"."""

    path: Path
    kind: str
    step: int

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@dataclass(frozen=True)
class Chunk:
    """first: number within the file's kept trajectories; texts, tokens: gzip of JSON."""

    first: int
    texts: bytes
    tokens: bytes


@dataclass
class Packed:
    """What the page gets of a file. rows: one list a trajectory, see `_row`; tasks: their ids, by number."""

    file: SampleFile
    rows: list[list[Any]] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def index(self) -> dict[str, Any]:
        """The index as plain data."""
        return {
            "file": self.file.name,
            "kind": self.file.kind,
            "step": self.file.step,
            "tasks": self.tasks,
            "rows": self.rows,
            "starts": [chunk.first for chunk in self.chunks],
            "problems": self.problems,
        }


def list_samples(path: Path, problems: Problems) -> list[SampleFile]:
    """The sample files of a run folder, or the one bare file; held-out ones first, each kind by step."""
    if path.is_file():
        return [SampleFile(path, "file", 0)]
    folder, home = path / "samples", path.resolve()
    found: list[SampleFile] = []
    if folder.is_symlink() and not folder.resolve().is_relative_to(home):
        problems.add("samples: a link that leads out of the run folder; left out.")
        return []
    try:
        names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        problems.add(f"samples: can't be read: {error.strerror or error}.")
        return []
    for name in names:
        match = _FILE.fullmatch(name)
        if match is None:
            continue
        at = folder / name
        if not at.is_file() or (at.is_symlink() and not at.resolve().is_relative_to(home)):
            problems.add(f"samples/{name}: not a plain file of this run; left out.")
            continue
        found.append(SampleFile(at, match[1], int(match[2])))
    return sorted(found, key=lambda file: (file.kind, file.step))


def building_file(path: Path, problems: Problems) -> dict[str, Any] | None:
    """The content of a trajectory file of a building; None for any other file."""
    data = read_json(path.parent, path.name, problems) if path.suffix == ".json" else None
    return data if is_building(data) else None


def holds_trajectories(path: Path) -> bool:
    """Whether a bare file begins with a record that is one."""
    first = next(read_records(SampleFile(path, "file", 0), []), {})
    return "turns" in first or "reply" in first


def count(file: SampleFile) -> int:
    """Trajectories of a file, without looking at them."""
    if file.kind == "file" and file.path.suffix == ".json":
        return sum(1 for _ in read_records(file, []))
    total = 0
    try:
        for line in lines(file.path):
            total += bool(line.strip())
    except (Damaged, OSError):
        pass  # told by `pack_file`
    return total


def read_records(file: SampleFile, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The records of a file; what can't be read is told in `problems` and left out."""
    if file.kind == "file" and file.path.suffix == ".json":
        yield from _array(file, problems)
        return
    number, bad = 0, 0
    try:
        for number, line in enumerate(lines(file.path), start=1):
            if not line.strip():
                continue
            record = parse_line(line)
            if record is None:
                bad += 1
                if bad <= 3:
                    problems.append(f"{file.name} line {number}: not a JSON record; left out.")
                continue
            yield record
    except Damaged as error:
        problems.append(f"{file.name}: {error} after line {number}; what stands before is shown.")
    except OSError as error:
        problems.append(f"{file.name}: can't be read: {error.strerror or error}.")
    if bad > 3:
        problems.append(f"{file.name}: {bad - 3:,} further lines are not JSON records; left out.")


def _array(file: SampleFile, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The records of a JSON array, or of the first array of an object."""
    found = Problems()
    data = read_json(file.path.parent, file.name, found)
    problems += found.told()
    if is_building(data):
        yield from records(data)
        return
    if isinstance(data, Mapping):
        data = next((value for value in data.values() if isinstance(value, list)), None)
    if not isinstance(data, list):
        problems += [] if found.told() else [f"{file.name}: holds no array of records; left out."]
        return
    yield from (item for item in data if isinstance(item, dict))


def pack_file(file: SampleFile, most: int | None = None) -> Packed:
    """Index and chunks of a file; of its first `most` trajectories where that is given."""
    packed = Packed(file)
    tasks: dict[str, int] = {}
    waiting = _Waiting()
    for number, record in enumerate(read_records(file, packed.problems)):
        if most is not None and number >= most:
            break
        packed.rows.append(_row(record, file.step, tasks))
        waiting.add(record)
        if waiting.full:
            packed.chunks.append(waiting.close(len(packed.rows)))
    if waiting.texts:
        packed.chunks.append(waiting.close(len(packed.rows)))
    packed.tasks = list(tasks)
    return packed


@dataclass
class _Waiting:
    """A chunk in the making. strings: every text once, by number, as prompts repeat within a group."""

    texts: list[Any] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    strings: dict[str, int] = field(default_factory=dict)
    characters: int = 0

    @property
    def full(self) -> bool:
        return len(self.texts) >= CHUNK_ROWS or self.characters >= CHUNK_CHARACTERS

    def add(self, record: Mapping[str, Any]) -> None:
        self.texts.append(_texts(record, self._refer))
        self.tokens.append("[" + ",".join(_tokens(turn) for turn in _turns(record)) + "]")

    def _refer(self, value: Any) -> int:
        text = _text(value)
        if text not in self.strings:
            self.strings[text] = len(self.strings)
            self.characters += len(text)
        return self.strings[text]

    def close(self, rows: int) -> Chunk:
        first = rows - len(self.texts)
        texts = _gzip(json.dumps({"strings": list(self.strings), "records": self.texts}, separators=_COMPACT))
        tokens = _gzip("[" + ",".join(self.tokens) + "]")
        self.texts, self.tokens, self.strings, self.characters = [], [], {}, 0
        return Chunk(first, texts, tokens)


def _row(record: Mapping[str, Any], step: int, tasks: dict[str, int]) -> list[Any]:
    """[task number, group, member, reward, turns, tokens, flags, step, snippet]."""
    turns = _turns(record)
    task = _text(record["task"] if "task" in record else _question(record))[:500]
    first = next((_text(turn.get("reply")) for turn in turns if turn.get("reply")), "")
    own_step = whole(record.get("step"))
    return [
        tasks.setdefault(task, len(tasks)),
        whole(record.get("group")),
        whole(record.get("member", record.get("sample"))),
        shorter(finite(record.get("reward"))),
        len(turns),
        sum(_length(turn) for turn in turns),
        _flags(record, turns),
        step if own_step is None else own_step,
        " ".join(first[: 4 * SNIPPET].split())[:SNIPPET],
    ]


def _flags(record: Mapping[str, Any], turns: Iterable[Mapping[str, Any]]) -> int:
    flags = ERROR * bool(record.get("error")) | TRUNCATED * bool(record.get("truncated"))
    for turn in turns:
        info = turn.get("info")
        info = info if isinstance(info, Mapping) else {}
        failed = "parsed" in info and info["parsed"] in ("failed", False, None)
        flags |= PARSE_FAILED * failed | FALLBACK * bool(info.get("fallback"))
        flags |= CUT * (turn.get("stop_reason") in ("length", "context"))
    return flags


def _texts(record: Mapping[str, Any], refer: Any) -> dict[str, Any]:
    """What is read of a trajectory; texts as numbers in the chunk's strings."""
    messages = _messages(record)
    parts = record.get("reward_parts")
    answer = record.get("answer")
    return {
        "messages": [[_text(m.get("role"))[:100], refer(m.get("content"))] for m in messages],
        "answer": None if answer is None else refer(answer),
        "error": refer(record["error"]) if record.get("error") else None,
        "ended": "terminated" if record.get("terminated") else "truncated" if record.get("truncated") else None,
        "parts": [[str(k)[:300], shorter(finite(v))] for k, v in list(parts.items())[:200]]
        if isinstance(parts, Mapping)
        else [],
        "turns": [_turn(turn, refer) for turn in _turns(record)],
    }


def _turn(turn: Mapping[str, Any], refer: Any) -> dict[str, Any]:
    info = turn.get("info")
    return {
        "prompt": refer(turn["prompt"]) if turn.get("prompt") else None,
        "reply": refer(turn.get("reply")),
        "stop": _text(turn.get("stop_reason"))[:100],
        "reward": shorter(finite(turn.get("reward"))),
        "restart": bool(turn.get("restart")),
        "info": [[str(k)[:300], refer(v)] for k, v in list(info.items())[:100]] if isinstance(info, Mapping) else [],
    }


def _tokens(turn: Mapping[str, Any]) -> str:
    """Texts, ids and numbers of a reply's tokens as JSON, without columns that are absent or of another length."""
    length = _length(turn)
    parts = [f'"count":{length}']
    pieces, ids = turn.get("tokens"), turn.get("token_ids")
    if isinstance(pieces, list) and len(pieces) == length:
        parts.append(f'"tokens":{json.dumps([_text(piece) for piece in pieces[:TOKENS]], separators=_COMPACT)}')
    if isinstance(ids, list) and len(ids) == length:
        parts.append(f'"ids":{json.dumps([whole(i) for i in ids[:TOKENS]], separators=_COMPACT)}')
    for name in _NUMBERS:
        column = turn.get(name)
        if isinstance(column, list) and len(column) == length and length:
            parts.append(f'"{name}":[{_numbers(column[:TOKENS])}]')
    return "{" + ",".join(parts) + "}"


def _numbers(column: list[Any]) -> str:
    """Numbers with four digits, as the inside of a JSON array; what isn't a finite number is null."""
    try:
        text = ("%.4g," * len(column) % tuple(column))[:-1]  # many times faster than one by one
    except (TypeError, ValueError, OverflowError):
        text = "nan"
    if "n" not in text:
        return text
    return json.dumps([shorter(finite(value), 4) for value in column], separators=_COMPACT)[1:-1]


def _length(turn: Mapping[str, Any]) -> int:
    """Tokens of a reply."""
    for name in ("token_ids", "tokens", "sampled_logprobs"):
        if isinstance(turn.get(name), list) and turn[name]:
            return len(turn[name])
    return 0


def _turns(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = record.get("turns")
    if isinstance(turns, list):
        return [turn for turn in turns if isinstance(turn, Mapping)]
    # A file of prompts and replies, as `sapwood generate` writes it, is a file of single turns.
    prompt = record.get("prompt")
    return [{**record, "prompt": None if isinstance(prompt, list) else prompt}] if "reply" in record else []


def _messages(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages that open a conversation."""
    found = record.get("messages", record.get("prompt"))
    return [message for message in found if isinstance(message, Mapping)] if isinstance(found, list) else []


def _question(record: Mapping[str, Any]) -> Any:
    """What stands for the task of a record that names none: the end of what was asked."""
    messages = _messages(record)
    return messages[-1].get("content") if messages else record.get("prompt")


def _text(value: Any) -> str:
    """A value as text, cut where a page could not hold it."""
    if isinstance(value, str):
        text = value
    elif value is None:
        return ""
    else:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (ValueError, RecursionError):
            text = "(nested too deeply)"
    return text if len(text) <= TEXT else f"{text[:TEXT]}... (cut here: {len(text):,} characters in the file)"


def _gzip(text: str) -> bytes:
    # JSON in ASCII keeps lone surrogates, which UTF-8 has no bytes for.
    return gzip.compress(text.encode("ascii"), 6, mtime=0)


@dataclass(frozen=True)
class Choice:
    """How much of which files goes into a page. most: trajectories of each kept file, None for all of it."""

    kept: tuple[tuple[SampleFile, int | None], ...]
    total: int
    taken: int

    @property
    def sentence(self) -> str:
        """What was left out; "" where nothing was."""
        if self.taken == self.total:
            return ""
        return f"{self.total - self.taken:,} of {self.total:,} trajectories are left out of this page"


def choose(files: list[SampleFile], most: int) -> Choice:
    """At most `most` trajectories of a run: files spread evenly over the steps, first and last before the others.

    Held-out files, which compare models, may take half where there are others too. A file is taken whole where it
    fits; the last one that doesn't is cut.
    """
    counts = {file.path: count(file) for file in files}
    total = sum(counts.values())
    if total <= most:
        return Choice(tuple((file, None) for file in files), total, total)
    held_out = [file for file in files if file.kind == "eval"]
    others = [file for file in files if file.kind != "eval"]
    taken = _fill(held_out, counts, most // 2 if others else most)
    taken |= _fill(others, counts, most - sum(taken.values()))
    # What the others left is given back to the held-out files.
    spare = most - sum(taken.values())
    if spare:
        taken |= _fill(held_out, counts, spare + sum(taken.get(file.path, 0) for file in held_out))
    kept = tuple(
        (file, None if taken[file.path] == counts[file.path] else taken[file.path])
        for file in files
        if taken.get(file.path)
    )
    return Choice(kept, total, sum(taken.values()))


def _fill(files: list[SampleFile], counts: Mapping[Path, int], room: int) -> dict[Path, int]:
    taken: dict[Path, int] = {}
    for number in spread(len(files)):
        path = files[number].path
        if counts[path] == 0:
            continue
        here = min(counts[path], room)
        if here <= 0:
            break
        taken[path] = here
        room -= here
    return taken


def spread(n: int) -> list[int]:
    """0 .. n-1 in an order whose every beginning lies evenly: first, last, middle, quarters ..."""
    if n <= 2:
        return list(range(n))
    order, seen = [0, n - 1], {0, n - 1}
    parts = 2
    while len(order) < n:
        for k in range(1, parts, 2) if parts < 2 * n else range(1, parts):
            at = k * (n - 1) // parts
            if at not in seen:
                seen.add(at)
                order.append(at)
        parts *= 2
    return order
