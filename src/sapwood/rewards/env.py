"""What the environment itself paid."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.rewards import Reward
from sapwood.types import Group


class EnvReward(Reward):
    """The undiscounted sum of the rewards of an episode's turns."""

    def needs_world(self) -> str | None:
        """A prompt is no world."""
        return "prompts pay nothing by themselves; give another reward, e.g. exact_match."

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"env": return of trajectory i of group g}."""
        return [[{"env": trajectory.env_return} for trajectory in group.trajectories] for group in groups]


PLUGIN = EnvReward
