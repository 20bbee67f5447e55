"""Losses of preference learning as pure functions, and the pairing of a micro-batch's rows.

Axis letters: R rows of a micro-batch, S its scored tokens, P its pairs. Everything is fp32. A *log-ratio* is a reply's
log-probability under the policy minus that under the reference; a *score* is what a loss compares: the log-ratio, or
f'(exp(log-ratio)) of another divergence, divided by the reply's length where the loss is length-normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.errors import DataError
from sapwood.ops.batch import RowBatch
from sapwood.ops.losses import spread
from sapwood.types import Row

#: Losses of two scores.
PairLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

EXPONENT_LIMIT = 40.0
"""Exponents are clamped to it before exp: e^40 = 2.4e17, the square of whose gradient is still finite in fp32."""


@dataclass(frozen=True)
class Pairs:
    """Which rows of a micro-batch are pairs. chosen, rejected [P]: row indices, in the order of the groups."""

    chosen: Tensor
    rejected: Tensor

    @staticmethod
    def of(batch: RowBatch) -> Pairs:
        """Pair member 0 with member 1 of every group. Raises ValueError where the rows aren't whole pairs."""
        order = torch.argsort(2 * batch.group + batch.member, stable=True)
        chosen, rejected = order[0::2], order[1::2]
        whole = (
            len(chosen) == len(rejected)
            and torch.equal(batch.group[chosen], batch.group[rejected])
            and bool((batch.member[chosen] == 0).all())
            and bool((batch.member[rejected] == 1).all())
        )
        if not whole:
            raise ValueError("a micro-batch of pairs must have members 0 and 1 of each of its groups, once each")
        return Pairs(chosen, rejected)

    def split(self, per_row: Tensor) -> tuple[Tensor, Tensor]:
        """per_row [R] -> that of the chosen [P] and of the rejected replies [P]."""
        return per_row[self.chosen], per_row[self.rejected]


def whole_pairs(rows: Sequence[Row], groups: int) -> tuple[list[Row], float]:
    """The rows of groups that have a chosen and a rejected row, in their order, and the share of the
    batch's `groups` that are left out.

    A reply without a scored token has no row, so its pair teaches nothing. Raises DataError where a reply has
    several rows (its conversation restarts): a pair compares two unbroken conversations.
    """
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(row.group, []).append(row.member)
    for group, found in members.items():
        if len(set(found)) < len(found) or not set(found) <= {0, 1}:
            raise DataError(
                f"pair {group} of the batch has the replies {sorted(found)} in place of 0 (chosen) and 1 (rejected): "
                "a preference pair is two unbroken conversations, so give records with one chosen and one rejected "
                "reply that don't restart."
            )
    whole = {group for group, found in members.items() if len(found) == 2}
    return [row for row in rows if row.group in whole], 1.0 - len(whole) / max(groups, 1)


def preference_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where chosen > rejected, 0.5 where they are equal, else 0. All [P]."""
    return 0.5 * ((chosen > rejected).float() + (chosen >= rejected).float())


def shared_weights(lengths: Tensor, pairs: Pairs, alpha: float) -> Tensor:
    """Weights of tokens in LD-DPO's sequence log-probabilities (arXiv 2409.06411). lengths [R] -> [S].

    1 for the first min(chosen, rejected) scored tokens of both replies, alpha for the longer one's rest.
    """
    shared = torch.empty_like(lengths)
    shared[pairs.chosen] = shared[pairs.rejected] = torch.minimum(*pairs.split(lengths))
    starts = torch.cumsum(lengths, 0) - lengths
    positions = torch.arange(int(lengths.sum()), device=lengths.device) - spread(starts, lengths)
    return torch.where(positions < spread(shared, lengths), 1.0, alpha)


def divergence_score(log_ratios: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f'(t) of an f-divergence at t = exp(log-ratio), up to a constant (f-DPO, arXiv 2309.16240). [P] -> [P].

    reverse_kl: log t    forward_kl: 1 - 1/t    js: log(2t / (1 + t))    alpha: (t^(alpha - 1) - 1) / (alpha - 1)

    alpha in [0, 1]: 0 is forward_kl, and 1 the limit reverse_kl.
    """
    match divergence:
        case "reverse_kl":
            return log_ratios
        case "forward_kl":
            return 1.0 - torch.exp((-log_ratios).clamp(max=EXPONENT_LIMIT))
        case "js":
            return math.log(2.0) + F.logsigmoid(log_ratios)
        case "alpha":
            power = alpha - 1.0
            if abs(power) < 1e-6:
                return log_ratios
            return (torch.exp((power * log_ratios).clamp(max=EXPONENT_LIMIT)) - 1.0) / power


def smoothed_sigmoid_loss(margin: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), e the probability that a label is flipped. [P] -> [P].

    Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"); with e = 0, Bradley-Terry's likelihood.
    """
    loss = -F.logsigmoid(margin)
    return loss if smoothing == 0.0 else (1.0 - smoothing) * loss - smoothing * F.logsigmoid(-margin)


def pair_loss(
    kind: PairLoss, chosen: Tensor, rejected: Tensor, *, beta: float, smoothing: float = 0.0, tau: float = 0.05
) -> Tensor:
    """The loss of each pair. chosen, rejected [P]: scores -> [P]. With m = beta (chosen - rejected), e = smoothing:

    sigmoid     smoothed_sigmoid_loss(m)                                   DPO, arXiv 2305.18290, eq. 7
    robust      (-(1 - e) log s(m) + e log s(-m)) / (1 - 2e)               arXiv 2403.00409
    hinge       max(0, 1 - m)                                              SLiC, arXiv 2305.10425
    ipo         (chosen - rejected - 1 / (2 beta))^2                       arXiv 2310.12036, eq. 17
    exo_pair    KL((s(m), s(-m)) || (1 - e, e))                            arXiv 2402.00856, eq. 16
    nca_pair    -log s(bc) - (log s(-bc) + log s(-br)) / 2                 arXiv 2402.05369
    bco_pair    -log s(bc) - log s(-br)                                    arXiv 2404.04656
    sppo_hard   (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2    arXiv 2405.00675
    apo_zero    1 - s(bc) + s(br)                                          arXiv 2408.06266, eq. 7
    apo_down    s(bc) + 1 - s(m)                                           arXiv 2408.06266, eq. 8
    discopop    (1 - g) (-log s(m)) + g exp(-m), g = s(m / tau)            arXiv 2406.08414, eq. 5

    s is the sigmoid, bc and br are beta times chosen and rejected.
    """
    margin = beta * (chosen - rejected)
    match kind:
        case "sigmoid":
            return smoothed_sigmoid_loss(margin, smoothing)
        case "robust":
            clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
            return ((1.0 - smoothing) * clean - smoothing * flipped) / (1.0 - 2.0 * smoothing)
        case "hinge":
            return torch.relu(1.0 - margin)
        case "ipo":
            return (chosen - rejected - 0.5 / beta).square()
        case "exo_pair":
            win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-smoothing))
            return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(smoothing))
        case "nca_pair":
            falls = F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)
            return -F.logsigmoid(beta * chosen) - 0.5 * falls
        case "bco_pair":
            return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
        case "sppo_hard":
            return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
        case "apo_zero":
            return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":
            return torch.sigmoid(beta * chosen) + torch.sigmoid(-margin)
        case "discopop":
            gate = torch.sigmoid(margin / tau)
            return (1.0 - gate) * -F.logsigmoid(margin) + gate * torch.exp((-margin).clamp(max=EXPONENT_LIMIT))


def alphapo_reward(mean_logprobs: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of p = exp(mean log-probability); log p at alpha 0 (AlphaPO, arXiv 2501.03884). [P]."""
    if alpha == 0.0:
        return mean_logprobs
    return -torch.expm1((-alpha * mean_logprobs).clamp(max=EXPONENT_LIMIT)) / alpha


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean log-probability) (ORPO, arXiv 2403.07691, eq. 4). [P] -> [P]."""
    # fp32 can't tell a smaller distance from p = 1, where the odds are infinite.
    logp = mean_logprobs.clamp(max=-1e-7)
    near_one = logp > -math.log(2.0)
    # Each branch sees only arguments that it is accurate for, so that no gradient is NaN.
    small = torch.log(-torch.expm1(torch.where(near_one, logp, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_one, -1.0, logp)))
    return logp - torch.where(near_one, small, large)


def kto_loss(log_ratios: Tensor, desirable: Tensor, reference_point: float, beta: float) -> Tensor:
    """1 - sigmoid(+-beta (log-ratio - z)): + for desirable replies (KTO, arXiv 2402.01306, eq. 7 and 8).

    log_ratios [R], desirable [R] bool, reference_point z: the KL divergence of policy and reference -> [R].
    """
    distance = beta * (log_ratios - reference_point)
    return torch.sigmoid(torch.where(desirable, -distance, distance))
