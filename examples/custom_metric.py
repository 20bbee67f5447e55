"""Metrics of your own in one file: a function of the held-out replies, or a class that asks for several attempts.

eval:
  metrics:
    - {name: "examples/custom_metric.py:numbers", longest: 4}
    - {name: "examples/custom_metric.py:Agreement", n: 4}

sapwood train examples/custom_reward.yaml
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from sapwood.metrics import Metric, finished
from sapwood.types import Group


def numbers(replies: list[str], rewards: list[float], *, longest: int = 9) -> dict[str, float]:
    """Shares of replies that are nothing but a number of at most `longest` digits, and that earned something."""
    bare = [re.fullmatch(rf"-?[0-9]{{1,{longest}}}", reply.strip()) is not None for reply in replies]
    return {"bare": sum(bare) / len(bare), "paid": sum(reward > 0 for reward in rewards) / len(rewards)}


class Agreement(Metric):
    """Share of the attempts at a task that give its most frequent reply, averaged over tasks."""

    n: int = 4

    @property
    def attempts(self) -> int:
        """n: the rollouts of every held-out task."""
        return self.n

    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """{"agreement": 1 / n .. 1}."""
        shares = []
        for group in finished(groups):
            said = Counter(t.turns[-1].text.strip() for t in group.trajectories if t.turns)
            shares.append(max(said.values(), default=0) / len(group.trajectories))
        return {"agreement": sum(shares) / len(shares)} if shares else {}
