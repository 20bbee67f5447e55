"""Whether replies have the asked form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import field_validator

from sapwood.rewards import Reward
from sapwood.types import Group, Turn


class Format(Reward):
    """The share of an episode's replies that have the asked form.

    pattern: a regular expression that the whole reply (without surrounding white space) must match. Without one, how
    the environment parsed the reply decides: `accept` lists the values of the step's info["parsed"] that count.
    """

    pattern: str | None = None
    accept: tuple[str, ...] = ("json",)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern

    def needs_world(self) -> str | None:
        """Without a pattern, how the world parsed the reply decides."""
        return None if self.pattern is not None else "format reads what an env parsed, and there is none: give pattern."

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"format": share of well-formed replies in 0..1}; 0 for an episode without a turn."""
        return [[{"format": self._share(t.turns)} for t in group.trajectories] for group in groups]

    def _share(self, turns: Sequence[Turn]) -> float:
        return sum(self._well_formed(turn) for turn in turns) / len(turns) if turns else 0.0

    def _well_formed(self, turn: Turn) -> bool:
        if self.pattern is not None:
            return re.fullmatch(self.pattern, turn.text.strip(), re.DOTALL) is not None
        return turn.info.get("parsed") in self.accept


PLUGIN = Format
