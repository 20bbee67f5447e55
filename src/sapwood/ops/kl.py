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


def js_estimate(log_ratios: Tensor) -> Tensor:
    """Sampled estimate of the Jensen-Shannon divergence between the old and the trained policy, in nats.

    log_ratios [S]: x = log pi(t) - log pi_old(t) of tokens drawn from pi_old. Returns f(r) [S] with r = e^x and

        f(r) = (r log r - (1 + r) log((1 + r) / 2)) / 2

    Derivation: with m = (pi + pi_old) / 2, JS = KL(pi_old || m) / 2 + KL(pi || m) / 2. Over tokens of pi_old these are
    E[log(2 / (1 + r))] and E[r log(2r / (1 + r))], and half their sum is E[f(r)]. So its mean estimates the divergence
    between the two distributions over the vocabulary without either; it is unbiased for tokens of pi_old only.
    f(1) = 0, f is convex and never negative, and near r = 1 it is x^2 / 8, a quarter of a KL divergence there.
    """
    x = log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # log((1 + r) / 2) without the cancellation of the plain form, which matters because f is of second order in x.
    middle = torch.log1p(torch.expm1(x) / 2.0)
    return 0.5 * (torch.exp(x) * (x - middle) - middle)


def proportional_kl_coef(coef: float, kl: float, *, target: float, trajectories: int, horizon: int) -> float:
    """The next KL coefficient: coef * (1 + e * trajectories / horizon), e = (kl - target) / target within +-0.2.

    The proportional controller of Ziegler et al. (arXiv 1909.08593, section 2.2), whose gain per update is here
    trajectories / horizon. kl and target in the same unit.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * trajectories / horizon)


def multiplicative_kl_coef(coef: float, kl: float, *, low: float, high: float, up: float, down: float) -> float:
    """The next KL coefficient: coef * up where kl > high, coef * down where kl < low, unchanged between them."""
    return coef * (up if kl > high else down if kl < low else 1.0)
