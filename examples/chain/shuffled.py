"""The twin of any reward: the same numbers, dealt to the trajectories of a batch at random. Nothing can be learnt.

rewards: [{name: "examples/chain/shuffled.py:Shuffled", of: {name: env}}]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import PrivateAttr

from sapwood import Group, Reward, plugins


class Shuffled(Reward):
    """of: the reward whose scores are dealt anew, with its options. The order is drawn from what was sampled."""

    of: dict[str, Any]
    _inner: Reward = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Make the reward behind it."""
        options = {key: value for key, value in self.of.items() if key != "name"}
        self._inner = plugins.load("reward", self.of["name"]).model_validate(options)

    def bind(self, models: Any) -> None:
        """Pass the run's models on."""
        self._inner.bind(models)

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i]: those of another trajectory of the batch."""
        parts = [member for group in self._inner.score(groups) for member in group]
        tokens = [int(turn.token_ids.sum()) for group in groups for t in group.trajectories for turn in t.turns]
        order = np.random.default_rng(tokens).permutation(len(parts))
        dealt = iter([parts[i] for i in order])
        return [[next(dealt) for _ in group.trajectories] for group in groups]
