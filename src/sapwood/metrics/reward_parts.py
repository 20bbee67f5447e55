"""Spread of the rewards, part by part, and the best of several attempts. (Means are logged without asking.)"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from sapwood.metrics import Metric, finished
from sapwood.metrics.pass_at_k import part_of
from sapwood.types import Group


class RewardParts(Metric):
    """Standard deviation of the held-out rewards and what the best of n attempts earns.

    parts: names of reward parts beside the weighted total, all of them unless given; n: attempts a task.
    """

    parts: tuple[str, ...] | None = None
    n: int = Field(default=1, ge=1)

    @property
    def attempts(self) -> int:
        """n."""
        return self.n

    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """For "reward" and every "reward/PART": "NAME/std" over episodes (population), and the mean over tasks of the
        best attempt, "NAME/best". {} without an episode. Raises DataError for a part that no reward gives.
        """
        kept = finished(groups)
        if not kept:
            return {}
        parts = self.parts
        if parts is None:
            parts = tuple(dict.fromkeys(name for g in kept for t in g.trajectories for name in t.reward_parts))
        found: dict[str, float] = {}
        for name, part in (("reward", None), *((f"reward/{part}", part) for part in parts)):
            values = [[part_of(t, part) for t in group.trajectories] for group in kept]
            found[f"{name}/std"] = float(np.std([value for task in values for value in task]))
            found[f"{name}/best"] = float(np.mean([max(task) for task in values]))
        return found


PLUGIN = RewardParts
