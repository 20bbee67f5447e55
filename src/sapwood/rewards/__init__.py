"""The contract of a reward: batched, named, weighted and logged part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from sapwood.types import Group


class Reward(BaseModel, ABC):
    """Scores every trajectory of a batch of groups; its fields are the options of its entry under `rewards`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = 1.0

    def bind(self, models: Any) -> None:
        """Get ready, once, before the first score; models: the run's (sapwood.models.roles.Models).

        For rewards that are models themselves and may share the run's base. Raises SapwoodError where they can't work.
        """

    def needs_world(self) -> str | None:
        """Why it would pay nothing for a single reply to a prompt, without a world; None where it would."""
        return None

    def state(self) -> dict[str, Any]:
        """What outlives a batch (a novelty archive, running moments), to checkpoint: plain data and tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""

    @abstractmethod
    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i]: named parts of trajectory i of group g, before weighting."""
