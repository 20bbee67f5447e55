"""What Stable-Baselines3 is given by stage `ppo`: scaled observations, and a look at the training between rollouts.

Apart from `ppo.py` so that only training imports torch and Stable-Baselines3. `PPO.load` of a `ppo_final.zip` finds
`Scaled` here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

#: Names in a row of the curve, and Stable-Baselines3's.
_LOGGED = {
    "policy_loss": "train/policy_gradient_loss",
    "value_loss": "train/value_loss",
    "approx_kl": "train/approx_kl",
    "clip_fraction": "train/clip_fraction",
    "explained_variance": "train/explained_variance",
    "std": "train/std",
}


class Scaled(BaseFeaturesExtractor):
    """(observation - mean) / scale, cut at +-clip, inside the policy: a loaded file takes plain observations."""

    def __init__(
        self, observation_space: gym.spaces.Box, mean: Sequence[float], scale: Sequence[float], clip: float
    ) -> None:
        super().__init__(observation_space, features_dim=len(mean))
        self.clip = clip
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, observations: Tensor) -> Tensor:
        """Observations [S, n + 4], scaled."""
        return ((observations - self.mean) / self.scale).clamp(-self.clip, self.clip)  # pyright: ignore[reportOperatorIssue]


class Between(BaseCallback):
    """Calls `began` once, `between(model, row)` before each rollout and at the end, and `asked` at every step.

    row: what the rollout and the update before it gave; None before the first.
    """

    def __init__(
        self,
        began: Callable[[], None],
        between: Callable[[Any, dict[str, float | int | None] | None], None],
        asked: Callable[[], None],
    ) -> None:
        super().__init__()
        self._began, self._between, self._asked = began, between, asked
        self._returns: list[float] = []
        self._seen: int | None = None

    def _on_training_start(self) -> None:
        self._began()

    def _on_rollout_start(self) -> None:
        self._tell()

    def _on_training_end(self) -> None:
        self._tell()

    def _tell(self) -> None:
        row = None if self._seen is None else self._row()
        self._seen = self.num_timesteps
        self._returns = []
        self._between(self.model, row)

    def _row(self) -> dict[str, float | int | None]:
        found = self.model.logger.name_to_value
        numbers = {name: float(found[key]) if key in found else None for name, key in _LOGGED.items()}
        entropy = found.get("train/entropy_loss")
        return {
            "steps": self.model.num_timesteps,
            "return": float(np.mean(self._returns)) if self._returns else None,
            "entropy": None if entropy is None else -float(entropy),
            **numbers,
        }

    def _on_step(self) -> bool:
        self._returns += [info["return"] for info in self.locals["infos"] if "return" in info]
        self._asked()
        return True
