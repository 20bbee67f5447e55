"""RLOO (arXiv 2402.14740): REINFORCE with the mean of the other attempts at the task as baseline.

It is GRPO with other defaults: leave-one-out, no scaling, the KL divergence of whole replies in the reward, and the
sum, not the mean, of a reply's log-probabilities. docs/algorithms/rloo.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sapwood.algorithms.grpo import GRPO
from sapwood.ops.advantages import Baseline, RewardScale
from sapwood.ops.kl import KlEstimator
from sapwood.ops.losses import Aggregation


class RLOO(GRPO):
    """REINFORCE leave-one-out: GRPO's options with RLOO's defaults."""

    group_size: int = Field(
        default=4, description="attempts at each task; at least 2", json_schema_extra={"minimum": 2}
    )
    baseline: Baseline = Field(default="loo", description="mean of the other attempts (loo), or of all (mean)")
    scale_rewards: RewardScale = Field(default="none", description="divide advantages by a standard deviation, or not")
    aggregation: Aggregation = Field(
        default="constant", description="constant with length 1: sum over a reply's tokens"
    )
    constant_length: int | None = Field(default=1, ge=1, description="divisor of aggregation: constant")
    kl_coef: float = Field(default=0.05, ge=0.0, description="weight of the KL divergence from the reference policy")
    kl_estimator: KlEstimator = Field(default="k1", description="estimator of the KL divergence from samples")
    kl_in: Literal["loss", "reward"] = Field(
        default="reward", description="take it from the reward, or add it to the loss"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, options: Any) -> Any:
        """The default divisor belongs to the default aggregation; another one has none."""
        if isinstance(options, dict) and options.get("aggregation", "constant") != "constant":
            return {"constant_length": None, **options}
        return options


PLUGIN = RLOO
