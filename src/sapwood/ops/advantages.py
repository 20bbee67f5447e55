"""Advantages: rewards compared with those of siblings, and discounted returns. Float64 in, float64 out.

N values in all; `cell` [N] names the siblings each value is compared with (the group, or group and turn).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["mean", "loo"]
RewardScale = Literal["group", "batch", "none"]

EQUAL_TOLERANCE = 1e-8
"""Values within this share of their size count as equal: sums of equal parts differ by rounding only."""


def returns_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """Discounted returns R_t = r_t + gamma * R_{t+1}. rewards [T], one per turn; returns [T]."""
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(())
    for step in range(len(rewards) - 1, -1, -1):
        running = rewards[step] + gamma * running
        returns[step] = running
    return returns


def sibling_std(values: Tensor, cell: Tensor) -> Tensor:
    """Sample standard deviation (n - 1) of each value's cell, 0 for a cell of one. values [N], cell [N] -> [N]."""
    counts = torch.bincount(cell).to(values.dtype)
    mean = torch.bincount(cell, values, minlength=len(counts)) / counts.clamp(min=1.0)
    squares = torch.bincount(cell, (values - mean[cell]).square(), minlength=len(counts))
    return (squares / (counts - 1.0).clamp(min=1.0)).sqrt()[cell]


def group_relative(values: Tensor, cell: Tensor, *, baseline: Baseline, scale: RewardScale, epsilon: float) -> Tensor:
    """Advantage of each value over its siblings.

    mean: v_i - mean(v)  (GRPO, arXiv 2402.03300); loo: v_i - mean(v_j, j != i) = n/(n-1) * (v_i - mean(v))
    (RLOO, arXiv 2402.14740). Then divided by (std + epsilon): of the cell ("group"), of all N values ("batch", arXiv
    2508.08221), or not at all ("none", Dr. GRPO, arXiv 2503.20783). Standard deviations are sample ones (n - 1), of
    the values themselves, not of the centred ones. A cell of one has nothing to compare with: its advantage is 0.
    values [N], cell [N] int64 -> [N].
    """
    counts = torch.bincount(cell).to(values.dtype)
    mean = torch.bincount(cell, values, minlength=len(counts)) / counts.clamp(min=1.0)
    advantages = values - mean[cell]
    if baseline == "loo":
        advantages = advantages * (counts / (counts - 1.0).clamp(min=1.0))[cell]
    if scale == "group":
        advantages = advantages / (sibling_std(values, cell) + epsilon)
    elif scale == "batch":
        advantages = advantages / (sibling_std(values, torch.zeros_like(cell)) + epsilon)
    return advantages


def all_equal(values: Tensor) -> bool:
    """Whether the values [N] differ by rounding only, so that a group-relative advantage would be noise."""
    if len(values) < 2:
        return True
    spread = float(values.max() - values.min())
    return spread <= EQUAL_TOLERANCE * max(1.0, float(values.abs().max()))
