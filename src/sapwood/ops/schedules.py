"""Schedules of learning rates and coefficients."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, total: int, minimum: float = 0.0) -> float:
    """The learning rate of step 1..total: linear warm-up to `peak`, then constant, linear or cosine to `minimum`.

    The first step of a warm-up of w steps uses peak / w, and step w uses the peak.
    """
    if warmup and step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    # The step that ends the warm-up (without one, the first) runs at the peak and the last one just above the minimum,
    # never at it: a last step at a rate of zero would be a rollout wasted.
    at_peak = max(warmup, 1)
    progress = (step - at_peak) / (total - at_peak + 1)
    if schedule == "linear":
        return minimum + (peak - minimum) * (1.0 - progress)
    if schedule == "cosine":
        return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; known: constant, linear, cosine")


def linear_to_floor(start: float, *, progress: float, floor: float) -> float:
    """max(floor, start * (1 - progress)): the line from `start` to 0 at progress 1, cut off at `floor`."""
    return max(floor, start * (1.0 - progress))
