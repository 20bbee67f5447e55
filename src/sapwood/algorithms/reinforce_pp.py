"""REINFORCE++ (arXiv 2501.03262): PPO's clipped loss without a critic, on advantages normalised over the whole batch.

With `baseline: group` it is the paper's REINFORCE++-baseline: a reward is compared with its siblings' mean first, and
the batch, not the group, gives the scale. docs/algorithms/reinforce_pp.md has the equations and every metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from sapwood.algorithms._policy import Episode, PolicyGradient, episodes, reward_metrics, turn_rewards
from sapwood.ops.gae import Doubles, discounted, whiten
from sapwood.ops.kl import KlEstimator
from sapwood.types import Group, Row


class ReinforcePP(PolicyGradient):
    """REINFORCE++: returns of tokens, KL penalty included, normalised over the batch."""

    group_size: int = Field(default=4, ge=1, description="attempts at each task; baseline: group needs at least 2")
    baseline: Literal["none", "group"] = Field(
        default="none", description="group: returns less their mean over the attempts at the task"
    )
    gamma: float = Field(default=1.0, ge=0.0, le=1.0, description="discount per token; needs baseline: none")
    kl_coef: float = Field(default=0.01, ge=0.0, description="weight of the KL divergence from the reference policy")
    kl_estimator: KlEstimator = Field(default="k1", description="estimator of the KL divergence from samples")
    kl_in: Literal["loss", "reward"] = Field(
        default="reward", description="take it from each token's reward, or add it to the loss"
    )

    @model_validator(mode="after")
    def _combinations(self) -> ReinforcePP:
        if self.baseline == "group" and self.group_size < 2:
            raise ValueError(
                f"group_size {self.group_size}: baseline: group compares an attempt with the others at the same task; "
                "use at least 2, or baseline: none."
            )
        if self.baseline == "group" and self.gamma != 1.0:
            raise ValueError(
                f"gamma {self.gamma}: replies of different length would be discounted differently before they are "
                "compared; use gamma: 1, or baseline: none."
            )
        return self

    @property
    def attempts(self) -> int:
        """The group size."""
        return self.group_size

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Advantages of all rows but those of failed trajectories, and metrics of the batch.

        Raises DataError for a reward that is not finite, ValueError where scores are missing.
        """
        played = episodes(groups, rows)
        metrics = reward_metrics(groups) | {"trajectories": float(len(played))}
        if not played:
            return [], metrics
        returns = self._baselined(played, [self._returns(episode) for episode in played])
        if self.kl_in_reward:
            kl = [np.concatenate([self._token_kl(row) for row in episode.rows]) for episode in played]
            returns = [r - self.kl_coef * discounted(k, self.gamma) for r, k in zip(returns, kl, strict=True)]
            metrics["kl"] = float(np.concatenate(kl).mean())
            metrics["kl_penalty"] = self.kl_coef * float(np.mean([k.sum() for k in kl]))
        advantages = np.concatenate(returns)
        metrics["advantages"] = float(advantages.mean())
        metrics["advantages_std"] = float(advantages.std(ddof=1)) if advantages.size > 1 else 0.0
        parts = np.split(whiten(advantages), np.cumsum([len(r) for r in returns])[:-1])
        dealt = [episode.dealt(advantages=part) for episode, part in zip(played, parts, strict=True)]
        return [row for part in dealt for row in part], metrics

    def _returns(self, episode: Episode) -> Doubles:
        """Discounted return of every token [T], without KL."""
        return discounted(episode.pay(turn_rewards(episode.trajectory, episode.key[1])), self.gamma)

    def _baselined(self, played: Sequence[Episode], returns: list[Doubles]) -> list[Doubles]:
        """Returns less the mean return of the same turn of the attempts at the task that reached it."""
        if self.baseline == "none":
            return returns
        # Undiscounted and paid at the ends of turns, a return is the same for all tokens of a turn.
        siblings: dict[tuple[int, int], list[float]] = {}
        for episode, values in zip(played, returns, strict=True):
            turns, first = np.unique(episode.turn, return_index=True)
            for turn, value in zip(turns.tolist(), values[first].tolist(), strict=True):
                siblings.setdefault((episode.key[0], turn), []).append(value)
        means = {key: float(np.mean(values)) for key, values in siblings.items()}
        return [
            values - np.array([means[episode.key[0], turn] for turn in episode.turn.tolist()])
            for episode, values in zip(played, returns, strict=True)
        ]


PLUGIN = ReinforcePP
