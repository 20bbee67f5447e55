"""Self-distillation: learn from recorded decisions of the policy itself, PPO's way or as weighted demonstrations.

The recordings were sampled before training and stay the same: the clipped ratio is of the policy to what it was when it
sampled them, by the log-probabilities recorded then, so the clip bounds how far the whole run goes, not one batch of
it. docs/algorithms/distill.md has the equations and every metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from sapwood.algorithms import Algorithm, Forward, LearnsFrom, LossOutput, Needs, RowBatch, Totals
from sapwood.algorithms._policy import without_effect
from sapwood.errors import TrainingStopped
from sapwood.ops.gae import Doubles, whiten
from sapwood.ops.kl import bounded_exp, kl_estimate
from sapwood.ops.losses import Level, aggregate, clipped_loss, log_ratio, value_loss
from sapwood.types import Floats, Group, Row


class Distill(Algorithm):
    """Offline PPO on the model's own kept decisions, or their likelihood weighted by how good they were."""

    learns_from: ClassVar[LearnsFrom] = "recordings"

    loss_type: Literal["clipped", "weighted_sft"] = Field(
        default="clipped",
        description="PPO's clipped surrogate on the recorded probabilities, or likelihood times the advantage",
    )
    ratio_level: Level = Field(default="token", description="importance ratios of tokens, or of whole replies (GSPO)")
    clip_low: float = Field(default=0.2, gt=0.0, le=1.0, description="ratios below 1 - clip_low are clipped")
    clip_high: float = Field(default=0.2, gt=0.0, description="ratios above 1 + clip_high are clipped")
    advantage: Literal["score", "return"] = Field(
        default="score",
        description="of the recording's own ranking, or return - the critic's value, whitened over the step",
    )
    value_coef: float = Field(default=0.5, ge=0.0, description="weight of the value loss; 0 needs no critic")
    value_clip: float | None = Field(
        default=None, gt=0.0, description="how far a value may move from that at the step's start; none: unclipped"
    )
    entropy_coef: float = Field(default=0.01, ge=0.0, description="bonus on the mean entropy per token")
    aggregation: Literal["token", "sequence"] = Field(
        default="token", description="mean over all tokens, or over replies of their means"
    )
    max_gap: float = Field(
        default=0.1,
        gt=0.0,
        description="nats a token by which recorded and own log-probabilities may differ at the start (k3)",
    )

    _step: int = PrivateAttr(default=0)
    _compared: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _combinations(self) -> Distill:
        clipped, with_value = self.loss_type == "clipped", self.value_coef > 0.0
        without_effect(
            self,
            {
                **dict.fromkeys(("ratio_level", "clip_low", "clip_high"), (clipped, "loss_type: clipped")),
                "value_clip": (with_value and self.epochs * self.updates > 1, "a value_coef, and epochs above 1"),
            },
        )
        if self.advantage == "return" and not clipped:
            raise ValueError(
                "loss_type: weighted_sft weighs by scores, which are never negative; advantage: return may be: use "
                "loss_type: clipped, or advantage: score."
            )
        if self.advantage == "return" and not with_value:
            raise ValueError("advantage: return needs a critic that learns: give value_coef.")
        return self

    @property
    def needs(self) -> Needs:
        """A critic where values are learnt; the policy's own log-probabilities once, to compare with the recorded."""
        return Needs(
            old_logprobs=self._step == 1 and not self._compared,
            values=self.value_coef > 0.0,
            entropy_grad=self.entropy_coef > 0.0,
        )

    def begin(self, step: int, steps: int) -> dict[str, float]:
        """Remembers the step: what was recorded is compared with the policy before its first update."""
        self._step = step
        return {}

    def state(self) -> dict[str, Any]:
        """Whether the recording was compared with the policy."""
        return {"compared": self._compared}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._compared = bool(state["compared"])

    # --- credit -------------------------------------------------------------------------------------------------

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Advantages, value targets and recorded log-probabilities of the rows, and metrics of the batch.

        Raises TrainingStopped in the first step where the policy gives the recorded tokens other probabilities.
        """
        if any(row.sampled_logprobs is None for row in rows):  # credited before, and replayed
            return list(rows), {}
        metrics = self._compare(rows)
        info = [groups[row.group].trajectories[row.member].info for row in rows]
        targets = np.array([told["value_target"] for told in info], np.float64)
        advantages = np.array([told["advantage"] for told in info], np.float64)
        if self.advantage == "return":
            # The value of the state is that before the reply's first token. Without a critic, as where only policies
            # are compared, it is 0, the mean of the targets.
            values = np.array([0.0 if row.values is None else row.values[0] for row in rows])
            metrics |= _spread("advantages", targets - values)
            advantages = whiten(targets - values)
        else:
            metrics |= _spread("advantages", advantages)
        if rows and all(row.values is not None for row in rows):
            metrics["values"] = float(np.mean([float(row.values.mean()) for row in rows if row.values is not None]))
            metrics["returns"] = float(targets.mean())
        return [
            self._credited(row, advantage, target)
            for row, advantage, target in zip(rows, advantages.tolist(), targets.tolist(), strict=True)
        ], metrics

    def _credited(self, row: Row, advantage: float, target: float) -> Row:
        """The row with what its loss needs. Weighted demonstrations are learnt at temperature 1, as by SFT."""
        count = row.scored
        return replace(
            row,
            old_logprobs=_recorded(row),
            sampled_logprobs=None,
            kept_logmass=None,
            advantages=np.full(count, advantage, np.float32),
            returns=np.full(count, target, np.float32),
            temperature=row.temperature if self.loss_type == "clipped" else 1.0,
        )

    def _compare(self, rows: Sequence[Row]) -> dict[str, float]:
        """The gap between recording and policy, while the policy is still the one that was recorded."""
        if self._step != 1 or self._compared or not rows:
            return {}
        self._compared = True
        recorded = torch.from_numpy(np.concatenate([_recorded(row) for row in rows]))
        own = torch.from_numpy(np.concatenate([row.old_logprobs for row in rows if row.old_logprobs is not None]))
        if own.shape != recorded.shape:
            raise ValueError("the first step compares recorded and own log-probabilities: score the rows first")
        gap = float(kl_estimate(recorded, own, "k3").mean())
        if not gap <= self.max_gap:
            raise TrainingStopped(
                f"the policy gives the recorded replies other probabilities than were recorded: {gap:.3g} nats a token "
                f"apart (algorithm.max_gap is {self.max_gap:g}), so the recording is of another model, dtype or chat "
                "template. Train the model that made it (model.name, model.init_from, model.dtype), or record this one "
                "with `sapwood pipeline RECIPE --stage rollout`."
            )
        return {"gap_k3": gap, "gap_k1": float(kl_estimate(recorded, own, "k1").mean())}

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """Policy loss + value_coef * value loss - entropy_coef * entropy, as this micro-batch's share of the update.

        forward.logprobs, forward.values [S]; totals count the update. Metrics are means over the update's tokens.
        """
        if batch.advantages is None or batch.old_logprobs is None:
            raise ValueError("the loss needs advantages and recorded log-probabilities: call credit first")
        logprobs, tokens = forward.logprobs, max(totals.tokens, 1)
        per_token, metrics = self._policy_loss(logprobs, batch.old_logprobs, batch.advantages, batch.lengths)
        means = {name: value.sum() / tokens for name, value in metrics.items()}
        loss = self._aggregate(per_token, batch.lengths, totals)
        means["policy_loss"] = loss.detach()
        if forward.values is not None and batch.values is not None and batch.returns is not None:
            value, told = self._value_loss(forward.values, batch.values, batch.returns, batch.lengths, totals)
            loss, means = loss + self.value_coef * value, means | told
        if forward.entropies is not None:
            entropy = forward.entropies.sum() / tokens
            means["entropy"] = entropy.detach()
            if self.entropy_coef > 0.0:
                loss = loss - self.entropy_coef * entropy
        means["loss"] = loss.detach()
        return LossOutput(loss, means)

    def _policy_loss(
        self, logprobs: Tensor, recorded: Tensor, advantages: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-token loss and metrics, all [S]."""
        nll = -logprobs.detach()
        if self.loss_type == "weighted_sft":
            return -advantages * logprobs, {"nll": nll}
        log_ratios = log_ratio(logprobs, recorded, lengths, self.ratio_level)
        ratio, moved = bounded_exp(log_ratios), (logprobs - recorded).detach()
        metrics = {
            "nll": nll,
            "ratio": ratio.detach(),
            "approx_kl": bounded_exp(moved) - 1.0 - moved,
            "clip_fraction_low": ((ratio < 1.0 - self.clip_low) & (advantages < 0)).float(),
            "clip_fraction_high": ((ratio > 1.0 + self.clip_high) & (advantages > 0)).float(),
        }
        return clipped_loss(ratio, advantages, self.clip_low, self.clip_high, None), metrics

    def _value_loss(
        self, values: Tensor, old: Tensor, returns: Tensor, lengths: Tensor, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's error, and moments for its explained variance."""
        tokens = max(totals.tokens, 1)
        errors = value_loss(values, old, returns, self.value_clip)
        value = self._aggregate(errors, lengths, totals)
        metrics = {"value_loss": value.detach()}
        if self.value_clip is not None:
            free = value_loss(values.detach(), old, returns, None)
            metrics["value_clip_fraction"] = (errors.detach() > free).float().sum() / tokens
        # In fp64, because a variance is the small difference of these two.
        for name, x in (("return", returns.double()), ("miss", (returns - old).double())):
            metrics[f"_{name}"], metrics[f"_{name}_squared"] = x.sum() / tokens, x.square().sum() / tokens
        return value, metrics

    def _aggregate(self, per_token: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
        return aggregate(
            per_token, lengths, self.aggregation, tokens=totals.tokens, rows=totals.rows, constant_length=None
        )

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """explained_variance: 1 - Var(R - V_old) / Var(R); left out where all returns are equal."""
        if "_return" not in metrics:
            return {}
        total = metrics["_return_squared"] - metrics["_return"] ** 2
        missed = metrics["_miss_squared"] - metrics["_miss"] ** 2
        return {"explained_variance": 1.0 - missed / total} if total > 1e-12 else {}


def _recorded(row: Row) -> Floats:
    """Log-probabilities [S] of the recorded tokens at their temperature over the whole vocabulary."""
    assert row.sampled_logprobs is not None
    kept = 0.0 if row.kept_logmass is None else row.kept_logmass
    return (row.sampled_logprobs + kept).astype(np.float32)


def _spread(name: str, values: Doubles) -> dict[str, float]:
    """Mean and sample deviation of a batch."""
    if not values.size:
        return {}
    return {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1)) if values.size > 1 else 0.0}


PLUGIN = Distill
