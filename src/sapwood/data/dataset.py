"""`open_data`: the recipe's sources as a training set and a held-out set, split by content and mixed by weight."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapwood.data import LearnsFrom, Progress, Record
from sapwood.data.recordings import RecordingStore, check_section, open_recordings
from sapwood.data.section import DataSection, SourceSection
from sapwood.data.store import SourceReport, Store, open_store
from sapwood.data.words import counted
from sapwood.errors import DataError
from sapwood.types import Message

Indices = NDArray[np.int64]
Rows = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Report:
    """What opening the data found. in_eval: training records left out because their prompt is held out."""

    sources: tuple[SourceReport, ...]
    train: int
    held_out: int
    in_eval: int = 0

    @property
    def read(self) -> int:
        """Entries of all files."""
        return sum(source.read for source in self.sources)

    @property
    def bad(self) -> int:
        """Bad records, which were skipped."""
        return sum(source.bad for source in self.sources)

    @property
    def duplicates(self) -> int:
        """Records that repeat another one of their source; they are kept."""
        return sum(source.duplicates for source in self.sources)

    def bad_records(self) -> Iterator[str]:
        """One sentence for every bad record."""
        for source in self.sources:
            yield from source.bad_records()

    def lines(self, show: int = 5) -> list[str]:
        """What a user should know, with the first bad records."""
        lines = [f"data: {counted(self.train, 'record')} to learn from, {self.held_out:,} held out"]
        for source in self.sources:
            notes = [f"{source.bad:,} bad, skipped"] if source.bad else []
            notes += [f"{count:,} left out: {reason}" for reason, count in source.left_out.items()]
            notes += [counted(source.duplicates, "duplicate")] if source.duplicates else []
            if notes:
                lines.append(f"data: {source.path}: {source.read:,} read; {'; '.join(notes)}")
        if self.in_eval:
            have = counted(self.in_eval, "record has a prompt", "records have a prompt")
            lines.append(f"data: {have} of eval_sources, not learnt from")
        for number, problem in enumerate(self.bad_records()):
            if number == show:
                lines.append(f"data: and {counted(self.bad - show, 'more bad record')}")
                break
            lines.append(f"data: {problem}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data, every bad record included."""
        sources = [
            {
                "path": source.path,
                "read": source.read,
                "kept": source.kept,
                "left_out": source.left_out,
                "duplicates": source.duplicates,
                "shapes": source.shapes,
                "bad": list(source.bad_records()),
            }
            for source in self.sources
        ]
        return {"train": self.train, "held_out": self.held_out, "in_eval": self.in_eval, "sources": sources}


class Dataset:
    """Records by index, decoded from the memory map when asked for.

    stores: one a source; rows: for each of them the positions [N_i] of its records that belong here. weights: shares
    of an epoch, or None for every record once. system: a system message for records without one.
    """

    def __init__(
        self,
        stores: Sequence[Store | RecordingStore],
        rows: Sequence[Rows],
        seed: int,
        report: Report,
        *,
        weights: Sequence[float] | None = None,
        system: str | None = None,
        shuffle: bool = True,
    ) -> None:
        self._stores, self._rows = stores, rows
        self._starts = np.cumsum([0, *(len(part) for part in rows)]).tolist()
        self._seed, self._weights, self._shuffle = seed, weights, shuffle
        self._system = Message("system", system) if system is not None else None
        self.report = report

    @property
    def recordings(self) -> list[RecordingStore]:
        """Those of the stores that hold recorded decisions."""
        return [store for store in self._stores if isinstance(store, RecordingStore)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        source = bisect_right(self._starts, index) - 1
        record = self._stores[source][int(self._rows[source][index - self._starts[source]])]
        if self._system is not None and (not record.prompt or record.prompt[0].role != "system"):
            record = replace(record, prompt=(self._system, *record.prompt))
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def shares(self) -> list[int]:
        """How many records of an epoch come from each source; they sum to len(self)."""
        sizes = [len(part) for part in self._rows]
        if self._weights is None:
            return sizes
        total = sum(weight for weight, size in zip(self._weights, sizes, strict=True) if size)
        exact = [len(self) * weight / total if size else 0.0 for weight, size in zip(self._weights, sizes, strict=True)]
        shares = [int(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
        for index in by_remainder[: len(self) - sum(shares)]:
            shares[index] += 1
        return shares

    def order(self, epoch: int, seed: int | None = None) -> Indices:
        """[len(self)] indices of epoch 0, 1 ...: a function of the arguments and the data's seed alone.

        Without weights an epoch is every record once. With weights each source gives its share, going on through its
        records from where the epoch before stopped, so that none comes again before all of its source have come.
        """
        seed = self._seed if seed is None else seed
        shares = self.shares()
        joined = np.empty(len(self), np.int64)
        at = 0
        for source, share in enumerate(shares):
            joined[at : at + share] = self._walk(source, epoch * share, share, seed)
            joined[at : at + share] += self._starts[source]
            at += share
        if self._shuffle:
            np.random.default_rng([seed, epoch, 1]).shuffle(joined)
        elif self._weights is not None:
            joined = joined[_interleaved(shares)]
        return joined

    def _walk(self, source: int, first: int, count: int, seed: int) -> NDArray[np.integer[Any]]:
        """Positions first .. first + count of an endless walk through a source, lap after lap."""
        size = len(self._rows[source])
        if count == 0:
            return np.zeros(0, np.int64)
        whole = count == size and first % size == 0  # permuted with the epoch
        laps = range(first // size, (first + count - 1) // size + 1)
        walked = [_lap(size, (seed, lap, 2, source) if self._shuffle and not whole else None) for lap in laps]
        joined = walked[0] if len(walked) == 1 else np.concatenate(walked)
        return joined[first % size : first % size + count]


def _lap(size: int, seed: Sequence[int] | None) -> Rows:
    """All positions of a source, in an order drawn from the seed."""
    positions = np.arange(size, dtype=_narrow(size))
    if seed is not None:
        np.random.default_rng(seed).shuffle(positions)
    return positions


def _narrow(size: int) -> type[np.integer[Any]]:
    """The smallest usual type for positions below `size`: half the memory where there are millions."""
    return np.int32 if size < 2**31 else np.int64


def _interleaved(shares: Sequence[int]) -> Indices:
    """An order in which every stretch of an epoch has about the shares of the whole."""
    at = np.concatenate([(np.arange(share) + 0.5) / share for share in shares if share])
    return np.argsort(at, kind="stable")


def open_data(
    section: DataSection, learns_from: LearnsFrom, seed: int, progress: Progress | None = None
) -> tuple[Dataset, Dataset]:
    """The training set and the held-out set (empty where nothing is held out).

    Files are read once and then memory-mapped from the cache. progress(what, done, total) is called while reading.
    Raises DataError for what can't be read, and for bad records unless the section says to skip them.
    """

    def opened(sources: Sequence[SourceSection]) -> Sequence[Store | RecordingStore]:
        limits = _limits(sources, section.max_samples)
        if learns_from == "recordings":
            return open_recordings(sources, limits)
        return [
            open_store(source, learns_from, limit, section.on_bad_record == "skip", progress)
            for source, limit in zip(sources, limits, strict=True)
        ]

    if learns_from == "recordings":
        check_section(section)

    stores = opened(section.sources)
    held_stores = opened(section.eval_sources)
    if held_stores:
        unseen = np.unique(np.concatenate([prompts for store in held_stores for prompts in store.prompts()]))
        train = [_where(np.concatenate([~np.isin(p, unseen) for p in store.prompts()])) for store in stores]
        held = [_lap(len(store), None) for store in held_stores]
        in_eval = sum(len(store) for store in stores) - sum(len(part) for part in train)
    else:
        held_stores, in_eval = stores, 0
        train, held = _split(stores, section.eval_fraction, seed)
    if not any(len(part) for part in train):
        raise DataError(
            "data: no record is left to learn from, all prompts are held out; give more records, lower "
            "data.eval_fraction, or choose other data.eval_sources."
        )
    both = (*stores, *held_stores) if held_stores is not stores else stores
    report = Report(tuple(store.report for store in both), sum(map(len, train)), sum(map(len, held)), in_eval)
    weights = [source.weight for source in section.sources if source.weight is not None] or None
    train_set = Dataset(stores, train, seed, report, weights=weights, system=section.system, shuffle=section.shuffle)
    rng = np.random.default_rng([seed, 3])
    held = [rng.permutation(part) for part in held]  # so that the first few are a fair sample
    return train_set, Dataset(held_stores, held, seed, report, system=section.system, shuffle=section.shuffle)


def _limits(sources: Sequence[SourceSection], total: int | None) -> list[int | None]:
    """How many records to read of each source: its own limit, and its part of the total."""
    limits: list[int | None] = [source.max_samples for source in sources]
    if total is None or not sources:
        return limits
    edges = [total * i // len(sources) for i in range(len(sources) + 1)]
    return [min(own or total, max(high - low, 1)) for own, (low, high) in zip(limits, pairwise(edges), strict=True)]


def _split(stores: Sequence[Store | RecordingStore], fraction: float, seed: int) -> tuple[list[Rows], list[Rows]]:
    """(train, held out) positions of each store: a fraction of the distinct prompts, drawn by their content.

    At least one prompt is held out and one kept where there are two and the fraction isn't 0.
    """
    if fraction == 0:
        return [_lap(len(store), None) for store in stores], [_lap(0, None) for _ in stores]
    draws = [np.concatenate([_draw(prompts, seed) for prompts in store.prompts()]) for store in stores]
    ranked = np.concatenate(draws)
    ranked.sort()
    first_of_its_kind = np.empty(len(ranked), np.bool_)
    first_of_its_kind[0] = True
    np.not_equal(ranked[1:], ranked[:-1], out=first_of_its_kind[1:])
    distinct = int(np.count_nonzero(first_of_its_kind))
    wanted = min(max(round(distinct * fraction), 1), distinct - 1)
    edge = ranked[np.searchsorted(np.cumsum(first_of_its_kind, dtype=_narrow(distinct)), wanted + 1)]
    del ranked, first_of_its_kind
    held = [draw < edge for draw in draws]
    return [_where(~part) for part in held], [_where(part) for part in held]


def _where(chosen: NDArray[np.bool_]) -> Rows:
    """Positions that are true."""
    return np.flatnonzero(chosen).astype(_narrow(len(chosen)))


def _draw(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint32]:
    """[N] numbers drawn by key and seed: the upper half of what SplitMix64's finaliser makes of them."""
    start = np.random.SeedSequence([seed, 4]).generate_state(1, np.uint64)[0]
    mixed = keys ^ start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
