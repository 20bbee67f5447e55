"""Rewards of your own in one file: a function for what looks at replies one by one, a class for anything more.

rewards:
  - {name: "examples/custom_reward.py:closeness", scale: 5, weight: 1.0}
  - {name: "examples/custom_reward.py:Concise", words: 12, weight: 0.5}

sapwood train examples/custom_reward.yaml
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sapwood.rewards import Reward
from sapwood.types import Group


def closeness(replies: list[str], answers: list[Any], *, scale: float = 10.0) -> list[float]:
    """1 for the right number, falling to 0 for one that is `scale` off, and 0 without a number.

    `replies` and `answers` are lists with an entry for every reply of the batch; `scale` is an option of the recipe.
    """
    scores = []
    for reply, answer in zip(replies, answers, strict=True):
        numbers = re.findall(r"-?[0-9]{1,9}", reply)
        error = abs(int(numbers[-1]) - float(answer)) if numbers else scale
        scores.append(max(0.0, 1.0 - error / scale))
    return scores


class Concise(Reward):
    """`brief`: 1 up to `words` words, falling to 0 at twice as many; `fresh`: the share of distinct words."""

    words: int = 12

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[group][trajectory]."""
        return [[self._parts(t.turns[-1].text) for t in group.trajectories] for group in groups]

    def _parts(self, reply: str) -> dict[str, float]:
        said = reply.lower().split()
        excess = max(0, len(said) - self.words) / self.words
        return {"brief": max(0.0, 1.0 - excess), "fresh": len(set(said)) / len(said) if said else 0.0}
