"""An algorithm of your own in one file: REINFORCE with a moving baseline, which needs one reply to a prompt.

An algorithm says what it needs, turns rewards into advantages, and gives the loss of a micro-batch. Sampling, packing,
the token tree, clipping and checkpoints are the loop's. All that `loss` returns is divided by counts of the whole
update (`totals`), never by anything of the micro-batch, so that packing never changes a gradient.

    sapwood train examples/custom_algorithm.yaml             # the recipe beside this file
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field, PrivateAttr

from sapwood.algorithms import Algorithm, Forward, LossOutput, Needs, RowBatch, Totals
from sapwood.types import Group, Row


class MovingBaseline(Algorithm):
    """-log pi(token) * (reward - b), b an exponential average of the rewards seen before (Williams 1992)."""

    decay: float = Field(default=0.9, ge=0.0, lt=1.0, description="weight of the past in the baseline")
    entropy_coef: float = Field(default=0.0, ge=0.0, description="bonus on the mean entropy per token")

    _baseline: float | None = PrivateAttr(default=None)

    @property
    def needs(self) -> Needs:
        """Log-probabilities and entropies of the training forward, nothing from scoring."""
        return Needs(entropy_grad=self.entropy_coef > 0)

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Every token of a row gets the row's reward less the baseline, which then takes the batch in."""
        mean = float(np.mean([row.reward for row in rows]))
        baseline = mean if self._baseline is None else self._baseline
        for row in rows:
            row.advantages = np.full(row.scored, row.reward - baseline, np.float32)
        self._baseline = self.decay * baseline + (1.0 - self.decay) * mean
        return list(rows), {"reward": mean, "baseline": baseline}

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """This micro-batch's share of the mean over the update's tokens. forward.logprobs [S]."""
        assert batch.advantages is not None
        assert forward.entropies is not None
        policy_loss = -(forward.logprobs * batch.advantages).sum() / totals.tokens
        entropy = forward.entropies.sum() / totals.tokens
        loss = policy_loss - self.entropy_coef * entropy
        return LossOutput(loss, {"loss": loss.detach(), "entropy": entropy.detach()})

    def state(self) -> dict[str, Any]:
        """The baseline is checkpointed, so that a resumed run goes on with it."""
        return {"baseline": self._baseline}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._baseline = state["baseline"]
