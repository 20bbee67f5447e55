"""A reward of your own in one file: short replies that don't repeat themselves.

A reward scores a whole batch of groups at once and returns named parts, which are weighted and logged one by one.

    rewards: [{name: "examples/custom_reward.py:Concise", words: 12, weight: 0.5}]
"""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.rewards import Reward
from sapwood.types import Group


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
