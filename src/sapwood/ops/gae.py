"""Returns and advantages of whole episodes, and their normalisation: numpy float64 in, float64 out.

Axis letters: T steps of an episode (scored tokens, or turns), N values of a whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Doubles = NDArray[np.float64]

WHITEN_EPSILON = 1e-8
"""Added to a standard deviation before dividing by it."""


def discounted(rewards: ArrayLike, gamma: float) -> Doubles:
    """Discounted returns R_t = r_t + gamma * R_{t+1}. rewards [T] -> [T]."""
    steps = np.asarray(rewards, np.float64)
    return gae(steps, np.zeros(len(steps)), bootstrap=0.0, gamma=gamma, lam=1.0)


def gae(rewards: ArrayLike, values: ArrayLike, *, bootstrap: float, gamma: float, lam: float) -> Doubles:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) of one episode.

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}

    rewards [T]: what each step paid; values [T]: the critic's value of the state before each step; bootstrap: V_T, its
    value of the state after the last one, 0 where the task ended there. Returns A [T]; A + V are the critic's targets.
    """
    paid, before = np.asarray(rewards, np.float64).tolist(), np.asarray(values, np.float64).tolist()
    advantages = np.zeros(len(paid))
    after, running = float(bootstrap), 0.0
    for step in range(len(paid) - 1, -1, -1):
        running = paid[step] + gamma * after - before[step] + gamma * lam * running
        advantages[step], after = running, before[step]
    return advantages


def whiten(values: ArrayLike, *, shift_mean: bool = True) -> Doubles:
    """(x - mean) / (std + 1e-8), plus the mean again unless shift_mean. values [N] -> [N].

    The standard deviation is the sample one (n - 1). Without shift_mean the mean itself stays as it is, unscaled: the
    whitening of rewards in Ziegler et al. (arXiv 1909.08593), whose sign carries meaning. A single value has no
    spread: its deviation from the mean is 0.
    """
    x = np.asarray(values, np.float64)
    if x.size == 0:
        return x
    mean = x.mean()
    std = x.std(ddof=1) if x.size > 1 else 0.0
    whitened = (x - mean) / (std + WHITEN_EPSILON)
    return whitened if shift_mean else whitened + mean


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of everything seen (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def seen(self, values: ArrayLike) -> RunningMoments:
        """These moments with further values [N] added."""
        x = np.asarray(values, np.float64)
        if x.size == 0:
            return self
        count, difference = self.count + x.size, float(x.mean()) - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + difference * x.size / count,
            squares=self.squares + float(((x - x.mean()) ** 2).sum()) + difference**2 * self.count * x.size / count,
        )

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1); 1 until two different values were seen, so that dividing by it is safe."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 and self.squares > 0.0 else 1.0

    def to_state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @staticmethod
    def from_state(state: Mapping[str, float]) -> RunningMoments:
        """What `to_state` gave."""
        return RunningMoments(int(state["count"]), float(state["mean"]), float(state["squares"]))
