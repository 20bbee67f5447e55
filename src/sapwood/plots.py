"""The training curve: what was learnt, and the signs of health beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

Panel = tuple[str, tuple[tuple[str, str], ...]]

#: Panels of the figure: title, then (metric, label) of each line. A panel that no record has anything for is left out.
PANELS: tuple[Panel, ...] = (
    ("Training reward, mean", (("reward", "reward"),)),
    ("Held-out return", (("eval/return", "trained model"),)),
    ("Loss", (("loss", "training"), ("eval/loss", "held out"))),
    ("Preference accuracy", (("accuracy", "training"), ("eval/accuracy", "held out"))),
    ("Reward margin", (("margin", "training"), ("eval/margin", "held out"))),
    ("Value loss", (("value_loss", "value loss"),)),
    ("Explained variance", (("explained_variance", "of the critic"),)),
    ("Entropy, nats a token", (("entropy", "entropy"),)),
    ("Divergence, nats a token", (("kl", "KL to the reference"), ("gap_k3", "sampler-trainer gap"))),
    ("Gradient norm", (("grad_norm", "gradient norm"),)),
    ("Learning rate", (("learning_rate", "learning rate"),)),
    ("Reply length, tokens", (("reply_tokens", "reply"),)),
)
_COLOURS = ("#1f6f4a", "#b5651d")


def training_figure(records: Records, title: str) -> Figure:
    """A figure of the panels that have data; `eval/low` and `eval/high` are the interval of the held-out return."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(series(records, metric)[0] for metric, _ in panel[1])] or [PANELS[0]]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(11, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axis, (name, lines) in zip(axes, panels, strict=False):
        _panel(axis, records, name, lines)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _panel(axis: Axes, records: Records, title: str, lines: tuple[tuple[str, str], ...]) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    drawn = 0
    for (metric, label), colour in zip(lines, _COLOURS, strict=False):
        steps, values = series(records, metric)
        if not steps:
            continue
        drawn += 1
        marker = "o" if len(steps) < 30 else ""
        axis.plot(steps, values, color=colour, label=label, marker=marker, markersize=3, linewidth=1.4)
        if metric == "eval/return":
            _interval(axis, records, colour)
    if drawn > 1:
        axis.legend(fontsize=8, frameon=False)
    if not drawn:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color="0.5")


def _interval(axis: Axes, records: Records, colour: str) -> None:
    both = [r for r in records if _number(r.get("eval/low")) and _number(r.get("eval/high"))]
    if both:
        steps = [r["step"] for r in both]
        lows, highs = [r["eval/low"] for r in both], [r["eval/high"] for r in both]
        axis.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0, label="95 % interval")


def series(records: Records, metric: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it is a finite number."""
    found = [(record["step"], record[metric]) for record in records if _number(record.get(metric))]
    return [step for step, _ in found], [value for _, value in found]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
