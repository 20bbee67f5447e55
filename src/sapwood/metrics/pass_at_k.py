"""How likely one of k attempts is right: the unbiased pass@k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from sapwood.errors import DataError
from sapwood.metrics import Metric, finished
from sapwood.types import Group, Trajectory


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n attempts, c of them right, include a right one.

    Chen et al. 2021 (arXiv 2107.03374, eq. 1), as the product 1 - prod_{i = n-c+1..n} (1 - k / i). Needs k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right among {n} attempts is not defined")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


class PassAtK(Metric):
    """Mean over tasks of pass@k from n attempts each; an attempt is right where its reward reaches the threshold.

    k: a number or several, the values that are reported; n: attempts a task, the largest k unless given (more give a
    smaller variance); part: the reward part that decides in place of the weighted total. Greedy attempts are all the
    same: set eval.temperature above 0 for k above 1.
    """

    k: tuple[int, ...] = (1,)
    n: int = Field(default=1, ge=1)
    threshold: float = Field(default=1.0, allow_inf_nan=False)
    part: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _enough_attempts(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        ks = data.get("k", (1,))
        ks = tuple(ks) if isinstance(ks, list | tuple) else (ks,)
        n = max((k for k in ks if isinstance(k, int)), default=1)
        return {"n": n, **data, "k": ks}

    @field_validator("k")
    @classmethod
    def _positive(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if not k or min(k) < 1:
            raise ValueError(f"k must be at least 1, not {list(k)}")
        return k

    @model_validator(mode="after")
    def _within_attempts(self) -> PassAtK:
        if max(self.k) > self.n:
            raise ValueError(f"k ({max(self.k)}) is more than the n ({self.n}) attempts of a task: raise n")
        return self

    @property
    def attempts(self) -> int:
        """n."""
        return self.n

    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """{"pass@k": mean in 0..1} for every k. Tasks of which fewer than k attempts finished are left out of it.

        Raises DataError for a part that no reward gives.
        """
        counts = [
            (len(group.trajectories), sum(self._right(t) for t in group.trajectories)) for group in finished(groups)
        ]
        values = {k: [pass_at_k(n, c, k) for n, c in counts if n >= k] for k in self.k}
        return {f"pass@{k}": float(np.mean(found)) for k, found in values.items() if found}

    def _right(self, trajectory: Trajectory) -> bool:
        return part_of(trajectory, self.part) >= self.threshold


def part_of(trajectory: Trajectory, part: str | None) -> float:
    """A named reward part, or the weighted total. Raises DataError for a part that no reward gives."""
    if part is None:
        return trajectory.reward
    if part not in trajectory.reward_parts:
        known = ", ".join(trajectory.reward_parts) or "none"
        raise DataError(f"eval.metrics: no reward gives a part {part!r}; the parts are: {known}.")
    return trajectory.reward_parts[part]


PLUGIN = PassAtK
