"""Public sets -> files that any recipe can name: `sapwood data prepare hh-rlhf|belle|alpaca-chinese`.

A file is written aside, record by record; a note beside it says how far it is whole, so that a run that was killed
goes on from there. It gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from sapwood.data import Progress, Record
from sapwood.data.read import Input, kind_of, resolve
from sapwood.data.section import SourceSection
from sapwood.data.shapes import BadRecord, Normaliser
from sapwood.errors import DataError, StorageError, printable
from sapwood.types import Message

_LAYOUT = 1
_EVERY = 5000  # entries between two notes of how far a file is
_SHOWN = 100  # bad records that the note keeps
_NOTE = ".prepared.json"


@dataclass(frozen=True)
class PublicSet:
    """A set that is known. id: on the hub; splits: those it has; subsets: its folders, of which each is a file.

    file: name of what is written, with {subset} and {split}; shape: what its entries are.
    """

    id: str
    file: str
    shape: str
    splits: tuple[str, ...] = ("train",)
    subsets: tuple[str, ...] = ()


SETS = {
    "hh-rlhf": PublicSet(
        "Anthropic/hh-rlhf",
        "hh_rlhf_{subset}_{split}.json",
        "transcript_pair",
        ("train", "test"),
        ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"),
    ),
    "belle": PublicSet("BelleGroup/train_2M_CN", "belle_sft_{split}.json", "instruction"),
    "alpaca-chinese": PublicSet("shibing624/alpaca-zh", "alpaca_chinese_sft_{split}.json", "instruction"),
}


@dataclass
class Prepared:
    """One file. entries: read of the source; records: written; bad: skipped, the first ones in `problems`.

    key: of the source's content and the options; size: bytes that are whole.
    """

    key: str
    entries: int = 0
    records: int = 0
    bad: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)
    path: str = ""
    already: bool = False


def prepare(
    name: str,
    output: Path,
    *,
    source: Path | None = None,
    max_samples: int | None = None,
    splits: Sequence[str] = (),
    subsets: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Prepared]:
    """Write the files of a public set into `output`; what is complete already is left alone.

    source: a local copy in place of the hub; max_samples: records of each file; splits, subsets: all that the set (or
    the local copy) has unless given. Bad entries are skipped and counted. Raises DataError for a set, split or copy
    that isn't there, StorageError where a file can't be written or would be overwritten.
    """
    if name not in SETS:
        raise DataError(f"{name!r} is no set that can be prepared; known are {', '.join(SETS)}.")
    known = SETS[name]
    for kind, given, allowed in (("split", splits, known.splits), ("subset", subsets, known.subsets)):
        for item in given:
            if item not in allowed:
                raise DataError(f"--{kind} {item}: {name} has {', '.join(allowed) or f'no {kind}s'}.")
    parts = list(_local(known, source, splits, subsets) if source else _hub(known, splits, subsets))
    try:
        output.mkdir(parents=True, exist_ok=True)
        return [_File(output / file, section, max_samples, progress).make() for file, section in parts]
    except OSError as error:
        raise StorageError(
            f"{output}: can't be written ({error.strerror or error}); choose another --output."
        ) from error


def _hub(known: PublicSet, splits: Sequence[str], subsets: Sequence[str]) -> Iterator[tuple[str, SourceSection]]:
    for subset in subsets or known.subsets or (None,):
        for split in splits or known.splits:
            yield (
                known.file.format(subset=subset, split=split),
                _section(known, known.id, format="hub", split=split, subset=subset),
            )


def _local(
    known: PublicSet, copy: Path, splits: Sequence[str], subsets: Sequence[str]
) -> Iterator[tuple[str, SourceSection]]:
    """The files of a local copy: folders as on the hub, one of its folders, or (without subsets) a file."""
    if not copy.exists():
        raise DataError(f"--input {copy}: no such file or folder.")
    if not known.subsets:
        yield known.file.format(split="train"), _section(known, str(copy))
        return
    found = {subset: copy / subset for subset in known.subsets if (copy / subset).is_dir()}
    if copy.name in known.subsets:
        found[copy.name] = copy
    missing = [subset for subset in subsets if subset not in found]
    if missing or not found:
        raise DataError(f"--input {copy}: holds no folder {' or '.join(missing or known.subsets)}; give one that does.")
    for subset, folder in found.items():
        if subsets and subset not in subsets:
            continue
        for split in splits or known.splits:
            files = [file for file in folder.iterdir() if kind_of(file) and file.name.startswith(split)]
            if files:
                path = str(files[0]) if len(files) == 1 else str(folder)
                options = {} if len(files) == 1 else {"split": split}
                yield known.file.format(subset=subset, split=split), _section(known, path, **options)
            elif split in splits:
                raise DataError(f"--input {copy}: {folder} holds no file of the split {split}.")


def _section(known: PublicSet, path: str, **options: Any) -> SourceSection:
    return SourceSection.model_validate({"path": path, "shape": known.shape, **options})


def _plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [asdict(message) for message in messages]


def _pair(record: Record) -> dict[str, Any]:
    chosen, rejected = record.replies
    return {"prompt": _plain(record.prompt), "chosen": _plain(chosen), "rejected": _plain(rejected)}


def _demonstration(record: Record) -> dict[str, Any]:
    return {"prompt": record.prompt[-1].content, "response": record.replies[0][0].content}


_WRITERS: dict[str, Callable[[Record], dict[str, Any]]] = {"transcript_pair": _pair, "instruction": _demonstration}


class _File:
    """One file on its way: `.NAME.part` holds what is whole, `.NAME.state` says how much that is."""

    def __init__(self, path: Path, section: SourceSection, max_samples: int | None, progress: Progress | None) -> None:
        self._path, self._progress = path, progress
        self._part, self._state = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.state")
        self._limit = max_samples
        self._inputs = resolve(section)
        self._normalise = Normaliser(section, None)
        self._write = _WRITERS[section.shape]
        facts = [_LAYOUT, section.shape, max_samples, [item.fingerprint() for item in self._inputs]]
        self._key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def make(self) -> Prepared:
        notes = _read_notes(self._path.parent)
        if self._path.exists():
            if notes.get(self._path.name, {}).get("key") != self._key:
                raise StorageError(
                    f"{self._path} is there already and was made from other data or with other options; remove it or "
                    "choose another --output."
                )
            return self._told(_prepared(notes[self._path.name]), already=True)
        done = self._resumed()
        with self._part.open("r+b" if self._part.exists() else "w+b") as out:
            out.truncate(done.size)
            out.seek(done.size)
            self._copy(out, done)
            out.write(b"\n]\n" if done.records else b"[]\n")
            _sync(out)
        # The note first: a file that is there without one would be taken for someone else's.
        _write_json(self._path.parent / _NOTE, {**notes, self._path.name: _note(done)})
        self._part.rename(self._path)
        self._state.unlink(missing_ok=True)
        return self._told(done, already=False)

    def _told(self, done: Prepared, already: bool) -> Prepared:
        done.path, done.already = str(self._path), already
        return done

    def _resumed(self) -> Prepared:
        """How far an earlier run came, if it was making the same."""
        if self._state.is_file() and self._part.is_file():
            with contextlib.suppress(OSError, ValueError, RecursionError, TypeError):  # a damaged one says nothing
                state = _prepared(json.loads(self._state.read_text()))
                if state.key == self._key and self._part.stat().st_size >= state.size:
                    return state
        return Prepared(self._key)

    def _copy(self, out: IO[bytes], done: Prepared) -> None:
        """Add what is missing; `done` counts along."""
        skip = done.entries
        for seen, (item, number, fields, problem) in enumerate(self._entries(), 1):
            if seen <= skip:
                continue
            if done.records == self._limit:
                return
            done.entries = seen
            if fields is not None:
                try:
                    for record in self._normalise(fields):
                        line = json.dumps(self._write(record), ensure_ascii=False).encode()
                        done.size += out.write((b",\n" if done.records else b"[\n") + line)
                        done.records += 1
                except (BadRecord, UnicodeEncodeError) as error:
                    problem = str(error)
            if problem:
                done.bad += 1
                if len(done.problems) < _SHOWN:
                    done.problems.append(f"{item.where(number)}: {problem}")
            if seen % _EVERY == 0:
                _sync(out)
                _write_json(self._state, _note(done))

    def _entries(self) -> Iterator[tuple[Input, int, dict[str, Any] | None, str]]:
        title = f"preparing {self._path.name}, percent"
        total = max(sum(item.size for item in self._inputs), 1)
        before = 0

        def consumed(done: int) -> None:
            if self._progress is not None:
                self._progress(title, min(100 * (before + done) // total, 99), 100)

        for item in self._inputs:
            for number, fields, problem in item.read(consumed):
                yield item, number, fields, problem
            before += item.size
        if self._progress is not None:
            self._progress(title, 100, 100)


def _note(done: Prepared) -> dict[str, Any]:
    return {name: value for name, value in asdict(done).items() if name not in ("path", "already")}


def _read_notes(folder: Path) -> dict[str, Any]:
    note = folder / _NOTE
    if not note.exists():
        return {}
    try:
        notes = json.loads(note.read_text()) if note.is_file() else None
        if not isinstance(notes, dict):
            raise ValueError("it is no object")
        for told in notes.values():
            _prepared(told)
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise StorageError(
            f"{note}: can't be read ({printable(str(error))}), so it isn't known which files beside it are whole; "
            "remove it with them, or choose another --output."
        ) from error
    return notes


def _prepared(note: Any) -> Prepared:
    """A note read back. Raises TypeError or ValueError for what isn't one."""
    made = Prepared(**note)
    counts = (made.entries, made.records, made.bad, made.size)
    if not isinstance(made.key, str) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("counts and keys are of other types")
    return made


def _write_json(path: Path, data: Any) -> None:
    """Atomically."""
    scratch = path.with_name(f"{path.name}.new")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False, indent=1)
        _sync(file)
    scratch.rename(path)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
