"""The contract of an algorithm: it owns its options, credit and loss, and nothing else.

An algorithm never samples, never sees padding and never divides by anything local: `totals` counts the whole update
over all ranks, so that packing into micro-batches leaves gradient and metrics unchanged. Everything that `loss`
returns is additive: summed over the micro-batches of an update it is the value for the update.

Axis letters: R rows of a micro-batch, S its scored tokens (all rows concatenated, in row order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sapwood.ops.batch import Forward, LossOutput, Needs, RowBatch, Totals
from sapwood.types import Group, Row

__all__ = ["Algorithm", "Forward", "LossOutput", "Needs", "RowBatch", "Totals"]


class Algorithm(BaseModel, ABC):
    """An RL or preference algorithm; its fields are the options of the recipe's `algorithm` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=1, ge=1, description="passes over each batch of rollouts")
    updates: int = Field(default=1, ge=1, description="optimiser steps that each pass is split into")

    @property
    def attempts(self) -> int:
        """Trajectories that a rollout makes of every task."""
        return 1

    @property
    def resample(self) -> bool:
        """Whether groups that aren't `informative` are replaced by further rollouts."""
        return False

    def informative(self, group: Group) -> bool:
        """Whether a group can teach."""
        return True

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What scoring and the forward must provide."""

    @abstractmethod
    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Fill `advantages` (and `returns`) of the rows; returns the rows to train on and metrics of the batch.

        Rows that can't teach (a group filtered by dynamic sampling, a failed trajectory) are left out.
        """

    @abstractmethod
    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """The loss of a micro-batch, divided by counts of the whole update only."""

    def state(self) -> dict[str, Any]:
        """Adaptive coefficients to checkpoint; {} if there are none."""
        return {}
