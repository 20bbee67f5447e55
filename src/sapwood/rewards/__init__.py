"""The contract of a reward: batched, named, weighted and logged part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from sapwood.types import Group


class Reward(BaseModel, ABC):
    """Scores every trajectory of a batch of groups; its fields are the options of its entry under `rewards`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = 1.0

    @abstractmethod
    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i]: named parts of trajectory i of group g, before weighting."""
