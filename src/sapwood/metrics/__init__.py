"""The contract of an evaluation metric: numbers about held-out groups, beside the reward.

A metric is one file here that sets `PLUGIN`, or "file.py:Name" of anyone's (a class or a plain function), and is named
under `eval.metrics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from sapwood.types import Group


class Metric(BaseModel, ABC):
    """Measures held-out groups; its fields are the options of its entry under `eval.metrics`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def attempts(self) -> int:
        """Rollouts of every held-out task that this metric wants."""
        return 1

    def bind(self, models: Any) -> None:
        """Get ready, once, before the first measurement; models: the run's (sapwood.models.roles.Models)."""

    @abstractmethod
    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """Named numbers about played (and rewarded) groups. Failed trajectories have an `error`."""


def finished(groups: Sequence[Group]) -> list[Group]:
    """The groups without their failed trajectories, and without those that have no other."""
    kept = [Group(group.task, [t for t in group.trajectories if t.error is None]) for group in groups]
    return [group for group in kept if group.trajectories]
