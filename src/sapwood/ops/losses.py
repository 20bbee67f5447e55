"""Policy-gradient losses as pure functions of per-token tensors.

Axis letters: S scored tokens of a micro-batch, all rows concatenated in row order; R its rows; lengths [R] the
scored tokens of each row, summing to S. No function divides by anything local but a row's own length.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sapwood.ops.kl import LOG_RATIO_LIMIT, bounded_exp

Aggregation = Literal["token", "sequence", "constant"]
Level = Literal["token", "sequence"]
GapMode = Literal["truncate", "mask"]

VESPO_FLOOR = math.log(1e-8)
"""Smallest log-weight of a row or gap weight in VESPO, as in its authors' code."""


def row_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum over each row. values [S], lengths [R] int64 -> [R]; 0 for a row without scored tokens."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0)


def row_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean over each row. values [S], lengths [R] int64 -> [R]; 0 for a row without scored tokens."""
    return row_sum(values, lengths) / lengths.clamp(min=1)


def spread(per_row: Tensor, lengths: Tensor) -> Tensor:
    """Repeat a value per row over its tokens. per_row [R], lengths [R] -> [S]."""
    return torch.repeat_interleave(per_row, lengths)


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, lengths: Tensor, level: Level) -> Tensor:
    """Log importance ratio of each token. logprobs, old_logprobs [S], lengths [R] -> [S].

    token: log pi(t) - log pi_old(t). sequence: the row's mean of these, the same for all its tokens
    (GSPO, arXiv 2507.18071, eq. 7: the length-normalised ratio of sequences).
    """
    difference = logprobs - old_logprobs
    return difference if level == "token" else spread(row_mean(difference, lengths), lengths)


def clipped_loss(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, clip_dual: float | None
) -> Tensor:
    """PPO's clipped surrogate, negated. ratio, advantages [S] -> [S].

        -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)

    (arXiv 1707.06347; unequal bounds: DAPO, arXiv 2503.14476.) With clip_dual, r in the first product is at most
    clip_dual, which bounds the loss where A < 0 (arXiv 1912.09729; INTELLECT-2, arXiv 2505.07291).
    """
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    free = ratio if clip_dual is None else ratio.clamp(max=clip_dual)
    return -torch.minimum(free * advantages, clipped * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """The critic's squared error, halved. values, old_values, returns [S] -> [S].

        max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2

    or without the second term where clip is None. As in OpenAI's baselines and TRL: the clip takes the gradient of a
    value that has moved beyond it *towards* its target, and leaves one that moved away free to come back.
    """
    free = (values - returns).square()
    if clip is None:
        return 0.5 * free
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(free, (clipped - returns).square())


def cispo_loss(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip_high: float) -> Tensor:
    """-min(r, 1 + clip_high) * A * log pi, no gradient through the ratio. All [S] -> [S] (arXiv 2506.13585, eq. 4).

    Unlike the clipped surrogate, every token keeps a gradient; only its weight is capped.
    """
    return -ratio.detach().clamp(max=1.0 + clip_high) * advantages * logprobs


def sapo_loss(ratio: Tensor, advantages: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """-(4 / tau) * sigmoid(tau * (r - 1)) * A: a soft gate in place of the clip. All [S] -> [S] (arXiv 2511.20347).

    tau is temperature_pos where A > 0 and temperature_neg elsewhere. At r = 1 the gradient is that of -r * A.
    """
    tau = torch.where(advantages > 0, temperature_pos, temperature_neg)
    return -4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * advantages


def vespo_loss(
    logprobs: Tensor,
    log_ratios: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    gap_weights: Tensor | None,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Tensor:
    """-phi(w) * A * log pi, with phi(w) = w^k * exp(lambda * (1 - w)), no gradient through w (arXiv 2602.10693).

    w is the row's whole ratio, exp of the sum of its tokens' log_ratios (times its gap weights): phi(1) = 1, and phi
    falls on both sides, so that rows far from the old policy fade out instead of being clipped. positive and
    negative are (k, lambda) where A >= 0 and A < 0. All tensors [S] but lengths [R] -> [S].
    """
    log_weight = log_ratios.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if gap_weights is not None:
        log_weight = log_weight + gap_weights.log().clamp(VESPO_FLOOR, LOG_RATIO_LIMIT)
    log_weight = spread(row_sum(log_weight, lengths), lengths).clamp(VESPO_FLOOR, LOG_RATIO_LIMIT)
    k = torch.where(advantages >= 0, positive[0], negative[0])
    decay = torch.where(advantages >= 0, positive[1], negative[1])
    phi = torch.exp(decay + k * log_weight - decay * log_weight.exp())
    return -phi * advantages * logprobs


def aggregate(
    per_token: Tensor,
    lengths: Tensor,
    kind: Aggregation,
    *,
    tokens: int,
    rows: int,
    constant_length: int | None,
) -> Tensor:
    """Per-token losses to this micro-batch's share of the update's loss: a scalar, additive over micro-batches.

    token:    sum / tokens                                  every token counts the same (DAPO, arXiv 2503.14476)
    sequence: sum over rows of the row's mean / rows        every row counts the same (GRPO, arXiv 2402.03300)
    constant: sum / (rows * constant_length)                Dr. GRPO, arXiv 2503.20783

    per_token [S], lengths [R]; tokens and rows count the whole update over all ranks.
    """
    match kind:
        case "token":
            return per_token.sum() / max(tokens, 1)
        case "sequence":
            return row_mean(per_token, lengths).sum() / max(rows, 1)
        case "constant":
            if constant_length is None:
                raise ValueError("aggregation 'constant' needs constant_length")
            return per_token.sum() / (max(rows, 1) * constant_length)


def gap_weights(
    log_gap: Tensor, lengths: Tensor, *, level: Level, mode: GapMode, cap: float, floor: float | None
) -> Tensor:
    """Importance weights that turn the sampler's tokens into the trainer's. log_gap [S], lengths [R] -> [S].

    log_gap: trainer's old log-probability minus the sampler's, both of the untruncated distribution. The weight is
    exp(log_gap) of the token, or of the row's sum ("sequence"). truncate: clamped to [floor, cap] (Ionides 2008,
    "Truncated importance sampling"); mask: 0 outside of [floor, cap].
    """
    log_weight = log_gap if level == "token" else spread(row_sum(log_gap, lengths), lengths)
    weight = bounded_exp(log_weight.detach())
    if mode == "truncate":
        return weight.clamp(min=floor, max=cap)
    outside = weight > cap
    if floor is not None:
        outside = outside | (weight < floor)
    return weight.masked_fill(outside, 0.0)
