"""A model's reply to powers in -1..1. Never raises, never evaluates, and takes linear time in the reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NoReturn

How = Literal["json", "list", "regex", "failed"]

FALLBACK = 0.0
# Every quantifier is bounded and no two neighbours match the same character, so no reply makes these slow.
_OBJECT = re.compile(r"\{[^{}]{0,4000}\}")
_LIST = re.compile(r"\[[^\[\]{}]{0,4000}\]")
_NUMBER_PATTERN = r"[-+]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][-+]?[0-9]{1,4})?(?!\w|\.\w)"
_NUMBER = re.compile(_NUMBER_PATTERN)
_LABELLED = re.compile(rf"power[\s\"'`*:=]{{1,12}}({_NUMBER_PATTERN})", re.IGNORECASE)
_LABELLED_MANY = re.compile(r"power[\s\"'`*:=]{1,12}[\[(]([^\[\](){}]{0,4000})[\])]", re.IGNORECASE)
_CANDIDATES = 16


@dataclass(frozen=True)
class Parsed:
    """powers: one number a controlled zone, or a single one; how: the form it was read from.

    how == "failed" means that nothing could be read, or that what was read is not a finite number in -1..1, or not
    as many as asked for; powers are then all FALLBACK.
    """

    powers: tuple[float, ...]
    how: How

    @property
    def fallback(self) -> bool:
        """True where `powers` are not the model's."""
        return self.how == "failed"


def parse_reply(reply: str, count: int, *, last: bool = False) -> Parsed:
    """Read `count` powers from a reply.

    Tried in this order: an object with the key "power" (`json`), a bare list (`list`), the word power followed by
    numbers, or a reply that is a number and nothing else (`regex`). The first form that is there decides: an answer
    out of range is failed, never clipped and never replaced by a later guess. Of several answers of a form the
    first counts, or with `last` (replies that reason before they answer) the last.
    """
    for how, find in _FORMS:
        found = find(reply, count, last)
        if found is None:
            continue
        if len(found) == count and all(math.isfinite(x) and -1.0 <= x <= 1.0 for x in found):
            return Parsed(tuple(x + 0.0 for x in found), how)  # + 0.0: no minus zero
        break
    return Parsed((FALLBACK,) * count, "failed")


def _pick(pattern: re.Pattern[str], text: str, last: bool) -> list[re.Match[str]]:
    """Matches to try, best first."""
    if last:
        matches = list(pattern.finditer(text, max(0, len(text) - 50_000)))
        return matches[: -_CANDIDATES - 1 : -1]
    return list(islice(pattern.finditer(text), _CANDIDATES))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _decode(text: str) -> object:
    """The JSON value, or None where it is none; NaN and Infinity are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _numbers(value: object) -> list[float] | None:
    """A number or a list of numbers as floats; a value that isn't one counts as NaN, so that it is refused."""
    values: Sequence[object] = value if isinstance(value, list) else [value]
    return [_number(v) for v in values]


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _from_object(reply: str, count: int, last: bool) -> list[float] | None:
    for match in _pick(_OBJECT, reply, last):
        value = _decode(match.group())
        if isinstance(value, dict) and "power" in value:
            return _numbers(value["power"])
    return None


def _from_list(reply: str, count: int, last: bool) -> list[float] | None:
    for match in _pick(_LIST, reply, last):
        value = _decode(match.group())
        if isinstance(value, list):
            return _numbers(value)
    return None


def _from_words(reply: str, count: int, last: bool) -> list[float] | None:
    for match in _pick(_LABELLED_MANY, reply, last):
        return [float(x) for x in _NUMBER.findall(match.group(1))]
    for match in _pick(_LABELLED, reply, last):
        return [float(match.group(1))]
    alone = reply.strip() if len(reply) < 200 else ""
    return [float(alone)] if _NUMBER.fullmatch(alone) else None


_FORMS: tuple[tuple[How, Callable[[str, int, bool], list[float] | None]], ...] = (
    ("json", _from_object),
    ("list", _from_list),
    ("regex", _from_words),
)
