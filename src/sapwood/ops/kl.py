"""Estimators of the Kullback-Leibler divergence from samples (Schulman 2020, "Approximating KL Divergence").

For a token drawn from p, with log-probabilities log p and log q of that token and d = log p - log q:

    k1 = d                    unbiased, high variance, negative for single tokens
    k2 = d^2 / 2              biased, low variance, never negative; its gradient is that of KL(p || q) on policy
    k3 = exp(-d) - 1 + d      unbiased, low variance, never negative
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp: e^20 = 4.9e8 is far outside any trust region, and inf * 0 is NaN."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio clamped to +-LOG_RATIO_LIMIT; same shape."""
    return torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(p || q) in nats.

    logprobs [S]: log p of tokens drawn from p; other_logprobs [S]: log q of the same tokens. Returns [S], with the
    gradient of the plain formula (so k1 in a loss has an expected gradient of zero: use k2, k3 or a ratio weight).
    """
    difference = logprobs - other_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return bounded_exp(-difference) - 1.0 + difference
