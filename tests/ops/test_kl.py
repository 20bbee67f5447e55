"""KL estimators: values by hand, and gradients whose expectation is (or is not) that of the KL divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sapwood.ops.kl import bounded_exp, kl_estimate

# p = softmax(theta) over three tokens, q fixed. KL(p || q) = sum p log(p / q).
THETA = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
Q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def test_values() -> None:
    # d = log p - log q = ln 2 and -ln 2.
    # k1 = d; k2 = d^2 / 2 = 0.480453 / 2; k3 = e^-d - 1 + d = 0.5 - 1 + 0.693147 and 2 - 1 - 0.693147.
    logprobs = torch.tensor([math.log(0.5), math.log(0.25)])
    other = torch.tensor([math.log(0.25), math.log(0.5)])
    assert kl_estimate(logprobs, other, "k1").tolist() == pytest.approx([0.693147, -0.693147], rel=1e-5)
    assert kl_estimate(logprobs, other, "k2").tolist() == pytest.approx([0.240227, 0.240227], rel=1e-5)
    assert kl_estimate(logprobs, other, "k3").tolist() == pytest.approx([0.193147, 0.306853], rel=1e-5)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 1.0), ("k2", math.log(2)), ("k3", 0.5)])
def test_gradients(estimator: Any, expected: float) -> None:
    # By log p at d = ln 2: k1' = 1; k2' = d = 0.693; k3' = 1 - e^-d = 0.5.
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    kl_estimate(logprobs, torch.tensor([math.log(0.25)]), estimator).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased(estimator: Any) -> None:
    p = THETA.softmax(0)
    exact = (p * (p / Q).log()).sum()
    assert float((p * kl_estimate(p.log(), Q.log(), estimator)).sum()) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "weighted", "right"),
    [("k1", False, False), ("k2", False, True), ("k3", False, False), ("k1", True, True), ("k3", True, True)],
)
def test_expected_gradient_on_policy(estimator: Any, weighted: bool, right: bool) -> None:
    """Tokens are drawn from p (held fixed), each contributes its estimate, times its ratio if weighted."""
    theta = THETA.clone().requires_grad_()
    (exact,) = torch.autograd.grad((theta.softmax(0) * (theta.log_softmax(0) - Q.log())).sum(), theta)
    logprobs = theta.log_softmax(0)
    drawn = logprobs.detach().exp()
    estimate = kl_estimate(logprobs, Q.log(), estimator)
    if weighted:
        estimate = estimate * (logprobs - logprobs.detach()).exp()
    (gradient,) = torch.autograd.grad((drawn * estimate).sum(), theta)
    assert torch.allclose(gradient, exact, rtol=1e-9) is right
    if estimator == "k1" and not weighted:
        assert gradient.abs().max() < 1e-12  # no pull at all


def test_extreme_ratios_stay_finite() -> None:
    assert bounded_exp(torch.tensor([1e4])).item() == pytest.approx(math.exp(20.0))
    assert kl_estimate(torch.tensor([-1e4]), torch.tensor([0.0]), "k3").isfinite().all()
