"""GRPO (arXiv 2402.03300) and its relatives: Dr. GRPO, DAPO, GSPO, RLOO, CISPO, SAPO, VESPO are settings of it.

Several attempts at one task are compared with each other, so no critic is needed: an attempt's advantage is its
reward minus that of its siblings. Departures from TRL's trainer: denominators count the whole update over all ranks,
so that packing never changes a gradient; failed and masked trajectories leave the update instead of staying in its
denominators; advantages may be given per turn. docs/algorithms/grpo.md has the equations and every metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sapwood.algorithms import RowBatch
from sapwood.algorithms._policy import Key, PolicyGradient, cut_short, reward_metrics, turn_rewards, without_effect
from sapwood.ops.advantages import Baseline, RewardScale, all_equal, group_relative, returns_to_go
from sapwood.ops.kl import bounded_exp
from sapwood.ops.losses import Level, cispo_loss, clipped_loss, sapo_loss, vespo_loss
from sapwood.types import Group, Row, Trajectory


class GRPO(PolicyGradient):
    """Group-relative policy optimisation. The defaults are GRPO with DAPO's token-level aggregation."""

    group_size: int = Field(
        default=8, description="attempts at each task; at least 2", json_schema_extra={"minimum": 2}
    )
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
    clip_dual: float | None = Field(
        default=None, description="largest ratio where the advantage is negative; None: unbounded"
    )
    sapo_temperature_pos: float = Field(default=1.0, gt=0.0, description="SAPO's gate where the advantage is positive")
    sapo_temperature_neg: float = Field(default=1.05, gt=0.0, description="SAPO's gate elsewhere")
    vespo_pos: tuple[float, float] = Field(default=(2.0, 3.0), description="VESPO's k and lambda where advantages >= 0")
    vespo_neg: tuple[float, float] = Field(default=(3.0, 2.0), description="VESPO's k and lambda elsewhere")

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
        if self.gamma != 1.0 and self.credit_level == "trajectory":
            raise ValueError("gamma has no effect with credit_level: trajectory; set credit_level: turn or gamma: 1.")
        if self.clip_dual is not None and self.surrogate != "clip":
            raise ValueError(f"clip_dual has no effect with surrogate: {self.surrogate}; remove it.")
        if self.clip_dual is not None and self.clip_dual <= 1.0 + self.clip_high:
            raise ValueError(
                f"clip_dual {self.clip_dual} must exceed 1 + clip_high = {1.0 + self.clip_high:g}, "
                "or it would replace the clip."
            )
        clipped, capped = self.surrogate == "clip", self.surrogate in ("clip", "cispo")
        sapo, vespo = self.surrogate == "sapo", self.surrogate == "vespo"
        without_effect(
            self,
            {
                "std_epsilon": (self.scale_rewards != "none", "scale_rewards"),
                "clip_low": (clipped, "surrogate: clip"),
                "clip_high": (capped, "surrogate: clip or cispo"),
                **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), (sapo, "surrogate: sapo")),
                **dict.fromkeys(("vespo_pos", "vespo_neg"), (vespo, "surrogate: vespo")),
            },
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
    def importance_level(self) -> Level:
        """Whether importance ratios are per token or per row."""
        return self.ratio_level

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
            masked = self.mask_truncated and cut_short(groups[row.group].trajectories[row.member])
            if key in advantages and not masked:
                kept.append(replace(row, advantages=self._per_token(advantages[key], row)))
        metrics = reward_metrics(groups) | _signal_metrics(groups, signal)
        if penalties:
            metrics["kl_penalty"] = float(np.mean([float(p.sum()) for p in penalties.values()]))
        return kept, metrics

    # --- credit -------------------------------------------------------------------------------------------------

    def _returns(self, trajectory: Trajectory, member: int, penalty: Tensor | None = None) -> Tensor:
        """What is compared with siblings: the reward [1], or the return from each turn on [T]; less the KL penalty."""
        rewards = torch.from_numpy(turn_rewards(trajectory, member))
        if self.credit_level == "trajectory":
            total = torch.tensor([trajectory.reward], dtype=torch.float64)
            return total if penalty is None else total - penalty.sum()
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
        if not self.kl_in_reward:
            return {}
        penalties: dict[Key, Tensor] = {}
        for row in rows:
            trajectory = groups[row.group].trajectories[row.member]
            if trajectory.error is not None:
                continue
            estimate = self.kl_coef * torch.from_numpy(self._token_kl(row))
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


def _signal_metrics(groups: Sequence[Group], signal: Sequence[bool]) -> dict[str, float]:
    """What there is to compare within groups; see docs/algorithms/grpo.md."""
    metrics = {"no_signal_share": 1.0 - sum(signal) / max(len(groups), 1)}
    within = [[t.reward for t in group.trajectories if t.error is None] for group in groups]
    if not any(within):
        return metrics
    spreads = [float(np.std(values, ddof=1)) for values in within if len(values) > 1]
    return {**metrics, "reward_group_std": float(np.mean(spreads)) if spreads else 0.0}


PLUGIN = GRPO
