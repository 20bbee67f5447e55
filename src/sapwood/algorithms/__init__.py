"""The contract of an algorithm: it owns its options, credit and loss, and nothing else.

An algorithm never samples, never sees padding and never divides by anything local: `totals` counts the whole update
over all ranks, so that packing into micro-batches leaves gradient and metrics unchanged. Everything that `loss`
returns is additive: summed over the micro-batches of an update it is the value for the update.

Axis letters: R rows of a micro-batch, S its scored tokens (all rows concatenated, in row order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sapwood.types import Group, Row


@dataclass(frozen=True)
class Needs:
    """What scoring must fill in before `credit`, and what the training forward must return."""

    old_logprobs: bool = False
    reference_logprobs: bool = False
    values: bool = False
    entropy_grad: bool = False  # entropies in the training forward carry a gradient


@dataclass(frozen=True)
class Totals:
    """Counts of one update (one optimiser step), over all ranks: scored tokens, rows and groups."""

    tokens: int
    rows: int
    groups: int

    @staticmethod
    def of(rows: Sequence[Row]) -> Totals:
        """Counts of these rows; rows without scored tokens count as rows."""
        return Totals(sum(row.scored for row in rows), len(rows), len({row.group for row in rows}))


@dataclass(frozen=True)
class Forward:
    """The training forward of a micro-batch. logprobs [S], entropies [S] (None unless computed), values [S] or None.

    Log-probabilities and entropies use logits divided by the row's temperature, over the full vocabulary, in fp32.
    """

    logprobs: Tensor
    entropies: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class RowBatch:
    """The scored tokens of a micro-batch, concatenated in row order. row [S]: index of each token's row; the rest [S].

    lengths [R]: scored tokens of each row. Arrays that a row lacks are None for all.
    """

    row: Tensor
    lengths: Tensor
    rewards: Tensor  # [R]
    sampled_logprobs: Tensor | None
    kept_logmass: Tensor | None
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    values: Tensor | None
    advantages: Tensor | None
    returns: Tensor | None

    @staticmethod
    def of(rows: Sequence[Row], device: torch.device | str = "cpu") -> RowBatch:
        """Concatenate the rows' arrays. Raises ValueError where some rows have an array and others don't."""

        def join(name: str) -> Tensor | None:
            arrays = [getattr(row, name) for row in rows]
            missing = [a is None for a in arrays]
            if all(missing):
                return None
            if any(missing):
                raise ValueError(f"some rows have {name} and others don't")
            return torch.from_numpy(np.concatenate(arrays).astype(np.float32)).to(device)

        lengths = torch.tensor([row.scored for row in rows], dtype=torch.long)
        return RowBatch(
            row=torch.repeat_interleave(torch.arange(len(rows)), lengths).to(device),
            lengths=lengths.to(device),
            rewards=torch.tensor([row.reward for row in rows], dtype=torch.float32, device=device),
            **{name: join(name) for name in _TOKEN_ARRAYS},
        )


_TOKEN_ARRAYS = (
    "sampled_logprobs",
    "kept_logmass",
    "old_logprobs",
    "reference_logprobs",
    "values",
    "advantages",
    "returns",
)


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar with gradient; metrics: detached scalars. Both additive over the micro-batches of an update."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Algorithm(BaseModel, ABC):
    """An RL or preference algorithm; its fields are the options of the recipe's `algorithm` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What scoring and the forward must provide."""

    @abstractmethod
    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Fill `advantages` (and `returns`) of the rows; returns the rows to train on and metrics of the batch.

        Rows that can't teach (a group filtered by dynamic sampling, a failed trajectory) are left out.
        """

    @abstractmethod
    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """The loss of a micro-batch, divided by counts of the whole update only."""

    def state(self) -> dict[str, Any]:
        """Adaptive coefficients to checkpoint; {} if there are none."""
        return {}
