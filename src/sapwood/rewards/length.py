"""A penalty for long replies: soft beyond a length, or so much for every token, character or word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from sapwood.rewards import Reward
from sapwood.types import Group, Turn

Unit = Literal["tokens", "characters", "words"]


def length_of(turn: Turn, unit: Unit) -> int:
    """Length of a reply. Tokens count its end token, characters and words don't."""
    if unit == "tokens":
        return turn.token_ids.size
    return len(turn.text) if unit == "characters" else len(turn.text.split())


class Length(Reward):
    """A penalty on the length of replies, averaged over those of an episode.

    Without rate, soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 up to `free` units, falling linearly to
    -1 at `limit`, and -1 beyond; free 256 and limit 512 unless given. With rate, -rate * max(0, length - free), which
    has no bound; free is 0 unless given. {rate: 0.01, unit: characters} is -0.01 * len(reply).
    """

    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    free: int = Field(default=256, ge=0, description="units that cost nothing")
    limit: int | None = Field(default=512, ge=1, description="units from which on the soft penalty is whole")
    unit: Unit = "tokens"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_linear_penalty(cls, data: Any) -> Any:
        linear = isinstance(data, Mapping) and data.get("rate") is not None
        return {"free": 0, "limit": None, **data} if linear else data

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.rate is not None and self.limit is not None:
            raise ValueError(f"limit ({self.limit}) has no meaning with rate: remove one of them")
        if self.rate is None and self.limit is None:
            raise ValueError("limit is null: give a number of units, or a rate")
        if self.limit is not None and self.free >= self.limit:
            raise ValueError(f"free ({self.free}) must be below limit ({self.limit})")
        return self

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"length": mean penalty, 0 or less}; 0 for an episode without a turn."""
        return [[{"length": self._mean(t.turns)} for t in group.trajectories] for group in groups]

    def _mean(self, turns: Sequence[Turn]) -> float:
        penalties = [self._penalty(length_of(turn, self.unit)) for turn in turns]
        return sum(penalties) / len(penalties) if penalties else 0.0

    def _penalty(self, length: int) -> float:
        excess = max(0, length - self.free)
        if self.rate is not None or self.limit is None:
            return -(self.rate or 0.0) * excess
        return -min(1.0, excess / (self.limit - self.free))


PLUGIN = Length
