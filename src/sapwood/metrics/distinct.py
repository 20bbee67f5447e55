"""How varied the replies are: distinct n-grams over all n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from sapwood.metrics import Metric, finished
from sapwood.rewards.diversity import distinct_share, ngrams
from sapwood.types import Group


class Distinct(Metric):
    """distinct-n (arXiv 1510.03055) of the held-out replies.

    over "all" replies together, or over those to each "task", averaged over tasks, which needs several `attempts` to
    say anything: n attempts a task. order: the lengths of n-grams; unit: what they are made of.
    """

    order: tuple[int, ...] = (1, 2)
    over: Literal["all", "task"] = "all"
    unit: Literal["words", "characters", "tokens"] = "words"
    n: int = Field(default=1, ge=1)

    @field_validator("order")
    @classmethod
    def _positive(cls, order: tuple[int, ...]) -> tuple[int, ...]:
        if not order or min(order) < 1:
            raise ValueError(f"order must be at least 1, not {list(order)}")
        return order

    @property
    def attempts(self) -> int:
        """n."""
        return self.n

    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """{"distinct_1": 0..1, "distinct_2": ...}, "distinct_N/task" where over is "task"; {} without an episode."""
        kept = finished(groups)
        if not kept:
            return {}
        return {f"distinct_{order}{'/task' * (self.over == 'task')}": self._share(kept, order) for order in self.order}

    def _share(self, groups: Sequence[Group], order: int) -> float:
        by_task = [[ngrams(t, order, self.unit) for t in group.trajectories] for group in groups]
        if self.over == "all":
            return distinct_share([grams for task in by_task for grams in task])
        return sum(distinct_share(task) for task in by_task) / len(by_task)


PLUGIN = Distinct
