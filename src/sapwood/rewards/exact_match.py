"""Whether the last reply gives the task's answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator

from sapwood.errors import DataError
from sapwood.rewards import Reward
from sapwood.types import Group, Trajectory

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")


class ExactMatch(Reward):
    """1 where what is taken from the last reply equals the task's answer, otherwise 0.

    take: "text" the whole reply without surrounding white space, "last_line" its last non-empty line, "number" the
    last number in it (compared as a number, thousands separators dropped). pattern: a regular expression whose first
    group (or whole match) is taken instead, at its last occurrence. An answer that is a list accepts any of its items.
    """

    take: Literal["text", "last_line", "number"] = "text"
    pattern: str | None = None
    ignore_case: bool = True

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        return checked_pattern(pattern)

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"exact_match": 0.0 or 1.0}. Raises DataError where no task has an answer."""
        check_answers("exact_match", groups)
        return [[{"exact_match": self._match(t)} for t in group.trajectories] for group in groups]

    def _match(self, trajectory: Trajectory) -> float:
        if not trajectory.turns:
            return 0.0
        taken = self._taken(trajectory.turns[-1].text)
        answer = trajectory.task.answer
        answers = answer if isinstance(answer, list | tuple) else [answer]
        return float(taken is not None and any(self._equal(taken, a) for a in answers))

    def _taken(self, text: str) -> str | None:
        if self.pattern is not None:
            found = list(re.finditer(self.pattern, text, re.DOTALL))
            return None if not found else (found[-1].group(1) if found[-1].re.groups else found[-1].group())
        if self.take == "number":
            numbers = _NUMBER.findall(text)
            return numbers[-1] if numbers else None
        lines = text.strip().splitlines()
        return (lines[-1] if lines else "") if self.take == "last_line" else text

    def _equal(self, taken: str | None, answer: object) -> bool:
        if taken is None or answer is None:
            return False
        if self.take == "number":
            found = _NUMBER.fullmatch(str(answer).strip())
            return found is not None and _number(taken) == _number(found.group())
        left, right = taken.strip(), str(answer).strip()
        return left.casefold() == right.casefold() if self.ignore_case else left == right


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def check_answers(name: str, groups: Sequence[Group]) -> None:
    """Refuse groups of which none has an answer: whatever was said would be wrong. Raises DataError."""
    if groups and all(group.task.answer is None for group in groups):
        task = groups[0].task
        where = task.metadata.get("source") or f"task {task.id!r}"
        raise DataError(
            f"reward {name!r} compares with the task's answer, and {where} has none; map the field that holds it "
            "(data.answer or data.output), or choose another reward."
        )


def checked_pattern(pattern: str | None) -> str | None:
    """Refuse a regular expression that doesn't compile (pydantic reports ValueError as a sentence)."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


PLUGIN = ExactMatch
