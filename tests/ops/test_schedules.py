"""Learning-rate schedules against those of transformers, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from sapwood.ops.schedules import learning_rate, linear_to_floor


def theirs(make, warmup: int, total: int) -> list[float]:
    """The rate of every step, at a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def ours(schedule: str, warmup: int, total: int, minimum: float = 0.0) -> list[float]:
    steps = range(1, total + 1)
    return [learning_rate(s, peak=1.0, schedule=schedule, warmup=warmup, total=total, minimum=minimum) for s in steps]


@pytest.mark.parametrize("total", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("schedule", "make"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_without_warm_up_they_are_those_of_transformers(schedule, make, total):
    assert ours(schedule, 0, total) == pytest.approx(theirs(make, 0, total), abs=1e-12)


@pytest.mark.parametrize("warmup", [1, 2, 5, 9])
@pytest.mark.parametrize(
    ("schedule", "make"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_a_warm_up_takes_no_step_at_rate_zero_and_the_decay_is_that_of_one_step_less(schedule, make, warmup):
    found = ours(schedule, warmup, 10)
    assert found[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert found[warmup:] == pytest.approx(theirs(make, warmup - 1, 10)[warmup:], abs=1e-12)


def test_by_hand():
    # Over 4 steps without warm-up: 4/4, 3/4, 2/4, 1/4; above a minimum of 0.2, the same shares of 0.8.
    assert ours("linear", 0, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert ours("linear", 0, 4, minimum=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert ours("cosine", 0, 4)[2] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert ours("constant", 2, 4) == [0.5, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        ours("step", 0, 4)


def test_a_line_to_a_floor():
    assert linear_to_floor(0.2, progress=0.25, floor=0.1) == pytest.approx(0.15)
    assert linear_to_floor(0.2, progress=0.75, floor=0.1) == 0.1
