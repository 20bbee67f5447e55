"""Direct preference optimisation (arXiv 2305.18290) and its relatives, of which most are another `loss_type`.

A pair's implicit rewards are beta times the replies' log-ratios of policy and reference; the loss raises the chosen
one above the rejected one. SimPO, ORPO and CPO have no reference; KTO, for unpaired labels, is an algorithm of its own
(kto.py). Departures from TRL's trainer: means are over the pairs of the whole update, so packing never changes a
gradient; AOT's sorting is done in scoring, over the whole batch. docs/algorithms/dpo.md has the equations.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor

from sapwood.algorithms import Algorithm, Forward, LearnsFrom, LossOutput, Needs, RowBatch, Totals
from sapwood.ops.losses import row_mean, row_sum
from sapwood.ops.preference import (
    Divergence,
    PairLoss,
    Pairs,
    alphapo_reward,
    divergence_score,
    log_odds,
    pair_loss,
    preference_accuracy,
    shared_weights,
    smoothed_sigmoid_loss,
    whole_pairs,
)
from sapwood.types import Group, Row

LossType = Literal[PairLoss, "aot", "aot_unpaired", "simpo", "orpo"]

SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo")
"""Losses that have a label_smoothing."""
WITH_DIVERGENCE = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop")
"""Losses of the difference of the scores alone: those that f-divergences other than the reverse KL are defined for."""
SORTED = ("aot", "aot_unpaired")
WITHOUT_REFERENCE = ("simpo", "orpo")


_OTHER_NAMES = {
    "cdpo": "loss_type: sigmoid with label_smoothing",
    "sigmoid_norm": "loss_type: sigmoid with length_normalize: true",
    "sft": "sft_coef beside another loss, or algorithm: {name: sft}",
    "rpo": "loss_type: sigmoid with sft_coef",
    "cpo": "loss_type: sigmoid with reference_free: true and sft_coef: 1",
    "slic": "loss_type: hinge",
    "kto": "algorithm: {name: kto}, which takes unpaired labels",
}


def _known(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."


class DPO(Algorithm):
    """Preference pairs without a reward model. The defaults are DPO as published."""

    learns_from: ClassVar[LearnsFrom] = "pairs"
    atomic: ClassVar[bool] = True

    loss_type: LossType | dict[LossType, float] = Field(
        default="sigmoid", description="the loss of a pair, or several with weights: {sigmoid: 0.8, bco_pair: 0.2}"
    )
    beta: float = Field(
        default=0.1, gt=0.0, description="strength of the reference's pull (ipo: tau; orpo: weight of the odds ratio)"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=0.5, description="probability that the two replies of a pair are swapped (cDPO, robust)"
    )
    length_normalize: bool | None = Field(
        default=None, description="divide log-ratios by the replies' lengths; by default for ipo, simpo and orpo only"
    )
    reference_free: bool = Field(default=False, description="compare log-probabilities without a reference (CPO)")
    sft_coef: float = Field(
        default=0.0, ge=0.0, description="weight of the chosen replies' mean negative log-likelihood (RPO, CPO)"
    )
    ld_alpha: float = Field(
        default=1.0, ge=0.0, le=1.0, description="weight of tokens beyond the shorter reply's length (LD-DPO)"
    )
    f_divergence: Divergence = Field(default="reverse_kl", description="divergence from the reference (f-DPO)")
    f_alpha: float = Field(default=0.5, ge=0.0, le=1.0, description="alpha of f_divergence: alpha")
    simpo_gamma: float = Field(
        default=0.5, ge=0.0, description="margin that simpo asks for, as a difference of rewards"
    )
    simpo_alpha: float = Field(default=0.0, description="shape of simpo's reward (AlphaPO); 0: the log-probability")
    discopop_tau: float = Field(default=0.05, gt=0.0, description="temperature of discopop's gate")

    # Of AOT, by group of the batch: what each pair's two log-probabilities are compared with.
    _targets: tuple[Tensor, ...] = PrivateAttr(default=())

    @field_validator("loss_type", mode="before")
    @classmethod
    def _known_losses(cls, value: Any) -> Any:
        known = [name for part in get_args(LossType) for name in (get_args(part) or (part,))]
        for name in value if isinstance(value, dict) else [value]:
            if name not in known:
                other = _OTHER_NAMES.get(str(name))
                raise ValueError(
                    f"unknown loss_type {name!r}: " + (f"use {other}." if other else _known(str(name), known))
                )
        return value

    @model_validator(mode="after")
    def _combinations(self) -> DPO:
        terms = self.terms
        if not terms or not all(weight > 0.0 and math.isfinite(weight) for weight in terms.values()):
            raise ValueError(f"loss_type {self.loss_type}: give at least one loss, with positive finite weights.")
        single = set(terms) & {*SORTED, *WITHOUT_REFERENCE}
        if len(terms) > 1 and single:
            raise ValueError(f"loss_type: {min(single)} can't be mixed with others; use it alone.")
        _refuse(self.label_smoothing != 0.0, "label_smoothing", terms, SMOOTHED)
        _refuse(
            self.f_divergence != "reverse_kl", f"f_divergence: {self.f_divergence}", terms, WITH_DIVERGENCE, every=True
        )
        _refuse(self.simpo_gamma != 0.5, "simpo_gamma", terms, ("simpo",))
        _refuse(self.simpo_alpha != 0.0, "simpo_alpha", terms, ("simpo",))
        _refuse(self.discopop_tau != 0.05, "discopop_tau", terms, ("discopop",))
        if self.f_alpha != 0.5 and self.f_divergence != "alpha":
            raise ValueError(f"f_alpha has no effect with f_divergence: {self.f_divergence}; set f_divergence: alpha.")
        if "exo_pair" in terms and self.label_smoothing == 0.0:
            raise ValueError("loss_type: exo_pair is infinite at label_smoothing: 0; set it, to 0.001 for example.")
        return self._without_reference()

    def _without_reference(self) -> DPO:
        terms = self.terms
        lone = next((name for name in WITHOUT_REFERENCE if name in terms), None)
        if lone and self.reference_free:
            raise ValueError(f"reference_free has no effect with loss_type: {lone}, which has no reference; remove it.")
        if lone and self.length_normalize is False:
            raise ValueError(f"loss_type: {lone} compares mean log-probabilities; remove length_normalize: false.")
        if "orpo" in terms and self.sft_coef != 0.0:
            raise ValueError(
                "sft_coef has no effect with loss_type: orpo, whose weight on the chosen reply's likelihood "
                "is 1; change beta, the weight of the odds ratio."
            )
        if "aot" in terms and self.reference_free:
            raise ValueError("loss_type: aot sorts against the reference; remove reference_free.")
        if self.reference_free and self.f_divergence != "reverse_kl":
            raise ValueError(f"f_divergence: {self.f_divergence} is one from the reference; remove reference_free.")
        if set(terms) & set(SORTED) and self.epochs * self.updates > 1:
            raise ValueError(
                "loss_type: aot and aot_unpaired sort the batch once, in scoring; set epochs and updates to 1."
            )
        return self

    @property
    def terms(self) -> dict[LossType, float]:
        """Weight of each loss."""
        return dict(self.loss_type) if isinstance(self.loss_type, dict) else {self.loss_type: 1.0}

    @property
    def needs(self) -> Needs:
        """The reference unless the loss has none; what AOT sorts is scored too."""
        without = self.reference_free or any(name in WITHOUT_REFERENCE for name in self.terms)
        return Needs(
            old_logprobs=any(name in SORTED for name in self.terms),
            reference_logprobs=not without,
        )

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Rows of whole pairs. Raises DataError for a group that isn't a pair."""
        kept, incomplete = whole_pairs(rows, len(groups))
        self._targets = self._sorted_targets(kept, len(groups)) if self.needs.old_logprobs else ()
        return kept, {"incomplete_share": incomplete}

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """This micro-batch's share of the mean loss over the update's pairs. forward.logprobs [S].

        Raises ValueError where the reference's log-probabilities are needed and missing.
        """
        pairs, lengths = Pairs.of(batch), batch.lengths
        log_ratios = self._sequence(forward.logprobs, lengths, pairs)
        logprobs = pairs.split(log_ratios.detach())
        if self.needs.reference_logprobs:
            if batch.reference_logprobs is None:
                raise ValueError("this loss_type needs reference_logprobs: score the rows first")
            log_ratios = log_ratios - self._sequence(batch.reference_logprobs, lengths, pairs)
        per_pair, chosen, rejected = self._compare(log_ratios, pairs, batch)
        nll = pairs.split(-row_mean(forward.logprobs, lengths))[0]
        sft_coef = 1.0 if "orpo" in self.terms else self.sft_coef
        metrics = {
            "preference_loss": per_pair,
            "accuracy": preference_accuracy(chosen, rejected),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "logprob_chosen": logprobs[0],
            "logprob_rejected": logprobs[1],
            "nll_chosen": nll,
        }
        if sft_coef:
            per_pair = per_pair + sft_coef * nll
        metrics["loss"] = per_pair
        count = max(totals.groups, 1)
        means = {name: value.detach().sum() / count for name, value in metrics.items()}
        if forward.entropies is not None:
            means["entropy"] = forward.entropies.detach().sum() / max(totals.tokens, 1)
        return LossOutput(per_pair.sum() / count, means)

    def _sequence(self, logprobs: Tensor, lengths: Tensor, pairs: Pairs) -> Tensor:
        """Log-probability of each row [R]."""
        if self.ld_alpha != 1.0:
            logprobs = logprobs * shared_weights(lengths, pairs, self.ld_alpha)
        return row_sum(logprobs, lengths)

    def _scores(self, log_ratios: Tensor, kind: LossType, lengths: Tensor) -> Tensor:
        """What `kind` compares [R]."""
        scores = divergence_score(log_ratios, self.f_divergence, self.f_alpha)
        normalize = kind in ("ipo", *WITHOUT_REFERENCE) if self.length_normalize is None else self.length_normalize
        return scores / lengths.clamp(min=1) if normalize else scores

    def _compare(self, log_ratios: Tensor, pairs: Pairs, batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each pair and the implicit rewards of chosen and rejected replies, by the first loss. All [P]."""
        losses, rewards = [], []
        for kind, weight in self.terms.items():
            chosen, rejected = pairs.split(self._scores(log_ratios, kind, batch.lengths))
            if kind == "simpo":
                chosen, rejected = (alphapo_reward(score, self.simpo_alpha) for score in (chosen, rejected))
            rewards.append((self.beta * chosen, self.beta * rejected))
            losses.append(weight * self._loss_of(kind, chosen, rejected, batch.group[pairs.chosen]))
        return torch.stack(losses).sum(0), *rewards[0]

    def _loss_of(self, kind: LossType, chosen: Tensor, rejected: Tensor, group: Tensor) -> Tensor:
        """chosen, rejected [P]: scores; group [P] -> [P]."""
        beta, smoothing = self.beta, self.label_smoothing
        match kind:
            case "simpo":
                return smoothed_sigmoid_loss(beta * (chosen - rejected) - self.simpo_gamma, smoothing)
            case "orpo":
                return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
            case "aot":
                (target,) = (values.to(group.device)[group] for values in self._targets)
                return smoothed_sigmoid_loss(beta * (chosen - rejected - target), smoothing)
            case "aot_unpaired":
                # The two that a rank couples may be in different micro-batches: each side is differentiated against
                # the other's scored value, and the value is shared between them.
                other_rejected, other_chosen = (values.to(group.device)[group] for values in self._targets)
                rises = smoothed_sigmoid_loss(beta * (chosen - other_rejected), smoothing)
                falls = smoothed_sigmoid_loss(beta * (other_chosen - rejected), smoothing)
                return rises + falls - 0.5 * (rises + falls).detach()
            case _:
                return pair_loss(kind, chosen, rejected, beta=beta, smoothing=smoothing, tau=self.discopop_tau)

    def _sorted_targets(self, rows: Sequence[Row], groups: int) -> tuple[Tensor, ...]:
        """Per group [G], of the replies of the same rank over the whole batch (AOT, arXiv 2406.05882).

        aot: correction of the reference's log-ratio of chosen and rejected, from the pair's own to that of the
        policy's rank. aot_unpaired: the rejected score that a chosen one is compared with, and the other way round.
        """
        if not rows:
            return ()
        batch = RowBatch.of(rows)
        if batch.old_logprobs is None:
            raise ValueError("loss_type: aot needs old_logprobs: score the rows first")
        pairs = Pairs.of(batch)
        policy = self._sequence(batch.old_logprobs, batch.lengths, pairs)
        reference = torch.zeros_like(policy)
        if batch.reference_logprobs is not None:
            reference = self._sequence(batch.reference_logprobs, batch.lengths, pairs)
        name = next(iter(self.terms))
        scores, base = (self._scores(values, name, batch.lengths) for values in (policy - reference, reference))
        group = batch.group[pairs.chosen]

        def scatter(values: Tensor) -> Tensor:
            return torch.zeros(groups).index_copy(0, group, values)

        chosen, rejected = pairs.split(scores)
        if name == "aot":
            base_chosen, base_rejected = pairs.split(base)
            own = base_chosen - base_rejected
            rank = (chosen - rejected + own).argsort().argsort()
            return (scatter(own.sort().values[rank] - own),)
        return (
            scatter(rejected.sort().values[chosen.argsort().argsort()]),
            scatter(chosen.sort().values[rejected.argsort().argsort()]),
        )


def _refuse(
    given: bool, option: str, terms: dict[LossType, float], losses: tuple[str, ...], every: bool = False
) -> None:
    """Refuse an option that none of the chosen losses has (`every`: that not all of them have)."""
    having = [name for name in terms if name in losses]
    if given and len(having) < (len(terms) if every else 1):
        without = ", ".join(name for name in terms if name not in losses)
        raise ValueError(
            f"{option} has no effect with loss_type: {without}; remove it, or use one of {', '.join(losses)}."
        )


PLUGIN = DPO
