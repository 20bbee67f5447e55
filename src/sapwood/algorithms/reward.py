"""Reward models from preference pairs: Bradley-Terry on a scalar head.

docs/algorithms/reward.md has the loss and every metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from sapwood.algorithms import Algorithm, Forward, LearnsFrom, LossOutput, Needs, RowBatch, Totals
from sapwood.ops.preference import Pairs, preference_accuracy, smoothed_sigmoid_loss, whole_pairs
from sapwood.types import Group, Row


class RewardModel(Algorithm):
    """-log sigmoid(r_chosen - r_rejected - margin), r the scalar head at a row's last token."""

    learns_from: ClassVar[LearnsFrom] = "pairs"
    atomic: ClassVar[bool] = True

    margin_coef: float = Field(
        default=1.0, ge=0.0, description="multiplies the margins that the data gives; 0 leaves them out"
    )
    center_rewards_coefficient: float = Field(
        default=0.0, ge=0.0, description="weight of (r_chosen + r_rejected)^2, which keeps rewards around 0"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=0.5, description="probability that the two replies of a pair are swapped"
    )

    @property
    def needs(self) -> Needs:
        """The scalar head only."""
        return Needs(logprobs=False, scores=True, entropies=False)

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Rows of whole pairs. Raises DataError for a group that isn't a pair."""
        kept, incomplete = whole_pairs(rows, len(groups))
        return kept, {"incomplete_share": incomplete}

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """This micro-batch's share of the mean over pairs. forward.scores [R]; the data's margins in batch.rewards."""
        if forward.scores is None:
            raise ValueError("a reward model's loss needs scores from the forward")
        pairs = Pairs.of(batch)
        chosen, rejected = pairs.split(forward.scores)
        wanted, unwanted = pairs.split(batch.rewards)
        per_pair = smoothed_sigmoid_loss(
            chosen - rejected - self.margin_coef * (wanted - unwanted), self.label_smoothing
        )
        per_pair = per_pair + self.center_rewards_coefficient * (chosen + rejected).square()
        metrics = {
            "loss": per_pair,
            "accuracy": preference_accuracy(chosen, rejected),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "_reward_square": 0.5 * (chosen.square() + rejected.square()),
        }
        count = max(totals.groups, 1)
        return LossOutput(per_pair.sum() / count, {k: v.detach().sum() / count for k, v in metrics.items()})

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Standard deviation of all rewards of the update."""
        if "_reward_square" not in metrics:  # a step in which no row could teach
            return {}
        mean = 0.5 * (metrics["reward_chosen"] + metrics["reward_rejected"])
        return {"reward_std": math.sqrt(max(metrics["_reward_square"] - mean * mean, 0.0))}


PLUGIN = RewardModel
