"""What the policy-gradient algorithms share: the clipped loss with its options, and episodes put together from rows.

Axis letters: S scored tokens of a micro-batch, T scored tokens of an episode (all its rows, in the order of its turns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from sapwood.algorithms import Algorithm, Forward, LossOutput, Needs, RowBatch, Totals
from sapwood.errors import DataError
from sapwood.ops.gae import Doubles
from sapwood.ops.kl import KlEstimator, bounded_exp, kl_estimate
from sapwood.ops.losses import Aggregation, GapMode, Level, aggregate, clipped_loss, gap_weights, log_ratio
from sapwood.types import Group, Row, StopReason, Trajectory

Key = tuple[int, int]  # (group, member)


class PolicyGradient(Algorithm):
    """Options and loss that all of them have: clip, KL to the reference, entropy bonus, sampler correction."""

    clip_low: float = Field(default=0.2, gt=0.0, le=1.0, description="ratios below 1 - clip_low are clipped")
    clip_high: float = Field(default=0.2, gt=0.0, description="ratios above 1 + clip_high are clipped (DAPO: 0.28)")
    aggregation: Aggregation = Field(
        default="token",
        description="mean over tokens (DAPO), over rows' means (GRPO), or by a constant length (Dr. GRPO)",
    )
    constant_length: int | None = Field(
        default=None,
        ge=1,
        description="divisor of aggregation: constant, in tokens per row; usually the longest reply allowed",
    )

    kl_coef: float = Field(default=0.0, ge=0.0, description="weight of the KL divergence from the reference policy")
    kl_estimator: KlEstimator = Field(default="k3", description="estimator of the KL divergence from samples")
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="add it to the loss, or take it from the reward"
    )
    kl_ratio_weight: bool = Field(
        default=True,
        description="multiply the KL term of the loss by the importance ratio (unbiased gradient for k1 and k3)",
    )
    entropy_coef: float = Field(default=0.0, ge=0.0, description="bonus on the mean entropy per token")

    gap_correction: Literal["none", "token", "sequence"] = Field(
        default="none", description="weight tokens, or rows, by trainer over sampler probability"
    )
    gap_mode: GapMode = Field(
        default="truncate", description="weights outside of [gap_floor, gap_cap] are clamped, or set to 0"
    )
    gap_cap: float = Field(default=2.0, ge=1.0, description="largest weight of the gap correction")
    gap_floor: float | None = Field(default=None, ge=0.0, le=1.0, description="smallest weight of the gap correction")

    @model_validator(mode="after")
    def _constant_length(self) -> PolicyGradient:
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError(
                "aggregation: constant divides by constant_length; set it, for example to the engine's max_new_tokens."
            )
        if self.aggregation != "constant" and self.constant_length is not None:
            raise ValueError(
                f"constant_length has no effect with aggregation: {self.aggregation}; "
                "remove it or set aggregation: constant."
            )
        with_kl, corrected = self.kl_coef > 0.0, self.gap_correction != "none"
        without_effect(
            self,
            {
                "kl_in": (with_kl, "a kl_coef"),
                "kl_estimator": (with_kl, "a kl_coef"),
                "kl_ratio_weight": (with_kl and self.kl_in == "loss", "kl_in: loss" if with_kl else "a kl_coef"),
                **dict.fromkeys(("gap_mode", "gap_cap", "gap_floor"), (corrected, "a gap_correction")),
            },
        )
        return self

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """The clip's distances from 1, below and above, as they are at this step."""
        return self.clip_low, self.clip_high

    @property
    def kl_weight(self) -> float:
        """The KL coefficient as it is at this step."""
        return self.kl_coef

    @property
    def entropy_weight(self) -> float:
        """The entropy coefficient as it is at this step."""
        return self.entropy_coef

    @property
    def importance_level(self) -> Level:
        """Whether importance ratios are per token or per row."""
        return "token"

    @property
    def needs(self) -> Needs:
        """Old log-probabilities are scored only where they can differ from those of the training forward."""
        return Needs(
            old_logprobs=self.epochs * self.updates > 1 or self.kl_in_reward,
            reference_logprobs=self.kl_coef > 0.0,
            entropy_grad=self.entropy_coef > 0.0,
        )

    @property
    def kl_in_reward(self) -> bool:
        """Whether a KL penalty is taken from the reward."""
        return self.kl_coef > 0.0 and self.kl_in == "reward"

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """Policy loss + kl_coef * KL - entropy_coef * entropy, as this micro-batch's share of the update.

        forward.logprobs [S]; totals count the update. Metrics are means over the update's tokens once summed.
        """
        if batch.advantages is None:
            raise ValueError(f"{type(self).__name__}'s loss needs advantages: call credit first")
        if batch.old_logprobs is None and self.needs.old_logprobs:
            raise ValueError("several updates a batch need old_logprobs: score the rows first")
        logprobs = forward.logprobs
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        log_ratios = log_ratio(logprobs, old, batch.lengths, self.importance_level)
        metrics = self._ratio_metrics(bounded_exp(log_ratios.detach()), (logprobs - old).detach(), batch.advantages)
        weights = self._gap(old, batch, metrics)
        policy = self._surrogate(logprobs, log_ratios, batch, weights)
        penalty = self._penalty(logprobs, log_ratios, batch, metrics)
        means = {name: value.sum() / max(totals.tokens, 1) for name, value in metrics.items()}
        means["policy_loss"] = self._aggregate(policy.detach(), batch.lengths, totals)
        loss = self._aggregate(policy if penalty is None else policy + penalty, batch.lengths, totals)
        if forward.entropies is not None:
            entropy = forward.entropies.sum() / max(totals.tokens, 1)
            means["entropy"] = entropy.detach()
            loss = loss - self.entropy_weight * entropy
        elif self.entropy_coef > 0.0:
            raise ValueError("entropy_coef needs entropies from the forward")
        means["loss"] = loss.detach()
        return LossOutput(loss, means)

    def _surrogate(self, logprobs: Tensor, log_ratios: Tensor, batch: RowBatch, weights: Tensor | None) -> Tensor:
        """Per-token policy loss [S], gap weights included."""
        assert batch.advantages is not None
        loss = clipped_loss(bounded_exp(log_ratios), batch.advantages, *self.clip_bounds, None)
        return loss if weights is None else loss * weights

    def _penalty(
        self, logprobs: Tensor, log_ratios: Tensor, batch: RowBatch, metrics: dict[str, Tensor]
    ) -> Tensor | None:
        """What is added to the policy loss per token [S]: the weighted KL to the reference, where it is in the loss."""
        if self.kl_coef == 0.0 or self.kl_in == "reward":
            return None
        if batch.reference_logprobs is None:
            raise ValueError("kl_coef needs reference_logprobs: score the rows first")
        kl = kl_estimate(logprobs, batch.reference_logprobs, self.kl_estimator)
        metrics["kl"] = kl.detach()
        return self.kl_weight * (kl * bounded_exp(log_ratios) if self.kl_ratio_weight else kl)

    def _gap(self, old: Tensor, batch: RowBatch, metrics: dict[str, Tensor]) -> Tensor | None:
        """Weights [S] of the gap correction (None without); adds the gap's metrics where the sampler's are known."""
        if batch.sampled_logprobs is None:
            if self.gap_correction != "none":
                raise ValueError("gap_correction needs the sampler's log-probabilities")
            return None
        kept = 0.0 if batch.kept_logmass is None else batch.kept_logmass
        sampler = batch.sampled_logprobs + kept
        metrics["gap_k1"] = kl_estimate(sampler, old, "k1")
        metrics["gap_k3"] = kl_estimate(sampler, old, "k3")
        if self.gap_correction == "none":
            return None
        weights = gap_weights(
            old - sampler,
            batch.lengths,
            level=self.gap_correction,
            mode=self.gap_mode,
            cap=self.gap_cap,
            floor=self.gap_floor,
        )
        metrics["gap_weight"] = weights
        return weights

    def _ratio_metrics(self, ratio: Tensor, log_ratios: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Per token [S]. Clipped means that the clip took the gradient: low where A < 0, high where A > 0."""
        low, high = self.clip_bounds
        return {
            "ratio": ratio,
            "approx_kl": bounded_exp(log_ratios) - 1.0 - log_ratios,
            "clip_fraction_low": ((ratio < 1.0 - low) & (advantages < 0)).float(),
            "clip_fraction_high": ((ratio > 1.0 + high) & (advantages > 0)).float(),
        }

    def _aggregate(self, per_token: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        return aggregate(
            per_token,
            lengths,
            self.aggregation,
            tokens=totals.tokens,
            rows=totals.rows,
            constant_length=self.constant_length,
        )

    def _token_kl(self, row: Row) -> Doubles:
        """Estimate of KL(pi_old, pi_ref) at each scored token of a row [S]."""
        if row.old_logprobs is None or row.reference_logprobs is None:
            raise ValueError("kl_in: reward needs old_logprobs and reference_logprobs: score the rows first")
        old, reference = torch.from_numpy(row.old_logprobs), torch.from_numpy(row.reference_logprobs)
        return kl_estimate(old.double(), reference.double(), self.kl_estimator).numpy()


@dataclass(frozen=True)
class Episode:
    """A trajectory and its rows in the order of its turns: what happened from its first to its last scored token.

    turn [T]: the turn that each token belongs to, never falling.
    """

    key: Key
    trajectory: Trajectory
    rows: tuple[Row, ...]
    turn: np.ndarray

    def joined(self, name: str) -> Doubles:
        """An array of all rows, end to end [T]. Raises ValueError where a row lacks it."""
        arrays = [getattr(row, name) for row in self.rows]
        if any(array is None for array in arrays):
            raise ValueError(f"credit needs {name}: score the rows first")
        return np.concatenate(arrays).astype(np.float64)

    def pay(self, per_turn: Doubles) -> Doubles:
        """Rewards of the trajectory's turns as rewards of tokens [T], each at the last token of its turn.

        A turn without scored tokens is paid at the token before it (at the first one, where it opens the episode).
        """
        paid = np.zeros(len(self.turn))
        last = np.searchsorted(self.turn, np.arange(len(per_turn)), side="right") - 1
        np.add.at(paid, last.clip(min=0), per_turn)
        return paid

    def dealt(self, **arrays: Doubles) -> list[Row]:
        """The rows with these arrays [T] dealt back to them."""
        cuts = np.cumsum([row.scored for row in self.rows])[:-1]
        parts = {name: np.split(values.astype(np.float32), cuts) for name, values in arrays.items()}
        return [replace(row, **{name: split[i] for name, split in parts.items()}) for i, row in enumerate(self.rows)]


def episodes(groups: Sequence[Group], rows: Sequence[Row]) -> list[Episode]:
    """The rows put together to episodes, in the order of their first rows; failed trajectories are left out."""
    by_key: dict[Key, list[Row]] = {}
    for row in rows:
        if row.scored and groups[row.group].trajectories[row.member].error is None:
            by_key.setdefault((row.group, row.member), []).append(row)
    found = []
    for (g, m), parts in by_key.items():
        chain = tuple(sorted(parts, key=lambda row: int(row.turn[0])))
        turn = np.concatenate([row.turn for row in chain])
        found.append(Episode((g, m), groups[g].trajectories[m], chain, turn))
    return found


def turn_rewards(trajectory: Trajectory, member: int) -> Doubles:
    """What each turn is paid: the environment's reward for it; the last one also what the total has beyond these.

    Other rewards, and weights other than 1, are known at the end only. Returns [turns]. Raises
    DataError where one is not finite.
    """
    turns = [turn.reward for turn in trajectory.turns]
    if not all(math.isfinite(value) for value in (trajectory.reward, *turns)):
        raise DataError(
            f"task {trajectory.task.id!r}: trajectory {member} has the reward {trajectory.reward} "
            f"(turns: {turns}); rewards must be finite, so check the environment and the reward functions."
        )
    rewards = np.array(turns, np.float64)
    if turns:
        rewards[-1] += trajectory.reward - trajectory.env_return
    return rewards


def cut_short(trajectory: Trajectory) -> bool:
    """Whether a budget ended the trajectory, or the last reply ran out of tokens."""
    last = trajectory.turns[-1].stop_reason if trajectory.turns else None
    return trajectory.truncated or last in (StopReason.LENGTH, StopReason.CONTEXT)


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Of all trajectories but failed ones: docs/algorithms/grpo.md explains them."""
    everyone = [trajectory for group in groups for trajectory in group.trajectories]
    valid = [trajectory for trajectory in everyone if trajectory.error is None]
    metrics = {"failed_share": 1.0 - len(valid) / max(len(everyone), 1)}
    if not valid:
        return metrics
    rewards = np.array([trajectory.reward for trajectory in valid])
    metrics |= {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0,
        "truncated_share": sum(map(cut_short, valid)) / len(valid),
    }
    for name in sorted({name for trajectory in valid for name in trajectory.reward_parts}):
        parts = [t.reward_parts[name] for t in valid if name in t.reward_parts]
        metrics[f"reward/{name}"] = float(np.mean(parts))
    return metrics


def without_effect(algorithm: Algorithm, conditions: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse options that were changed but do nothing, with a ValueError naming the option (for a pydantic validator).

    conditions: option -> (whether it does something, what it needs to).
    """
    for name, (effective, needed) in conditions.items():
        value: Any = getattr(algorithm, name)
        if not effective and value != type(algorithm).model_fields[name].default:
            raise ValueError(f"{name}: {value} has no effect; set {needed}, or remove it.")
