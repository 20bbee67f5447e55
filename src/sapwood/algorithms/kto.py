"""Kahneman-Tversky optimisation (arXiv 2402.01306): replies with a label each, desirable or not, in place of pairs.

A reply's implicit reward is judged against a reference point, the KL divergence of policy and reference. It couples
all rows of a batch, so it is estimated in scoring, from replies of the batch put after other prompts of the batch.
docs/algorithms/kto.md has the equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator

from sapwood.algorithms import Algorithm, Forward, LearnsFrom, LossOutput, Needs, RowBatch, Totals
from sapwood.errors import DataError
from sapwood.ops.losses import row_sum
from sapwood.ops.preference import kto_loss
from sapwood.types import Group, Row

MISMATCHED = 1
"""The member of a mismatched row: of the group whose prompt it has; labelled replies are member 0."""


class KTO(Algorithm):
    """Unpaired preferences: raise desirable replies above a reference point and undesirable ones below it."""

    learns_from: ClassVar[LearnsFrom] = "labels"

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto", description="the reference point is the KL divergence from the reference, or 0 (APO)"
    )
    beta: float = Field(default=0.1, gt=0.0, description="strength of the reference's pull")
    desirable_weight: float = Field(default=1.0, ge=0.0, description="weight of desirable replies' losses")
    undesirable_weight: float = Field(default=1.0, ge=0.0, description="weight of undesirable replies' losses")

    # The reference point, whether a batch has estimated it, and the step (0 before the first).
    _kl: float = PrivateAttr(default=0.0)
    _estimated: bool = PrivateAttr(default=False)
    _step: int = PrivateAttr(default=0)

    @model_validator(mode="after")
    def _some_weight(self) -> KTO:
        if self.desirable_weight == self.undesirable_weight == 0.0:
            raise ValueError("desirable_weight and undesirable_weight are both 0, so nothing is learned; raise one.")
        return self

    @property
    def needs(self) -> Needs:
        """The reference."""
        return Needs(reference_logprobs=True)

    @property
    def extra_needs(self) -> Needs:
        """Of mismatched rows the policy before the update too, for the KL divergence."""
        return Needs(old_logprobs=True, reference_logprobs=True)

    def begin(self, step: int, steps: int) -> dict[str, float]:
        """Remember that training has begun."""
        self._step = step
        return {}

    def augment(self, rows: Sequence[Row]) -> list[Row]:
        """Each row's prompt followed by the reply of another row, whose prompt differs; none for apo_zero_unpaired.

        The replies are those of the batch, shifted by as few rows as put the most of them after another prompt. A
        mismatched row is cut to the longest row of the batch, so that no limit on lengths is exceeded.
        """
        if self.loss_type != "kto" or len(rows) < 2:
            return []
        firsts = [int(np.flatnonzero(row.loss_mask)[0]) for row in rows]
        texts = [row.token_ids[:first].tobytes() for row, first in zip(rows, firsts, strict=True)]
        number: dict[bytes, int] = {}
        prompts = np.array([number.setdefault(text, len(number)) for text in texts])
        partner = _partners(prompts)
        longest = max(row.token_ids.size for row in rows)
        return [
            _mismatched(row, firsts[i], rows[j], firsts[j], longest)
            for i, (row, j) in enumerate(zip(rows, partner.tolist(), strict=True))
            if prompts[i] != prompts[j]
        ]

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """The labelled rows; sets the reference point from the mismatched ones.

        A batch without any (a last one of a single prompt) keeps that of the batch before; before the first step it
        is 0, since the policy is the reference. Raises DataError where the first batch trained on has none,
        ValueError for rows that are not scored.
        """
        labelled = [row for row in rows if row.member != MISMATCHED]
        if self.loss_type != "kto":
            return labelled, {}
        mismatched = [row for row in rows if row.member == MISMATCHED]
        if mismatched:
            self._kl = max(float(np.mean([_log_ratio(row) for row in mismatched])), 0.0)
            self._estimated = True
        if self._step and labelled and not self._estimated:
            raise DataError(
                f"KTO compares with replies to other prompts, and this batch of {len(labelled)} has a single prompt: "
                "raise optim.batch_size, shuffle the data, or set algorithm.loss_type=apo_zero_unpaired, which "
                "compares with 0."
            )
        return labelled, {"kl": self._kl}

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """This micro-batch's share of the mean over the update's rows. forward.logprobs [S].

        Raises ValueError where the reference's log-probabilities are missing.
        """
        if batch.reference_logprobs is None:
            raise ValueError("KTO's loss needs reference_logprobs: score the rows first")
        logprobs = row_sum(forward.logprobs, batch.lengths)
        log_ratios = logprobs - row_sum(batch.reference_logprobs, batch.lengths)
        desirable, point = batch.rewards > 0.0, self._kl
        weights = desirable.float() * self.desirable_weight + (~desirable).float() * self.undesirable_weight
        per_row = weights * kto_loss(log_ratios, desirable, point, self.beta)
        good, distance = desirable.float(), log_ratios.detach() - point
        right = 0.5 * (1.0 + (2.0 * good - 1.0) * distance.sign())
        rewards = self.beta * log_ratios
        metrics = {
            "loss": per_row,
            "accuracy": right,
            "desirable_share": good,
            "_reward_chosen": good * rewards,
            "_reward_rejected": (1.0 - good) * rewards,
            "_logprob_chosen": good * logprobs,
            "_logprob_rejected": (1.0 - good) * logprobs,
        }
        count = max(totals.rows, 1)
        means = {name: value.detach().sum() / count for name, value in metrics.items()}
        if forward.entropies is not None:
            means["entropy"] = forward.entropies.detach().sum() / max(totals.tokens, 1)
        return LossOutput(per_row.sum() / count, means)

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Means over the desirable and over the undesirable rows, where there are any."""
        found: dict[str, float] = {}
        if "desirable_share" not in metrics:  # a step in which no row could teach
            return found
        shares = {"chosen": metrics["desirable_share"], "rejected": 1.0 - metrics["desirable_share"]}
        for side, share in shares.items():
            if share > 1e-6:  # the share is a sum in fp32
                found |= {f"{name}_{side}": metrics[f"_{name}_{side}"] / share for name in ("reward", "logprob")}
        if len(found) == 4:
            found["margin"] = found["reward_chosen"] - found["reward_rejected"]
        return found

    def state(self) -> dict[str, Any]:
        """The reference point, for a batch that can't estimate one."""
        return {"kl": self._kl, "estimated": self._estimated}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._kl, self._estimated = state["kl"], state["estimated"]


def _partners(prompts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row [R] the one whose reply it gets: a rotation, so that every reply is used once. prompts [R]: ids."""
    count = len(prompts)
    best, fewest = 1, count + 1
    for shift in range(1, count):
        matched = int((prompts == np.roll(prompts, shift)).sum())
        if matched < fewest:
            best, fewest = shift, matched
        if matched == 0:
            break
    return np.roll(np.arange(count), best)


def _mismatched(row: Row, first: int, other: Row, other_first: int, longest: int) -> Row:
    """The prompt of `row` (its tokens before `first`) and the reply of `other`, at most `longest` tokens."""
    reply = slice(other_first, other_first + longest - first)
    mask = np.concatenate([row.loss_mask[:first], other.loss_mask[reply]])
    return Row(
        token_ids=np.concatenate([row.token_ids[:first], other.token_ids[reply]]),
        loss_mask=mask,
        turn=other.turn[: int(mask.sum())],
        group=row.group,
        member=MISMATCHED,
        temperature=row.temperature,
    )


def _log_ratio(row: Row) -> float:
    if row.old_logprobs is None or row.reference_logprobs is None:
        raise ValueError("KTO's reference point needs old_logprobs and reference_logprobs: score the rows first")
    return float(np.sum(row.old_logprobs.astype(np.float64) - row.reference_logprobs.astype(np.float64)))


PLUGIN = KTO
