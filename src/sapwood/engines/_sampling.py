"""Drawing tokens from logits by inverse CDF: exact, seeded per request, and without a full softmax.

One uniform number a token decides the draw, so a request's tokens depend on its own seed and logits alone. The
cumulative distribution has two levels (sums of chunks, then one chunk), which reads the vocabulary a fixed small
number of times; `torch.multinomial` over 49,152 tokens takes more than ten times as long.

Axis letters: B rows, V vocabulary, C chunks, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.engines import Sampling
from sapwood.errors import EngineError

_CHUNK = 256
#: Candidates that the search for a top-p set starts with; eight times as many at each further try.
_FIRST_CANDIDATES = 256
#: Keeps a target strictly below the total, so that the search never runs past the last token with mass.
_BELOW_ONE = 1.0 - 1e-15


@dataclass(frozen=True)
class Draw:
    """token_ids [B] int64, logprobs [B] of the sampled distribution, kept_logmass [B], all on the CPU."""

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    kept_logmass: NDArray[np.float32]


@dataclass(frozen=True)
class _Rule:
    """The options that shape a distribution; rows with equal rules are drawn together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @staticmethod
    def of(options: Sampling) -> _Rule:
        return _Rule(options.temperature, options.top_k, options.top_p, options.min_p)


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """The numbers in [0, 1) that a request draws with, one a token. Raises ValueError for a seed that isn't a key."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(logits: Tensor, options: Sequence[Sampling], u: NDArray[np.float64]) -> Draw:
    """One token a row. logits [B, V] of any float dtype, options: B of them, u [B] in [0, 1)."""
    groups: dict[_Rule, list[int]] = {}
    for row, option in enumerate(options):
        groups.setdefault(_Rule.of(option), []).append(row)
    targets = torch.from_numpy(u).to(logits.device)
    if len(groups) == 1:
        tokens, logprobs, kept = _draw_alike(logits, next(iter(groups)), targets)
        return Draw(tokens.cpu().numpy(), logprobs.cpu().float().numpy(), kept.cpu().float().numpy())
    result = Draw(np.empty(len(u), np.int64), np.empty(len(u), np.float32), np.empty(len(u), np.float32))
    for rule, rows in groups.items():
        index = torch.tensor(rows, device=logits.device)
        tokens, logprobs, kept = _draw_alike(logits[index], rule, targets[index])
        result.token_ids[rows] = tokens.cpu().numpy()
        result.logprobs[rows] = logprobs.cpu().numpy()
        result.kept_logmass[rows] = kept.cpu().numpy()
    return result


def _draw_alike(logits: Tensor, rule: _Rule, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float()
    if rule.temperature == 0.0:
        tokens, logprobs, kept = _greedy(logits)
        _check_finite(logprobs)
        return tokens, logprobs, kept
    z = logits if rule.temperature == 1.0 else logits / rule.temperature
    top_k = rule.top_k if 0 < rule.top_k < z.shape[1] else 0
    if top_k or rule.top_p < 1.0:
        return _from_candidates(z, top_k, rule.top_p, rule.min_p, u)
    top = z.amax(1, keepdim=True)
    _check_finite(top)
    mass = (z - top).exp_()
    if rule.min_p == 0.0:
        tokens, total = _invert(mass, u)
        logprobs = (mass.gather(1, tokens[:, None])[:, 0].double() / total).log()
        return tokens, logprobs.clamp_(max=0.0), torch.zeros_like(logprobs)
    total = mass.sum(1).double()
    # The top token has mass 1, so the share of the top probability is the mass itself.
    tokens, kept = _invert(mass.masked_fill_(mass < rule.min_p, 0.0), u)
    logprobs = (mass.gather(1, tokens[:, None])[:, 0].double() / kept).log()
    return tokens, logprobs.clamp_(max=0.0), (kept / total).log().clamp_(max=0.0)


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise EngineError(
            "the model's logits are not finite, so nothing can be sampled from them: its weights hold NaN or infinity "
            "(an earlier run diverged, or the file is damaged), or float16 overflows, where engine.dtype=float32 helps."
        )


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top, tokens = logits.max(1)
    logprobs = top - logits.logsumexp(1)
    return tokens, logprobs, torch.zeros_like(logprobs)


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """mass [B, V] >= 0, u [B] -> tokens [B] with P(token) proportional to mass, and the total mass [B] (float64)."""
    rows, vocab = mass.shape
    pad = -vocab % _CHUNK
    if pad:
        mass = torch.nn.functional.pad(mass, (0, pad))
    chunks = mass.view(rows, -1, _CHUNK)
    cumulative = chunks.sum(2).double().cumsum(1)  # [B, C]
    total = cumulative[:, -1]
    # right=True finds the first entry above the target: an entry that adds nothing is never the first one above.
    target = (u * total).minimum(total * _BELOW_ONE)[:, None]
    chunk = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(chunk > 0, cumulative.gather(1, (chunk - 1).clamp_(min=0)), 0.0)
    inner = chunks[torch.arange(rows, device=mass.device), chunk[:, 0]].double().cumsum(1)  # [B, _CHUNK]
    # The chunk's own sum may differ from its share of the outer sums in the last digits.
    rest = (target - before).minimum(inner[:, -1:] * _BELOW_ONE)
    within = torch.searchsorted(inner, rest, right=True)
    return (chunk * _CHUNK + within)[:, 0], total


def _from_candidates(z: Tensor, top_k: int, top_p: float, min_p: float, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated draws over the most probable tokens only, sorted; z [B, V] tempered logits."""
    vocab = z.shape[1]
    total = z.logsumexp(1).double()
    _check_finite(total)
    count = top_k or min(vocab, _FIRST_CANDIDATES)
    while True:
        values, ids = z.topk(count, dim=1)
        mass = (values.double() - (values[:, :1].double() if top_k else total[:, None])).exp()
        if top_k:
            mass = mass / mass.sum(1, keepdim=True)
        cumulative = mass.cumsum(1)
        if top_k or count == vocab or bool((cumulative[:, -1] >= top_p).all()):
            break
        count = min(vocab, 8 * count)
    # A token stays while those before it have less than top_p: the smallest set with at least that mass.
    keep = (cumulative - mass) < top_p
    if min_p > 0.0:
        keep &= mass >= min_p * mass[:, :1]
    keep[:, 0] = True
    mass = mass * keep
    cumulative = mass.cumsum(1)
    kept = cumulative[:, -1:]
    place = torch.searchsorted(cumulative, (u[:, None] * kept).minimum(kept * _BELOW_ONE), right=True)
    logprobs = (mass.gather(1, place) / kept).log()[:, 0].clamp_(max=0.0)
    raw = torch.where(keep, values.double(), -math.inf).logsumexp(1)
    return ids.gather(1, place)[:, 0], logprobs, (raw - total).clamp_(max=0.0)
