"""GRPO (arXiv 2402.03300) and its relatives: Dr. GRPO, DAPO, GSPO, RLOO, CISPO, SAPO, VESPO are settings of it.

Several attempts at one task are compared with each other, so no critic is needed: an attempt's advantage is its
reward minus that of its siblings. Departures from TRL's trainer: denominators count the whole update over all ranks,
so that packing never changes a gradient; failed and masked trajectories leave the update instead of staying in its
denominators; advantages may be given per turn. docs/algorithms/grpo.md has the equations and every metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sapwood.algorithms import Algorithm, Forward, LossOutput, Needs, RowBatch, Totals
from sapwood.errors import DataError
from sapwood.ops.advantages import Baseline, RewardScale, all_equal, group_relative, returns_to_go
from sapwood.ops.kl import KlEstimator, bounded_exp, kl_estimate
from sapwood.ops.losses import (
    Aggregation,
    GapMode,
    Level,
    aggregate,
    cispo_loss,
    clipped_loss,
    gap_weights,
    log_ratio,
    sapo_loss,
    vespo_loss,
)
from sapwood.types import Group, Row, StopReason, Trajectory

Key = tuple[int, int]  # (group, member)


class GRPO(Algorithm):
    """Group-relative policy optimisation. The defaults are GRPO with DAPO's token-level aggregation."""

    group_size: int = Field(default=8, description="attempts at each task; at least 2")
    baseline: Baseline = Field(
        default="mean", description="what a reward is compared with: mean of the group, or leave-one-out (RLOO)"
    )
    scale_rewards: RewardScale = Field(
        default="group",
        description="divide advantages by the standard deviation of the group or batch, or not (Dr. GRPO)",
    )
    std_epsilon: float = Field(
        default=1e-4, gt=0.0, description="added to that standard deviation (a sample one, n - 1)"
    )
    credit_level: Literal["trajectory", "turn"] = Field(
        default="trajectory",
        description="one advantage for all tokens, or one per turn from the rewards that follow it",
    )
    gamma: float = Field(default=1.0, ge=0.0, le=1.0, description="discount per turn; needs credit_level: turn")
    dynamic_sampling: bool = Field(default=False, description="leave out groups whose rewards are all equal (DAPO)")
    mask_truncated: bool = Field(
        default=False, description="don't train on attempts that a budget cut short; they still count in their group"
    )

    surrogate: Literal["clip", "cispo", "sapo", "vespo"] = Field(
        default="clip", description="PPO's clipped ratio, CISPO's capped weight, SAPO's soft gate, VESPO's soft weight"
    )
    ratio_level: Level = Field(default="token", description="importance ratio per token, or per row (GSPO)")
    clip_low: float = Field(default=0.2, gt=0.0, le=1.0, description="ratios below 1 - clip_low are clipped")
    clip_high: float = Field(default=0.2, gt=0.0, description="ratios above 1 + clip_high are clipped (DAPO: 0.28)")
    clip_dual: float | None = Field(
        default=None, description="largest ratio where the advantage is negative; None: unbounded"
    )
    sapo_temperature_pos: float = Field(default=1.0, gt=0.0, description="SAPO's gate where the advantage is positive")
    sapo_temperature_neg: float = Field(default=1.05, gt=0.0, description="SAPO's gate elsewhere")
    vespo_pos: tuple[float, float] = Field(default=(2.0, 3.0), description="VESPO's k and lambda where advantages >= 0")
    vespo_neg: tuple[float, float] = Field(default=(3.0, 2.0), description="VESPO's k and lambda elsewhere")
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

    @field_validator("group_size")
    @classmethod
    def _siblings(cls, value: int) -> int:
        if value < 2:
            raise ValueError(
                f"group_size {value}: an attempt is compared with the others at the same task, so with fewer than 2 "
                "every advantage is 0 and nothing is learned; use at least 2 (4 to 16 are common)."
            )
        return value

    @model_validator(mode="after")
    def _combinations(self) -> GRPO:
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError(
                "aggregation: constant divides by constant_length; set it, for example to the engine's max_new_tokens."
            )
        if self.aggregation != "constant" and self.constant_length is not None:
            raise ValueError(
                f"constant_length has no effect with aggregation: {self.aggregation}; "
                "remove it or set aggregation: constant."
            )
        if self.gamma != 1.0 and self.credit_level == "trajectory":
            raise ValueError("gamma has no effect with credit_level: trajectory; set credit_level: turn or gamma: 1.")
        if self.clip_dual is not None and self.surrogate != "clip":
            raise ValueError(f"clip_dual has no effect with surrogate: {self.surrogate}; remove it.")
        if self.clip_dual is not None and self.clip_dual <= 1.0 + self.clip_high:
            raise ValueError(
                f"clip_dual {self.clip_dual} must exceed 1 + clip_high = {1.0 + self.clip_high:g}, "
                "or it would replace the clip."
            )
        if self.surrogate == "vespo" and (self.ratio_level == "sequence" or self.gap_correction == "sequence"):
            raise ValueError(
                "surrogate: vespo weights whole rows itself; set ratio_level: token, and gap_correction: token or none."
            )
        return self

    @property
    def attempts(self) -> int:
        """The group size."""
        return self.group_size

    @property
    def resample(self) -> bool:
        """Whether groups that can't teach are replaced (dynamic sampling)."""
        return self.dynamic_sampling

    @property
    def needs(self) -> Needs:
        """Old log-probabilities are scored only where they can differ from those of the training forward."""
        kl_in_reward = self.kl_coef > 0.0 and self.kl_in == "reward"
        return Needs(
            old_logprobs=self.epochs * self.updates > 1 or kl_in_reward,
            reference_logprobs=self.kl_coef > 0.0,
            entropy_grad=self.entropy_coef > 0.0,
        )

    def informative(self, group: Group) -> bool:
        """Whether a group can teach: the returns of its valid trajectories (of some turn) are not all equal."""
        by_turn: dict[int, list[float]] = {}
        for member, trajectory in enumerate(group.trajectories):
            if trajectory.error is None:
                for turn, value in enumerate(self._returns(trajectory, member).tolist()):
                    by_turn.setdefault(turn, []).append(value)
        return any(not all_equal(torch.tensor(values, dtype=torch.float64)) for values in by_turn.values())

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Advantages of the rows' tokens, and metrics of the batch.

        Rows of failed and masked trajectories are left out, and with dynamic sampling those of groups that can't
        teach; the list may be empty. Raises DataError for a reward that is not finite, ValueError where the
        in-reward KL lacks log-probabilities.
        """
        signal = [self.informative(group) for group in groups]
        penalties = self._kl_penalties(groups, rows)
        returns = {
            (g, m): self._returns(trajectory, m, penalties.get((g, m)))
            for g, group in enumerate(groups)
            if signal[g] or not self.dynamic_sampling
            for m, trajectory in enumerate(group.trajectories)
            if trajectory.error is None
        }
        advantages = self._advantages(returns)
        kept = []
        for row in rows:
            key = (row.group, row.member)
            masked = self.mask_truncated and _cut_short(groups[row.group].trajectories[row.member])
            if key in advantages and not masked:
                kept.append(replace(row, advantages=self._per_token(advantages[key], row)))
        metrics = _reward_metrics(groups, signal)
        if penalties:
            metrics["kl_penalty"] = float(np.mean([float(p.sum()) for p in penalties.values()]))
        return kept, metrics

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """Policy loss + kl_coef * KL - entropy_coef * entropy, as this micro-batch's share of the update.

        forward.logprobs [S]; totals count the update. Metrics are means over the update's tokens once summed.
        """
        if batch.advantages is None:
            raise ValueError("GRPO's loss needs advantages: call credit first")
        if batch.old_logprobs is None and self.needs.old_logprobs:
            raise ValueError("several updates a batch need old_logprobs: score the rows first")
        logprobs = forward.logprobs
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        log_ratios = log_ratio(logprobs, old, batch.lengths, self.ratio_level)
        ratio = bounded_exp(log_ratios)
        metrics = self._ratio_metrics(ratio.detach(), (logprobs - old).detach(), batch.advantages)
        weights = self._gap(old, batch, metrics)
        policy = self._surrogate(logprobs, log_ratios, batch, weights)
        total = policy
        if self.kl_coef > 0.0 and self.kl_in == "loss":
            total = policy + self.kl_coef * self._kl(logprobs, ratio, batch, metrics)
        means = {name: value.sum() / max(totals.tokens, 1) for name, value in metrics.items()}
        means["policy_loss"] = self._aggregate(policy.detach(), batch.lengths, totals)
        loss = self._aggregate(total, batch.lengths, totals)
        if forward.entropies is not None:
            entropy = forward.entropies.sum() / max(totals.tokens, 1)
            means["entropy"] = entropy.detach()
            loss = loss - self.entropy_coef * entropy
        elif self.entropy_coef > 0.0:
            raise ValueError("entropy_coef needs entropies from the forward")
        means["loss"] = loss.detach()
        return LossOutput(loss, means)

    # --- credit -------------------------------------------------------------------------------------------------

    def _returns(self, trajectory: Trajectory, member: int, penalty: Tensor | None = None) -> Tensor:
        """What is compared with siblings: the reward [1], or the return from each turn on [T]; less the KL penalty."""
        turns = [turn.reward for turn in trajectory.turns]
        if not all(math.isfinite(value) for value in (trajectory.reward, *turns)):
            raise DataError(
                f"task {trajectory.task.id!r}: trajectory {member} has the reward {trajectory.reward} "
                f"(turns: {turns}); rewards must be finite, so check the environment and the reward functions."
            )
        if self.credit_level == "trajectory":
            total = torch.tensor([trajectory.reward], dtype=torch.float64)
            return total if penalty is None else total - penalty.sum()
        rewards = torch.tensor(turns, dtype=torch.float64)
        if turns:
            rewards[-1] += trajectory.reward - trajectory.env_return
        return returns_to_go(rewards if penalty is None else rewards - penalty, self.gamma)

    def _advantages(self, returns: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Advantages in the shape of the returns; turn t is compared with turn t of the siblings that got there."""
        if not returns:
            return {}
        width = max(len(values) for values in returns.values())
        cells = [torch.arange(len(values)) + group * width for (group, _), values in returns.items()]
        advantages = group_relative(
            torch.cat(list(returns.values())),
            torch.cat(cells),
            baseline=self.baseline,
            scale=self.scale_rewards,
            epsilon=self.std_epsilon,
        )
        return dict(zip(returns, advantages.split([len(values) for values in returns.values()]), strict=True))

    def _per_token(self, advantages: Tensor, row: Row) -> np.ndarray:
        values = advantages.numpy().astype(np.float32)
        return np.full(row.scored, values[0]) if self.credit_level == "trajectory" else values[row.turn]

    def _kl_penalties(self, groups: Sequence[Group], rows: Iterable[Row]) -> dict[Key, Tensor]:
        """kl_coef times the sum of the tokens' KL estimates, per trajectory and turn [T]; {} unless kl_in: reward."""
        if self.kl_coef == 0.0 or self.kl_in == "loss":
            return {}
        penalties: dict[Key, Tensor] = {}
        for row in rows:
            if row.old_logprobs is None or row.reference_logprobs is None:
                raise ValueError("kl_in: reward needs old_logprobs and reference_logprobs: score the rows first")
            trajectory = groups[row.group].trajectories[row.member]
            if trajectory.error is not None:
                continue
            old, reference = torch.from_numpy(row.old_logprobs), torch.from_numpy(row.reference_logprobs)
            estimate = self.kl_coef * kl_estimate(old.double(), reference.double(), self.kl_estimator)
            per_turn = penalties.setdefault(
                (row.group, row.member), torch.zeros(len(trajectory.turns), dtype=torch.float64)
            )
            per_turn.index_add_(0, torch.from_numpy(row.turn).long(), estimate)
        return penalties

    # --- loss ---------------------------------------------------------------------------------------------------

    def _surrogate(self, logprobs: Tensor, log_ratios: Tensor, batch: RowBatch, weights: Tensor | None) -> Tensor:
        """Per-token policy loss [S], gap weights included."""
        assert batch.advantages is not None
        advantages, ratio = batch.advantages, bounded_exp(log_ratios)
        match self.surrogate:
            case "vespo":
                return vespo_loss(
                    logprobs,
                    log_ratios,
                    advantages,
                    batch.lengths,
                    gap_weights=weights,
                    positive=self.vespo_pos,
                    negative=self.vespo_neg,
                )
            case "cispo":
                loss = cispo_loss(logprobs, ratio, advantages, self.clip_high)
            case "sapo":
                loss = sapo_loss(ratio, advantages, self.sapo_temperature_pos, self.sapo_temperature_neg)
            case "clip":
                loss = clipped_loss(ratio, advantages, self.clip_low, self.clip_high, self.clip_dual)
        return loss if weights is None else loss * weights

    def _kl(self, logprobs: Tensor, ratio: Tensor, batch: RowBatch, metrics: dict[str, Tensor]) -> Tensor:
        if batch.reference_logprobs is None:
            raise ValueError("kl_coef needs reference_logprobs: score the rows first")
        kl = kl_estimate(logprobs, batch.reference_logprobs, self.kl_estimator)
        metrics["kl"] = kl.detach()
        return kl * ratio if self.kl_ratio_weight else kl

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
        metrics = {"ratio": ratio, "approx_kl": bounded_exp(log_ratios) - 1.0 - log_ratios}
        high = (ratio > 1.0 + self.clip_high) & (advantages > 0)
        if self.surrogate == "clip":
            metrics["clip_fraction_low"] = ((ratio < 1.0 - self.clip_low) & (advantages < 0)).float()
        if self.surrogate in ("clip", "cispo"):
            metrics["clip_fraction_high"] = high.float()
        if self.clip_dual is not None:
            metrics["clip_fraction_dual"] = ((ratio > self.clip_dual) & (advantages < 0)).float()
        return metrics

    def _aggregate(self, per_token: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        return aggregate(
            per_token,
            lengths,
            self.aggregation,
            tokens=totals.tokens,
            rows=totals.rows,
            constant_length=self.constant_length,
        )


def _cut_short(trajectory: Trajectory) -> bool:
    """Whether a budget ended the trajectory, or the last reply ran out of tokens."""
    last = trajectory.turns[-1].stop_reason if trajectory.turns else None
    return trajectory.truncated or last in (StopReason.LENGTH, StopReason.CONTEXT)


def _reward_metrics(groups: Sequence[Group], signal: Sequence[bool]) -> dict[str, float]:
    """Of all trajectories but failed ones; see docs/algorithms/grpo.md."""
    everyone = [trajectory for group in groups for trajectory in group.trajectories]
    valid = [trajectory for trajectory in everyone if trajectory.error is None]
    metrics = {
        "failed_share": 1.0 - len(valid) / max(len(everyone), 1),
        "no_signal_share": 1.0 - sum(signal) / max(len(groups), 1),
    }
    if not valid:
        return metrics
    rewards = np.array([trajectory.reward for trajectory in valid])
    within = [[t.reward for t in group.trajectories if t.error is None] for group in groups]
    spreads = [float(np.std(values, ddof=1)) for values in within if len(values) > 1]
    metrics |= {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0,
        "reward_group_std": float(np.mean(spreads)) if spreads else 0.0,
        "truncated_share": sum(map(_cut_short, valid)) / len(valid),
    }
    for name in sorted({name for trajectory in valid for name in trajectory.reward_parts}):
        parts = [t.reward_parts[name] for t in valid if name in t.reward_parts]
        metrics[f"reward/{name}"] = float(np.mean(parts))
    return metrics


PLUGIN = GRPO
