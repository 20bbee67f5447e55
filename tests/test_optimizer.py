"""Schedules, parameter groups, loss scaling and stopping rules, by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sapwood import memory
from sapwood.optimizer import EarlyStopping, Plateau, Stepper, improves
from sapwood.sections import OptimSection


def one(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value]))


def test_plateau_lowers_the_rate_after_patience_and_counts_anew():
    plateau = Plateau("eval/return", higher_is_better=True, factor=0.5, patience=1)
    scales = []
    for value in (1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0):
        plateau.see(value)
        scales.append(plateau.scale)
    # The first is the best; the 2nd waits (1 <= patience), the 3rd exceeds it; the 4th and 5th again; 2.0 is better.
    assert scales == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_early_stopping_waits_for_patience_measurements_without_improvement():
    early = EarlyStopping("eval/loss", higher_is_better=False, patience=2, min_delta=0.1)
    # 0.95 is less than 1.0 but not by more than 0.1; 0.8 is; then two in a row are not.
    assert [early.see(value) for value in (1.0, 0.95, 0.8, 0.75, 0.71)] == [False, False, False, False, True]
    assert early.best == 0.8


def test_nan_never_improves_and_anything_beats_nothing():
    assert not improves(math.nan, 1.0, higher_is_better=True)
    assert not improves(math.nan, math.nan, higher_is_better=True)
    assert improves(-5.0, math.nan, higher_is_better=True)


def test_groups_have_rates_of_their_own_and_share_the_schedule():
    section = OptimSection(
        learning_rate=1e-2, head_learning_rate=3e-2, critic_learning_rate=5e-2, warmup_steps=4, schedule="linear"
    )
    groups = {"policy": [one()], "head": [one()], "critic": [one()], "critic_head": [one()], "empty": []}
    stepper = Stepper(section, groups, total=8)
    # Warm-up of 4: step 2 is at half the peak. A critic's head learns at the critic's rate.
    assert stepper.schedule(2) == pytest.approx(5e-3)
    rates = {group["name"]: group["lr"] for group in stepper.optimizer.param_groups}
    assert rates == pytest.approx({"policy": 5e-3, "head": 1.5e-2, "critic": 2.5e-2, "critic_head": 2.5e-2})
    # Linear from step 5 on over 5 intervals: at step 6, 1 - 2/5 = 0.6 of the peak.
    assert stepper.schedule(6) == pytest.approx(6e-3)


def test_plateau_scales_the_scheduled_rate_but_not_below_the_minimum():
    section = OptimSection(learning_rate=1e-2, min_learning_rate=4e-3, schedule="plateau")
    stepper = Stepper(section, {"policy": [one()]}, 10, plateau=Plateau("x", True, 0.5, 0, scale=0.5))
    assert stepper.schedule(3) == pytest.approx(5e-3)
    assert stepper.plateau is not None
    stepper.plateau.scale = 0.25
    assert stepper.schedule(3) == pytest.approx(4e-3)


def test_gradients_are_clipped_over_all_groups_together():
    a, b = one(), one()
    stepper = Stepper(OptimSection(max_grad_norm=1.0), {"policy": [a], "critic": [b]}, 1)
    stepper.backward((3.0 * a + 4.0 * b).sum())
    assert stepper.clip() == {"grad_norm": pytest.approx(5.0)}
    assert a.grad is not None
    assert a.grad.item() == pytest.approx(0.6, rel=1e-5)  # 3 / 5


def test_loss_scaling_leaves_gradients_alone_and_skips_an_overflow():
    a = one()
    stepper = Stepper(OptimSection(learning_rate=0.1), {"policy": [a]}, 5, loss_scaling=True)
    stepper.schedule(1)
    stepper.backward((2.0 * a).sum())
    told = stepper.clip()
    assert told["grad_norm"] == pytest.approx(2.0)  # unscaled
    assert told["loss_scale"] == 65536.0
    stepper.step()
    after = a.item()
    assert after == pytest.approx(0.9, abs=1e-4)  # Adam's first step is the rate
    stepper.zero_grad()
    stepper.backward((a * float("inf")).sum())
    assert not math.isfinite(stepper.clip()["grad_norm"])
    stepper.step()
    assert a.item() == after
    stepper.zero_grad()
    stepper.backward((2.0 * a).sum())
    assert stepper.clip()["loss_scale"] == 32768.0  # halved


def test_eight_bit_adam_takes_the_same_first_step():
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    weights = {}
    for name in ("adamw", "adamw_8bit"):
        parameter = nn.Parameter(start.clone())
        stepper = Stepper(OptimSection(name=name, learning_rate=1e-2), {"policy": [parameter]}, 1)
        stepper.schedule(1)
        stepper.backward(parameter.square().sum() / 2)
        stepper.step()
        weights[name] = parameter.detach()
    assert (weights["adamw"] - start).abs().max() == pytest.approx(1e-2, rel=1e-3)
    assert (weights["adamw"] - weights["adamw_8bit"]).abs().mean() < 1e-3


def test_moments_that_are_missing_or_misshapen_are_refused() -> None:
    def made() -> Stepper:
        weight = torch.nn.Parameter(torch.zeros(2, 3))
        stepper = Stepper(OptimSection(), {"policy": [weight]}, 2)
        memory.prepare(stepper.optimizer)
        return stepper

    whole = made().state()
    made().load_state(whole)
    for damage in (
        lambda moments: moments.pop("exp_avg_sq"),
        lambda moments: moments.update(exp_avg=torch.zeros(3, 2)),
    ):
        damaged = copy.deepcopy(whole)
        damage(damaged["optimizer"]["state"][0])
        with pytest.raises(ValueError, match="moments of the optimiser are missing, or of another shape"):
            made().load_state(damaged)
