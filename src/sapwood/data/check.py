"""What `sapwood data check` reports: every bad record, repeats, lengths and the mix of languages."""

from __future__ import annotations

import difflib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from sapwood.chat import Chat
from sapwood.data import Progress, Record
from sapwood.data.groups import Grouper
from sapwood.data.section import DataSection, SourceSection
from sapwood.data.store import Store, open_store
from sapwood.data.words import counted
from sapwood.errors import DataError, printable

PERCENTILES = (0, 50, 90, 95, 99, 100)
#: Language or script -> ranges of its letters' code points.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "Latin script": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic script": ((0x400, 0x52F),),
    "Hebrew": ((0x590, 0x5FF),),
    "Arabic script": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)),
    "Devanagari script": ((0x900, 0x97F),),
    "Bengali": ((0x980, 0x9FF),),
    "Tamil": ((0xB80, 0xBFF),),
    "Thai": ((0xE00, 0xE7F),),
    "Korean": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "Japanese": ((0x3041, 0x30FF), (0x31F0, 0x31FF)),
    "Chinese": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
}
_NAMES = (*SCRIPTS, "")
_ENDS = {last + 1: len(SCRIPTS) for ranges in SCRIPTS.values() for _, last in ranges}
_BEGINS = {first: kind for kind, ranges in enumerate(SCRIPTS.values()) for first, _ in ranges}
_EDGES = sorted((_ENDS | _BEGINS).items())  # a range may begin where another one ends
_EDGE_ARRAY = np.array([point for point, _ in _EDGES])
_KIND_ARRAY = np.array([len(SCRIPTS), *(kind for _, kind in _EDGES)])
#: One ideograph or syllable says about as much as three letters.
_WEIGHT = np.array([3.0 if name in ("Korean", "Japanese", "Chinese") else 1.0 for name in SCRIPTS])
_LOOK = 2000  # characters of each message that are looked at
_CLEAR = 0.75  # share of the letters that makes a record one language's


@dataclass
class CheckReport:
    """What is in some files. lengths: "prompt", "reply" and "example" -> [N] in `unit`.

    bad: a sentence for every bad record; repeats: (place, place of the first record with the same content).
    """

    unit: str
    records: int = 0
    bad: list[str] = field(default_factory=list)
    repeats: list[tuple[str, str]] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether no record is bad."""
        return not self.bad

    def percentiles(self) -> dict[str, dict[str, int]]:
        """part -> {"50": tokens ...}; parts that no record has are left out."""
        return {
            part: {str(p): int(np.percentile(found, p, method="higher")) for p in PERCENTILES}
            for part, found in self.lengths.items()
            if found.size
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "records": self.records,
            "bad": self.bad,
            "duplicates": [list(pair) for pair in self.repeats],
            "shapes": dict(self.shapes.most_common()),
            "languages": dict(self.languages.most_common()),
            "unit": self.unit,
            "lengths": self.percentiles(),
        }

    def lines(self, show: int = 5) -> list[str]:
        """The report for a reader; every bad record, the first `show` repeats."""
        lines = [*self.bad, *([""] if self.bad else [])]
        shapes = ", ".join(f"{count:,} {shape}" for shape, count in self.shapes.most_common())
        lines.append(f"{counted(self.records, 'good record')} ({shapes or 'none'}), {len(self.bad):,} bad")
        lines.append(counted(len(self.repeats), "duplicate") + (":" if self.repeats else ""))
        lines += [f"  {place} repeats {first}" for place, first in self.repeats[:show]]
        if len(self.repeats) > show:
            lines.append(f"  and {len(self.repeats) - show:,} more")
        total = max(sum(self.languages.values()), 1)
        mix = [f"{name} {100 * count / total:.1f} %" for name, count in self.languages.most_common()]
        if mix:
            lines.append(f"languages: {', '.join(mix)}")
        names = {"0": "min", "50": "median", "100": "max"}
        head = [names.get(str(p), f"{p} %") for p in PERCENTILES]
        for part, found in self.percentiles().items():
            if head:
                lines.append(f"{'length in ' + self.unit:<22}" + "".join(f"{name:>9}" for name in head))
                head = []
            lines.append(f"  {part:<20}" + "".join(f"{value:>9,}" for value in found.values()))
        return lines


def check(
    paths: Sequence[str],
    options: Mapping[str, Any] | None = None,
    chat: Chat | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read files and say what is in them; lengths are in tokens of `chat`, or in characters without one.

    options: further keys of a source (input, output, shape, split ...), the same for all paths. Raises DataError for
    options that aren't any, and for a path that leads nowhere.
    """
    report = CheckReport("tokens" if chat else "characters")
    lengths = {part: array("q") for part in ("prompt", "reply", "example")}
    stores: list[Store] = []
    grouper = None if chat is None else Grouper(chat, DataSection.model_validate(paths[0]))
    for path in paths:
        source = _source(path, options or {})
        try:
            store = open_store(source, None, skip_bad=True, empty=True, progress=progress)
        except DataError as error:
            report.bad.append(str(error))
            continue
        report.bad += store.report.bad_records()
        if not store.report.read:
            report.bad.append(f"{path}: holds no record.")
        report.shapes.update(store.report.shapes)
        stores.append(store)
        for index in range(len(store)):
            if progress is not None and index % 1000 == 0:
                progress(f"measuring {path}, records", index, len(store) + 1)
            record = store[index]
            try:
                prompt, replies = _lengths(record, grouper)
            except DataError as error:
                report.bad.append(str(error))
                continue
            report.records += 1
            lengths["prompt"].append(prompt)
            lengths["reply"].extend(replies)
            lengths["example"].append(prompt + max(replies, default=0))
            report.languages[language(_texts(record))] += 1
    report.repeats = _repeats(stores)
    report.lengths = {part: np.array(found, np.int64) for part, found in lengths.items()}
    return report


def _source(path: str, options: Mapping[str, Any]) -> SourceSection:
    try:
        return SourceSection.model_validate({"path": path, **options})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, SourceSection.model_fields, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SourceSection.model_fields)}."
            raise DataError(f"{printable(repr(key))} is no key of a data source; {known}") from error
        problem = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        given = printable(repr(first["input"]))
        raise DataError(f"{key}={given}: {problem}." if key else f"{problem}.") from error


def _lengths(record: Record, grouper: Grouper | None) -> tuple[int, list[int]]:
    """(prompt, each reply) in tokens of the chat, or in characters."""
    if grouper is None:
        return sum(len(m.content) for m in record.prompt), [sum(len(m.content) for m in r) for r in record.replies]
    group = grouper.group(record, 0)
    if group is None or not group.trajectories:
        return grouper.chat.start(record.prompt).size, []
    prompt = group.trajectories[0].turns[0].prompt_ids.size
    totals = [sum(t.prompt_ids.size + t.token_ids.size for t in found.turns) for found in group.trajectories]
    return prompt, [total - prompt for total in totals]


def _texts(record: Record) -> str:
    messages = [*record.prompt, *(message for reply in record.replies for message in reply)]
    return " ".join(message.content[:_LOOK] for message in messages if message.role != "system")


def _repeats(stores: Sequence[Store]) -> list[tuple[str, str]]:
    """Records whose content an earlier one has, of the same file or another, in their order."""
    contents = np.concatenate([np.zeros(0, np.uint64), *(store.contents() for store in stores)])
    order = np.argsort(contents, kind="stable")  # equal ones stay in order
    ranked = contents[order]
    repeated = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
    pairs = [(int(order[at]), int(order[np.searchsorted(ranked, ranked[at])])) for at in repeated.tolist()]
    starts = np.cumsum([0, *map(len, stores)]).tolist()

    def where(index: int) -> str:
        store = bisect_right(starts, index) - 1
        return stores[store].where(index - starts[store])

    return [(where(index), where(first)) for index, first in sorted(pairs)]


def language(text: str) -> str:
    """The language or script of a text by its letters alone: a name of `SCRIPTS`, "mixed" or "no letters"."""
    points = np.frombuffer(text.encode("utf-32-le", errors="replace"), np.uint32)
    kinds = _KIND_ARRAY[np.searchsorted(_EDGE_ARRAY, points, side="right")]
    counts = np.bincount(kinds, minlength=len(_NAMES))[:-1] * _WEIGHT
    total = counts.sum()
    if total == 0:
        return "no letters"
    japanese, chinese = _NAMES.index("Japanese"), _NAMES.index("Chinese")
    if counts[japanese] > 0.1 * counts[chinese]:  # Japanese writes ideographs too
        counts[japanese] += counts[chinese]
        counts[chinese] = 0
    best = int(counts.argmax())
    return _NAMES[best] if counts[best] >= _CLEAR * total else "mixed"
