"""What the guards remember of a run: bounded, plain numbers, the same after a resume."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Values that make a start, and that a median of "lately" is taken over.
WINDOW = 5
#: Values of a metric that are kept.
RECENT = 60

#: Metrics whose past matters.
TRACKED = (
    "accuracy",
    "approx_kl",
    "clip_fraction",
    "cut_share",
    "distinct_2",
    "distinct_replies",
    "entropy",
    "epoch",
    "explained_variance",
    "failed_share",
    "gap_k3",
    "grad_norm",
    "kl",
    "logprob_chosen",
    "loss",
    "margin",
    "no_signal_share",
    "parse_failed_share",
    "reply_tokens",
    "reward",
    "reward_chosen",
    "reward_std",
    "updates",
    "value_loss",
)


def noise(values: Sequence[float]) -> float:
    """Standard deviation of a value around its own trend, from the steps between neighbours; 0 for fewer than 3.

    The median absolute step of normal values with deviation s is 0.6745 * sqrt(2) * s; outliers don't move it.
    """
    steps = [abs(b - a) for a, b in itertools.pairwise(values)]
    return statistics.median(steps) / 0.9539 if len(steps) > 1 else 0.0


@dataclass
class Series:
    """A metric's history. first: its first WINDOW values; recent: its last RECENT ones; seen: how many there were.

    highest: (median, least) of the WINDOW neighbouring values with the highest median; lowest: (median, greatest) of
    those with the lowest.
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    seen: int = 0
    highest: tuple[float, float] | None = None
    lowest: tuple[float, float] | None = None

    def add(self, value: float) -> None:
        """One finite value."""
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.recent = [*self.recent[-(RECENT - 1) :], value]
        self.seen += 1
        if self.seen >= WINDOW:
            window = self.recent[-WINDOW:]
            middle = statistics.median(window)
            self.highest = max(self.highest or (-math.inf, 0.0), (middle, min(window)))
            self.lowest = min(self.lowest or (math.inf, 0.0), (middle, max(window)))

    @property
    def noise(self) -> float:
        """Step-to-step deviation of the kept history."""
        return noise(self.recent)

    @property
    def start(self) -> float | None:
        """Median of the first WINDOW values, None until there are so many."""
        return statistics.median(self.first) if len(self.first) == WINDOW else None

    def lately(self, count: int = WINDOW) -> float | None:
        """Median of the last `count` values, None where there are fewer."""
        return statistics.median(self.recent[-count:]) if self.seen >= count else None

    def last(self, count: int) -> list[float]:
        """The last `count` values; fewer where there are fewer."""
        return self.recent[-count:]

    def rise(self, since: float | None = None) -> float:
        """By how many standard errors the last WINDOW values' median is above `since` (the start unless given).

        0 until there are two windows. Of medians of n normal values with deviation s the standard error is
        1.2533 s / sqrt(n), and of the difference of two of them sqrt(2) as much.
        """
        since = self.start if since is None else since
        now = self.lately()
        if since is None or now is None or self.seen < 2 * WINDOW:
            return 0.0
        if now == since:
            return 0.0
        error = 1.2533 * self.noise * math.sqrt(2.0 / WINDOW)
        return (now - since) / error if error > 0.0 else math.copysign(math.inf, now - since)


@dataclass
class Evaluation:
    """One held-out measurement. low, high: its 95 % interval, None without; beside: the training curve then."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None
    beside: float | None = None


@dataclass
class HeldOut:
    """Held-out measurements: the first, the best and the last four, of returns (higher is better) or losses."""

    higher_is_better: bool = True
    first: Evaluation | None = None
    best: Evaluation | None = None
    last: list[Evaluation] = field(default_factory=list)

    def add(self, one: Evaluation) -> None:
        """The next measurement."""
        self.first = self.first or one
        if self.best is None or self.better(one.value, self.best.value):
            self.best = one
        self.last = [*self.last[-3:], one]

    def better(self, value: float, than: float) -> bool:
        """Whether a value beats another."""
        return value > than if self.higher_is_better else value < than

    @property
    def improved(self) -> bool | None:
        """Whether the newest beats the first; None before there are two."""
        if self.first is None or not self.last or self.last[-1].step == self.first.step:
            return None
        return self.better(self.last[-1].value, self.first.value)

    def fell(self) -> bool:
        """Whether the newest is below the best beyond doubt: their intervals don't touch.

        Without intervals: each of the last four is worse than the one before, and the newest worse than the first.
        """
        if self.best is None or self.first is None or not self.last:
            return False
        now = self.last[-1]
        if now.low is not None and now.high is not None and self.best.low is not None and self.best.high is not None:
            return now.high < self.best.low if self.higher_is_better else now.low > self.best.high
        if len(self.last) < 4 or not self.better(self.first.value, now.value):
            return False
        return all(self.better(a.value, b.value) for a, b in itertools.pairwise(self.last))


@dataclass
class History:
    """All that the checks look at. now: the newest step's metrics; options: the recipe's, by dotted name."""

    learns_from: str
    options: Mapping[str, Any]
    step: int = 0
    now: Mapping[str, float] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    held_out: HeldOut = field(default_factory=HeldOut)

    def __post_init__(self) -> None:
        self.held_out.higher_is_better = self.learns_from == "rollouts"

    def of(self, name: str) -> Series:
        """A metric's history; an empty one where it was never logged."""
        return self.series.get(name) or Series()

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a step. Values that aren't finite leave no trace in a history."""
        self.step, self.now = step, metrics
        values = {name: metrics[name] for name in TRACKED if name in metrics}
        clipped = [metrics[name] for name in ("clip_fraction_low", "clip_fraction_high") if name in metrics]
        if clipped:
            values["clip_fraction"] = sum(clipped)
        for name, value in values.items():
            if math.isfinite(value):
                self.series.setdefault(name, Series()).add(float(value))
        rollouts = self.learns_from == "rollouts"
        value = metrics.get("eval/return" if rollouts else "eval/loss", math.nan)
        if math.isfinite(value):
            low, high = (_finite(metrics.get(name)) for name in ("eval/low", "eval/high"))
            beside = self.of("reward" if rollouts else "loss").lately()
            bounds = (low, high) if rollouts else (None, None)
            self.held_out.add(Evaluation(step, float(value), *bounds, beside))

    def state(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "series": {name: vars(series) | {} for name, series in self.series.items()},
            "held_out": {
                "first": _plain(self.held_out.first),
                "best": _plain(self.held_out.best),
                "last": [_plain(one) for one in self.held_out.last],
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.series = {name: _series(values) for name, values in state["series"].items()}
        held = state["held_out"]
        first, best = (Evaluation(**held[name]) if held[name] else None for name in ("first", "best"))
        last = [Evaluation(**one) for one in held["last"]]
        self.held_out = HeldOut(self.held_out.higher_is_better, first, best, last)


def _plain(one: Evaluation | None) -> dict[str, Any] | None:
    return None if one is None else dict(vars(one))


def _series(values: Mapping[str, Any]) -> Series:
    highest, lowest = (tuple(values[name]) if values[name] else None for name in ("highest", "lowest"))
    return Series(list(values["first"]), list(values["recent"]), values["seen"], highest, lowest)  # pyright: ignore[reportArgumentType]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
