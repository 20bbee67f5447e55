"""A soft penalty for overlong replies."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from sapwood.rewards import Reward
from sapwood.types import Group


class Length(Reward):
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), averaged over the replies of an episode.

    With y tokens in a reply: 0 up to free, falling linearly to -1 at limit, and -1 beyond. A reply's end token counts.
    """

    free: int = Field(default=256, ge=0, description="tokens that cost nothing")
    limit: int = Field(default=512, ge=1, description="tokens from which on the penalty is whole")

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.free >= self.limit:
            raise ValueError(f"free ({self.free}) must be below limit ({self.limit})")
        return self

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"length": mean penalty in -1..0}; 0 for an episode without a turn."""
        return [
            [{"length": self._mean([turn.token_ids.size for turn in t.turns])} for t in group.trajectories]
            for group in groups
        ]

    def _mean(self, lengths: Sequence[int]) -> float:
        span = self.limit - self.free
        penalties = [-min(1.0, max(0.0, (length - self.free) / span)) for length in lengths]
        return sum(penalties) / len(penalties) if penalties else 0.0


PLUGIN = Length
