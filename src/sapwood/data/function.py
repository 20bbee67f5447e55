"""Any Python function as a data source: "file.py:name" in place of a path. It yields records, one mapping each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sapwood import plugins
from sapwood.data.read import Consumed, Entry, Input
from sapwood.data.section import SourceSection
from sapwood.data.words import described
from sapwood.errors import DataError

_EVERY = 2000  # records between two reports of progress


@dataclass
class FunctionInput(Input):
    """The records of a function without arguments, which must end and give the same ones whenever it is called.

    It is run twice where the cache doesn't hold its records: once to know them by their content, once to keep them.
    Raises DataError for what it raises, or where it returns anything but records.
    """

    source: SourceSection

    def __post_init__(self) -> None:
        self.name, self.unit = self.source.path, "item"
        if self.source.split is not None or self.source.subset is not None or self.source.revision is not None:
            raise DataError(f"{self.name}: split, subset and revision are for files and hub sets; remove them.")
        self._function = plugins.load("data", self.source.path)
        if not callable(self._function):
            raise DataError(f"{self.name}: is no function; name one that yields records.")
        digest, self.size = hashlib.sha256(), 0
        for item in self._items():
            self.size += 1
            try:
                digest.update(json.dumps(item, sort_keys=True, default=repr).encode())
            except (TypeError, ValueError) as error:  # keys that are no text, a mapping that holds itself
                raise DataError(
                    f"{self.where(self.size)}: can't be written as JSON ({error}); yield dicts whose keys are text."
                ) from error
        self._digest = digest.hexdigest()

    def fingerprint(self) -> list[Any]:
        """Of all records."""
        return [self.name, self._digest]

    def read(self, consumed: Consumed | None = None) -> Iterator[Entry]:
        """The records, numbered from 1."""
        for number, item in enumerate(self._items(), 1):
            if consumed is not None and number % _EVERY == 0:
                consumed(number)
            if isinstance(item, Mapping):
                yield number, dict(item), ""
            else:
                yield number, None, f"must be a mapping of fields, not {described(item)}; yield a dict a record"

    def _items(self) -> Iterator[Any]:
        what = f"data {self.name!r}"
        made = plugins.call(what, self._function)
        if isinstance(made, str | bytes | Mapping) or not isinstance(made, Iterable):
            raise DataError(f"{what} returned {described(made)}; yield records, or return a list of them.")
        items, end = islice(made, self.source.max_samples), object()
        while (item := plugins.call(what, next, items, end)) is not end:
            yield item
