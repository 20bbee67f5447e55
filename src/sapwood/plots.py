"""The pictures of a run: an overview, every metric in detail, and what belongs to its kind of algorithm.

`figures` says which pictures the records of a run give, by file name. A panel without data is left out, so the same
panels serve every algorithm; the detailed picture also has a panel for each metric that no other panel shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sapwood.canvas import Plot, Sheet, Span, room
from sapwood.metricnames import titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

OVERVIEW, DETAILED = "training.png", "training_metrics_detailed.png"
PPO, POLICY = "ppo_metrics_with_entropy.png", "policy_metrics_with_entropy.png"
PREFERENCES, DEMONSTRATIONS = "preference_metrics.png", "sft_metrics.png"

_GREEN, _OCHRE, _BLUE, _PLUM, _OLIVE, _RUST, _TEAL, _GREY = (
    "#1f6f4a", "#c27a1a", "#2f5f93", "#7d3c6e", "#86862a", "#a63a2b", "#2b8a8a", "#6b6b6b",
)  # fmt: skip
COLOURS = (_GREEN, _OCHRE, _BLUE, _PLUM, _TEAL, _RUST, _OLIVE, _GREY)

#: Lines of so many points or more are drawn faintly, with their running mean on top; fewer than MARKED have dots.
SMOOTHED, MARKED = 40, 30


@dataclass(frozen=True)
class Panel:
    """One plot. lines: (metric, label), or all metrics that begin so where it ends in "*".

    band: the two metrics that are a 95 % interval around the first line. deviation: the metric that is the standard
    deviation around it. right: lines against an axis of their own, dashed. whole: the axis is 0 to 1. exact: never
    smoothed. stacked: areas on top of each other. least: lines without which the panel says nothing (a single reward
    part is the reward). needs: a metric without which it is left out.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    band: tuple[str, str] | None = None
    deviation: str | None = None
    right: tuple[tuple[str, str], ...] = ()
    whole: bool = False
    exact: bool = False
    stacked: bool = False
    least: int = 1
    needs: str | None = None


_REWARD = Panel("Training reward", (("reward", "mean"),), deviation="reward_std")
_RETURN = Panel("Held-out return", (("eval/return", "mean"),), band=("eval/low", "eval/high"))
_LOSS = Panel("Loss", (("loss", "training"), ("eval/loss", "held out")))
_POLICY_LOSS = Panel("Policy loss", (("policy_loss", "policy loss"),))
_VALUE_LOSS = Panel("Value loss", (("value_loss", "value loss"),))
_PERPLEXITY = Panel("Perplexity", (("perplexity", "training"), ("eval/perplexity", "held out")))
_ACCURACY = Panel("Preference accuracy", (("accuracy", "training"), ("eval/accuracy", "held out")), whole=True)
_MARGIN = Panel("Reward margin", (("margin", "training"), ("eval/margin", "held out")))
_SIDES = Panel("Rewards of the replies", (("reward_chosen", "chosen"), ("reward_rejected", "rejected")))
_SIDES_HELD_OUT = Panel(
    "Rewards of held-out replies", (("eval/reward_chosen", "chosen"), ("eval/reward_rejected", "rejected"))
)
_LOGPROBS = Panel("Log-probability of a reply, nats", (("logprob_chosen", "chosen"), ("logprob_rejected", "rejected")))
_ENTROPY = Panel("Entropy, nats a token", (("entropy", "training"), ("eval/entropy", "held out")))
_ENTROPY_BONUS = Panel("Entropy, nats a token", (("entropy", "entropy"),), right=(("entropy_coef", "coefficient"),))
_KL = Panel("KL to the reference, nats", (("kl", "KL"),))
_KL_CONTROL = Panel("KL to the reference, nats", (("kl", "KL"),), right=(("kl_coef", "coefficient"),))
_CHANGE = Panel("Change of the policy in a step", (("approx_kl", "KL, old to new"), ("js", "Jensen-Shannon")))
_GAP = Panel("Sampler and trainer apart, nats", (("gap_k3", "KL estimate"), ("gap_k1", "mean difference")))
_CLIP = Panel(
    "Clipped tokens",
    (
        ("clip_fraction_low", "below"),
        ("clip_fraction_high", "above"),
        ("clip_fraction_dual", "dual"),
        ("value_clip_fraction", "values"),
    ),
)
_CLIP_RANGE = Panel(
    "Clipped tokens",
    (("clip_fraction_low", "below"), ("clip_fraction_high", "above"), ("value_clip_fraction", "values")),
    right=(("clip_range", "clip range"),),
)
_RATIO = Panel("Probability ratio, mean", (("ratio", "new / old"), ("gap_weight", "weight of the gap correction")))
_EXPLAINED = Panel("Explained variance of the critic", (("explained_variance", "critic"),))
_ADVANTAGES = Panel("Advantages", (("advantages", "mean"),), deviation="advantages_std")
_VALUES = Panel("Values and returns", (("values", "value"), ("returns", "return")))
_PARTS = Panel("Reward by part", (("reward/*", ""),), least=2)
_PARTS_HELD_OUT = Panel("Held-out reward by part", (("eval/reward/*", ""),))
_SPREAD = Panel("Spread of rewards", (("reward_std", "batch"), ("reward_group_std", "within a group")))
_GRADIENT = Panel("Gradient norm", (("grad_norm", "before clipping"),))
_RATE = Panel("Learning rate", (("learning_rate", "learning rate"),), exact=True)
_COEFFICIENTS = Panel(
    "Coefficients", (("kl_coef", "KL"), ("entropy_coef", "entropy"), ("clip_range", "clip range")), exact=True
)
_LENGTH = Panel("Reply length, tokens", (("reply_tokens", "training"), ("eval/response_length", "held out")))
_SHARES = Panel(
    "Shares of the batch",
    (
        ("failed_share", "failed"),
        ("truncated_share", "cut short"),
        ("no_signal_share", "without signal"),
        ("incomplete_share", "incomplete"),
    ),
)
_DROPPED = Panel("Dropped records", (("dropped_records", "too long"),))
_PARSED = Panel("Held-out replies that were parsed", (("eval/parsed", "parsed"),), whole=True)
_PASS = Panel("Held-out pass@k", (("eval/pass@*", ""),), whole=True)
_SPEED = Panel(
    "Tokens a second",
    (("timing/tokens_per_second", "sampled"), ("timing/trained_tokens_per_second", "trained")),
    needs="timing/sampled_tokens",
)
_SPEED_OF_DATA = Panel("Tokens a second", (("timing/tokens_per_second", "trained"),), needs="timing/tokens")
_SECONDS = Panel(
    "Seconds of a step",
    (
        ("timing/sampling_seconds", "sampling"),
        ("timing/learning_seconds", "learning"),
        ("timing/loading_seconds", "loading"),
        ("timing/checkpoint_seconds", "saving"),
    ),
    stacked=True,
)

#: Panels of the overview; `training_figure` draws those that have data.
PANELS: tuple[Panel, ...] = (
    _REWARD, _RETURN, _LOSS, _ACCURACY, _MARGIN, _PERPLEXITY, _VALUE_LOSS, _EXPLAINED, _ENTROPY, _KL, _GRADIENT,
    _LENGTH,
)  # fmt: skip
_DETAILED_PANELS: tuple[Panel, ...] = (
    _REWARD, _RETURN, _PARTS, _PARTS_HELD_OUT, _PASS, _LOSS, _POLICY_LOSS, _VALUE_LOSS, _PERPLEXITY, _ACCURACY,
    _MARGIN, _SIDES, _SIDES_HELD_OUT, _LOGPROBS, _ENTROPY, _KL, _CHANGE, _GAP, _RATIO, _CLIP, _EXPLAINED, _ADVANTAGES,
    _VALUES, _COEFFICIENTS, _SPREAD, _GRADIENT, _RATE, _LENGTH, _SHARES, _PARSED, _DROPPED, _SPEED, _SPEED_OF_DATA,
    _SECONDS,
)  # fmt: skip
_PPO_PANELS = (_POLICY_LOSS, _VALUE_LOSS, _ENTROPY_BONUS, _KL_CONTROL, _CLIP_RANGE, _EXPLAINED)
_POLICY_PANELS = (_REWARD, _POLICY_LOSS, _ENTROPY_BONUS, _KL_CONTROL, _CHANGE, _CLIP, _SPREAD, _SHARES, _GAP)
_PREFERENCE_PANELS = (_LOSS, _ACCURACY, _MARGIN, _SIDES, _SIDES_HELD_OUT, _LOGPROBS)
_SFT_PANELS = (_LOSS, _PERPLEXITY, _ENTROPY, _RATE)

#: Counted by the loop or told elsewhere, and no curve of interest.
_NOT_DRAWN = frozenset({"step", "epoch", "updates", "trajectories", "timing/sampled_tokens", "timing/tokens", "nll"})


@dataclass(frozen=True)
class History:
    """What a run has recorded. records: metrics.jsonl; timing: timing.jsonl; warnings: warnings.jsonl."""

    records: Records
    timing: Records = ()
    warnings: Records = ()
    _series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for prefix, rows in (("", self.records), ("timing/", self.timing)):
            for row in rows:
                for name, value in row.items():
                    if name != "step" and _number(value):
                        steps, values = self._series.setdefault(prefix + name, ([], []))
                        steps.append(row["step"])
                        values.append(value)

    @property
    def names(self) -> list[str]:
        """Everything that was recorded as a finite number at least once."""
        return list(self._series)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(steps, values) where the metric is a finite number."""
        return self._series.get(metric, ([], []))

    def has(self, panel: Panel) -> bool:
        """Whether a panel has what it takes to say something."""
        needed = panel.needs is None or panel.needs in self._series
        return needed and len(self.lines(panel)) >= panel.least

    def lines(self, panel: Panel, *, right: bool = False) -> list[tuple[str, str]]:
        """(metric, label) of a panel's lines that have data, its patterns written out."""
        found = []
        for metric, label in panel.right if right else panel.lines:
            if metric.endswith("*"):
                prefix = metric[:-1]
                found += [(name, name.removeprefix(prefix)) for name in sorted(self._series) if _below(name, prefix)]
            elif self.series(metric)[0]:
                found.append((metric, label))
        return found


def figures(history: History, title: str) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """(file name, what draws it) of every picture that the history has data for."""
    if not history.names:
        return
    yield OVERVIEW, lambda: _figure(history, PANELS, title, columns=3)
    yield DETAILED, lambda: _figure(history, _everything(history), f"{title}: every metric", columns=4)
    names = set(history.names)
    if "value_loss" in names:
        yield PPO, lambda: _figure(history, _PPO_PANELS, f"{title}: PPO", columns=3)
    elif "policy_loss" in names:
        yield POLICY, lambda: _figure(history, _POLICY_PANELS, f"{title}: policy", columns=3)
    if "accuracy" in names:
        yield PREFERENCES, lambda: _figure(history, _PREFERENCE_PANELS, f"{title}: preferences", columns=3)
    if "perplexity" in names:
        yield DEMONSTRATIONS, lambda: _figure(history, _SFT_PANELS, f"{title}: demonstrations", columns=2)


def training_figure(records: Records, title: str) -> Figure:
    """The overview of these records; `eval/low` and `eval/high` are the interval of the held-out return."""
    return _figure(History(records), PANELS, title, columns=3)


def series(records: Records, metric: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it is a finite number."""
    found = [(record["step"], record[metric]) for record in records if _number(record.get(metric))]
    return [step for step, _ in found], [value for _, value in found]


def _everything(history: History) -> list[Panel]:
    """All panels, and one for each metric that is in none of them."""
    told = set(_NOT_DRAWN)
    for panel in _DETAILED_PANELS:
        told.update(name for name, _ in (*history.lines(panel), *history.lines(panel, right=True)))
        told.update(name for name in (*(panel.band or ()), panel.deviation) if name)
    rest = [name for name in history.names if not {name, name.removeprefix("eval/")} & told]
    return [*_DETAILED_PANELS, *(Panel(titled(name), ((name, ""),)) for name in rest)]


def _figure(history: History, panels: Sequence[Panel], title: str, columns: int) -> Figure:
    shown = [panel for panel in panels if history.has(panel)] or [panels[0]]
    second = any(history.lines(panel, right=True) for panel in shown)
    columns = min(columns, len(shown)) if len(shown) < 3 else columns
    sheet = Sheet(len(shown), columns, title, _warnings_told(history.warnings), second)
    steps = [record["step"] for record in history.records]
    first, last = min(steps, default=0), max(steps, default=1)
    air = 0.03 * max(last - first, 1)
    for index, panel in enumerate(shown):
        _draw(sheet.plot(index, panel.title), history, panel, (first - air, last + air))
    return sheet.figure


def _draw(plot: Plot, history: History, panel: Panel, span: Span) -> None:
    """One panel over the steps of the whole run, so that all panels share their axis."""
    lines, right = history.lines(panel), history.lines(panel, right=True)
    band = _band(history, panel, lines[0][0]) if lines else None
    values = [value for metric, _ in lines for value in history.series(metric)[1]]
    if panel.stacked:
        steps, edges = _edges(history, lines)
        plot.scale(span, (0.0, 1.4 * max(edges[-1], default=1.0) or 1.0))  # with room for the legend
        for (_, label), colour, low, high in zip(lines, COLOURS, edges, edges[1:], strict=False):
            plot.area(steps, low, high, label, color=colour, alpha=0.8)
    else:
        spread = [*band[1], *band[2]] if band else []
        second = [value for metric, _ in right for value in history.series(metric)[1]]
        plot.scale(span, room([*values, *spread], panel.whole), room(second) if second else None)
        for (metric, label), colour in zip(lines, _cycle(), strict=False):
            _line(plot, *history.series(metric), colour, label, exact=panel.exact, sparse=metric.startswith("eval/"))
        for (metric, label), colour in zip(right, (_OCHRE, _PLUM), strict=False):
            plot.line(*history.series(metric), label, second=True, color=colour, lw=1.3, ls="--")
        if band:
            plot.area(*band, color=COLOURS[0], alpha=0.13)
    if not lines:
        plot.note("not recorded")
    shown = {name for name, _ in (*lines, *right)}
    for warning in history.warnings:
        if shown.intersection(warning.get("metrics") or ()):
            plot.mark(warning["step"])
    plot.legend()


def _line(
    plot: Plot, steps: list[int], values: list[float], colour: str, label: str, *, exact: bool, sparse: bool
) -> None:
    """One curve. sparse: measured now and then, so that the points say more than the line between them."""
    if len(steps) >= SMOOTHED and not exact:
        plot.line(steps, values, "", color=colour, alpha=0.28, lw=0.8)
        plot.line(steps, running_mean(values), label, color=colour, lw=1.6)
    elif sparse and len(steps) < MARKED:
        plot.line(steps, values, label, color=colour, lw=0.9, ls=(0, (5, 2)), marker="o", ms=4.2)
    elif len(steps) < MARKED:
        plot.line(steps, values, label, color=colour, lw=1.4, marker="o", ms=2.6)
    else:
        plot.line(steps, values, label, color=colour, lw=1.4)


def _edges(history: History, lines: Sequence[tuple[str, str]]) -> tuple[list[int], list[list[float]]]:
    """Steps, and the borders of the areas: zero, the first series, the sum of two ..."""
    by_step = [dict(zip(*history.series(metric), strict=True)) for metric, _ in lines]
    steps = sorted({step for found in by_step for step in found})
    edges = [[0.0] * len(steps)]
    for found in by_step:
        edges.append([below + found.get(step, 0.0) for below, step in zip(edges[-1], steps, strict=True)])
    return steps, edges


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the values, without the pull of its start.

    m_t = sum_k (1 - a)^(t - k) v_k / sum_k (1 - a)^(t - k).
    """
    keep = 1.0 - 1.0 / max(2.0, len(values) / 20)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means


def _band(history: History, panel: Panel, metric: str) -> tuple[list[int], list[float], list[float], str] | None:
    """Steps, low, high and name of the interval, or of one standard deviation, around a line."""
    centre = dict(zip(*history.series(metric), strict=True))
    if panel.band is not None:
        low, high = (dict(zip(*history.series(name), strict=True)) for name in panel.band)
        known = [step for step in centre if step in low and step in high]
        found = known, [low[step] for step in known], [high[step] for step in known], "95 % interval"
    elif panel.deviation is not None:
        spread = dict(zip(*history.series(panel.deviation), strict=True))
        known = [step for step in centre if step in spread]
        below, above = ([centre[s] + sign * spread[s] for s in known] for sign in (-1, 1))
        found = known, below, above, "± 1 standard deviation"
    else:
        return None
    return found if len(known) > 1 else None


def _warnings_told(warnings: Records) -> str:
    """ "▼ warnings: entropy_collapse (steps 20, 34)"; "" without any."""
    steps: dict[str, list[int]] = {}
    for warning in warnings:
        steps.setdefault(str(warning.get("name")), []).append(int(warning["step"]))
    told = []
    for name, where in list(steps.items())[:6]:
        listed = ", ".join(map(str, where[:6])) + (" ..." if len(where) > 6 else "")
        told.append(f"{name} (step{'s' if len(where) > 1 else ''} {listed})")
    return "▼ warnings: " + "; ".join(told) if told else ""


def _cycle() -> Iterator[str]:
    while True:
        yield from COLOURS


def _below(name: str, prefix: str) -> bool:
    """Whether a name is one part below a prefix: reward/env, but not reward/env/std."""
    return name.startswith(prefix) and "/" not in name[len(prefix) :]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
