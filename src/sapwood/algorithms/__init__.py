"""The contract of an algorithm: it owns its options, credit and loss, and nothing else.

An algorithm never samples, never sees padding and never divides by anything local: `totals` counts the whole update
over all ranks, so that packing into micro-batches leaves gradient and metrics unchanged. Everything that `loss`
returns is additive: summed over the micro-batches of an update it is the value for the update.

Axis letters: R rows of a micro-batch, S its scored tokens (all rows concatenated, in row order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from sapwood.ops.batch import Forward, LossOutput, Needs, RowBatch, Totals
from sapwood.types import Group, Row

__all__ = ["Algorithm", "Forward", "LearnsFrom", "LossOutput", "Needs", "RowBatch", "Totals"]

#: What a group is: rollouts of a task, one demonstration, a (chosen, rejected) pair, one labelled reply, or a
#: decision of the policy itself that was recorded.
LearnsFrom = Literal["rollouts", "demonstrations", "pairs", "labels", "recordings"]


class Algorithm(BaseModel, ABC):
    """An RL or preference algorithm; its fields are the options of the recipe's `algorithm` section.

    learns_from: what its groups are. Of a pair, member 0 is chosen and member 1 rejected, and the difference of their
    rewards is the margin (0 where the data gives none); a labelled reply is desirable where its reward is positive.
    atomic: the rows of a group are coupled by the loss, so they share a micro-batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learns_from: ClassVar[LearnsFrom] = "rollouts"
    atomic: ClassVar[bool] = False

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

    @property
    def extra_needs(self) -> Needs:
        """What scoring must fill in of the rows that `augment` adds, at least `needs`."""
        return self.needs

    def begin(self, step: int, steps: int) -> dict[str, float]:
        """Set what is scheduled (a clip range, an entropy coefficient) for step 1..steps; returns it for the log."""
        return {}

    def augment(self, rows: Sequence[Row]) -> list[Row]:
        """Rows that are scored along with these but not trained on (KTO's mismatched replies); none by default.

        `credit` gets them after the others, and must leave them out of what it returns.
        """
        return []

    @abstractmethod
    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Fill `advantages` (and `returns`) of the rows; returns the rows to train on and metrics of the batch.

        Rows that can't teach (a group filtered by dynamic sampling, a failed trajectory) are left out.
        """

    @abstractmethod
    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """The loss of a micro-batch, divided by counts of the whole update only."""

    def adapt(self, metrics: Mapping[str, float]) -> bool:
        """See the metrics of one update; True ends the updates of this batch (a target KL, say)."""
        return False

    def finish(self, metrics: Mapping[str, float]) -> None:
        """See the means of a step's metrics; adapts coefficients for the next step."""

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of summed ones (perplexity, explained variance); added before logging.

        A name that starts with "_" is left out of the log: moments that `loss` returns for this method.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Adaptive coefficients to checkpoint; {} if there are none."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
