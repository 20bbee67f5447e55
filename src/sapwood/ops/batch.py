"""What passes between the loop, the models and an algorithm: counts, scored tokens and forwards of a micro-batch.

Axis letters: R rows of a micro-batch, S its scored tokens (all rows concatenated, in row order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sapwood.types import Row


@dataclass(frozen=True)
class Needs:
    """What scoring must fill in before `credit`, and what the training forward must return.

    old_logprobs, reference_logprobs: filled in by scoring. values: a critic's values, in both. logprobs: the language
    model's head in the training forward. scores: the policy is a classifier with a scalar head (a reward model), which
    is read at the last token of every row in the training forward. entropies: wanted there for the metrics;
    entropy_grad: they carry a gradient.
    """

    old_logprobs: bool = False
    reference_logprobs: bool = False
    values: bool = False
    logprobs: bool = True
    scores: bool = False
    entropies: bool = True
    entropy_grad: bool = False


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
    """The training forward of a micro-batch. All fp32; what the algorithm's needs didn't ask for is None.

    logprobs, entropies [S]: of logits divided by the row's temperature, over the full vocabulary (logprobs is empty,
    [0], where only scores are needed). values [S]: the critic's value of the state that each scored token was chosen
    in, that is of everything before it. scores [R]: the scalar head at each row's last token.
    """

    logprobs: Tensor
    entropies: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class RowBatch:
    """The scored tokens of a micro-batch, concatenated in row order. row [S]: index of each token's row; the rest [S].

    lengths [R]: scored tokens of each row; rewards [R]; group, member [R]: which trajectory of which group of the batch
    a row belongs to (of a preference pair, member 0 is the chosen one). Arrays that a row lacks are None for all.
    """

    row: Tensor
    lengths: Tensor
    rewards: Tensor
    group: Tensor
    member: Tensor
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
            group=torch.tensor([row.group for row in rows], dtype=torch.long, device=device),
            member=torch.tensor([row.member for row in rows], dtype=torch.long, device=device),
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
