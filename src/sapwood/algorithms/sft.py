"""Supervised fine-tuning: raise the probability of demonstrations.

docs/algorithms/sft.md has the losses and every metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from sapwood.algorithms import Algorithm, Forward, LearnsFrom, LossOutput, Needs, RowBatch, Totals
from sapwood.ops.losses import aggregate
from sapwood.types import Group, Row


class SFT(Algorithm):
    """Negative log-likelihood of the demonstrations' own tokens, or its dynamic variant (DFT)."""

    learns_from: ClassVar[LearnsFrom] = "demonstrations"

    loss_type: Literal["nll", "dft"] = Field(
        default="nll",
        description="negative log-likelihood, or weighted by each token's own probability (DFT, arXiv 2508.05629)",
    )
    aggregation: Literal["token", "sequence"] = Field(
        default="token", description="mean over all tokens, or over rows of their means"
    )

    @property
    def needs(self) -> Needs:
        """Log-probabilities of the training forward, nothing from scoring."""
        return Needs()

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Every row teaches; there is nothing to compare."""
        return list(rows), {}

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """-log pi of every scored token, aggregated: this micro-batch's share. forward.logprobs [S]."""
        nll = -forward.logprobs
        per_token = nll if self.loss_type == "nll" else nll * forward.logprobs.detach().exp()
        loss = aggregate(
            per_token, batch.lengths, self.aggregation, tokens=totals.tokens, rows=totals.rows, constant_length=None
        )
        metrics = {"loss": loss.detach(), "nll": nll.detach().sum() / max(totals.tokens, 1)}
        if forward.entropies is not None:
            metrics["entropy"] = forward.entropies.detach().sum() / max(totals.tokens, 1)
        return LossOutput(loss, metrics)

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Perplexity: exp of the mean negative log-likelihood per token; infinite where that overflows."""
        if "nll" not in metrics:  # a step in which no row could teach
            return {}
        return {"perplexity": math.exp(metrics["nll"]) if metrics["nll"] < 700.0 else math.inf}


PLUGIN = SFT
