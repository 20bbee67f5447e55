"""KL estimators: values by hand, and gradients whose expectation is (or is not) that of the KL divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sapwood.ops.kl import bounded_exp, js_estimate, kl_estimate, multiplicative_kl_coef, proportional_kl_coef

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


def test_jensen_shannon_by_hand() -> None:
    # r = 3: (3 ln 3 - 4 ln 2) / 2 = (3.295837 - 2.772589) / 2. r = 1/3: (-(1/3) ln 3 - (4/3) ln (2/3)) / 2
    # = (-0.366204 + 0.540620) / 2. r = 1: 0.
    ratios = torch.tensor([3.0, 1 / 3, 1.0])
    assert js_estimate(ratios.log()).tolist() == pytest.approx([0.261624, 0.087208, 0.0], rel=1e-5)


def test_jensen_shannon_is_unbiased() -> None:
    p, m = THETA.softmax(0), (THETA.softmax(0) + Q) / 2
    exact = 0.5 * (p * (p / m).log()).sum() + 0.5 * (Q * (Q / m).log()).sum()
    # Tokens are drawn from the old policy, here Q; p is the trained one.
    assert float((Q * js_estimate(p.log() - Q.log())).sum()) == pytest.approx(float(exact), rel=1e-12)


def test_jensen_shannon_near_one_and_far_away() -> None:
    # x^2 / 8 near 1, where the plain formula would have lost all digits of fp32.
    assert js_estimate(torch.tensor([1e-3])).item() == pytest.approx(1.25e-7, rel=1e-3)
    # r -> 0: ln 2 / 2. Large ratios stay finite.
    far = js_estimate(torch.tensor([-100.0, 100.0]))
    assert far[0].item() == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert bool(torch.isfinite(far).all())


def test_jensen_shannon_pulls_back_to_the_old_policy() -> None:
    # By x = log r the slope is r f'(r) = r ln(2r / (1 + r)) / 2: at r = 2, ln(4/3); at r = 1/2, ln(2/3) / 4.
    x = torch.tensor([math.log(2), -math.log(2), 0.0], requires_grad=True)
    js_estimate(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([math.log(4 / 3), math.log(2 / 3) / 4, 0.0], abs=1e-7)


@pytest.mark.parametrize(
    ("kl", "expected"),
    # error kl / 0.02 - 1, within +-0.2, times 50 / 1000: 0.1 -> 0.5%; 0.5 and -1 count as 0.2 and -0.2.
    [(0.022, 0.2 * 1.005), (0.03, 0.2 * 1.01), (0.0, 0.2 * 0.99), (0.02, 0.2)],
)
def test_proportional_controller(kl: float, expected: float) -> None:
    assert proportional_kl_coef(0.2, kl, target=0.02, trajectories=50, horizon=1000) == pytest.approx(expected)


@pytest.mark.parametrize(("kl", "expected"), [(0.04, 0.3), (0.03, 0.2), (0.02, 0.2), (0.01, 0.2), (0.005, 0.16)])
def test_multiplicative_controller(kl: float, expected: float) -> None:
    assert multiplicative_kl_coef(0.2, kl, low=0.01, high=0.03, up=1.5, down=0.8) == pytest.approx(expected)
