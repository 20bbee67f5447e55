"""The pictures of a run: which there are, what is in them, and that numbers land where they should."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.lines import Line2D

from sapwood.canvas import HEIGHT, WIDTH, Sheet, room, ticks, told
from sapwood.metricnames import entries
from sapwood.plots import (
    COLOURS,
    DETAILED,
    OVERVIEW,
    PANELS,
    SMOOTHED,
    History,
    figures,
    running_mean,
    series,
    training_figure,
)  # fmt: skip

GRPO = [
    {"step": 0, "eval/return": -3.0, "eval/low": -4.0, "eval/high": -2.0},
    *(
        {
            "step": step,
            "reward": step / 2,
            "reward_std": 0.1,
            "policy_loss": 0.1,
            "entropy": 1 / step,
            "reward/env": 1.0,
        }
        for step in range(1, 6)
    ),
]
KINDS = {
    "ppo": ({"policy_loss": 0.1, "value_loss": 2.0, "entropy": 1.0}, "ppo_metrics_with_entropy.png"),
    "grpo": ({"policy_loss": 0.1, "entropy": 1.0}, "policy_metrics_with_entropy.png"),
    "dpo": ({"loss": 0.7, "accuracy": 0.5, "margin": 0.1}, "preference_metrics.png"),
    "sft": ({"loss": 0.7, "nll": 0.7, "perplexity": 2.0}, "sft_metrics.png"),
}


def drawn(records: Any, name: str = OVERVIEW, **more: Any) -> Any:
    return dict(figures(History(records, **more), "a run"))[name]()


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def titles(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_fontsize() == 9.5]


def curves(figure: Any, colour: str) -> list[Line2D]:
    """The curves of a colour; a legend's keys are three points on a level."""
    return [
        line
        for line in figure.axes[0].lines
        if matplotlib.colors.same_color(line.get_color(), colour) and line.get_zorder() != 4
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_its_picture(kind: str) -> None:
    metrics, special = KINDS[kind]
    history = History([{"step": step, **metrics} for step in (1, 2, 3)])
    found = dict(figures(history, "a run"))
    assert list(found) == [OVERVIEW, DETAILED, special]
    for draw in found.values():
        buffer = BytesIO()
        draw().savefig(buffer, format="png", dpi=40)
        assert buffer.getvalue().startswith(b"\x89PNG")


def test_nothing_recorded_is_no_picture() -> None:
    assert list(figures(History([]), "a run")) == []
    assert list(figures(History([{"step": 1, "reward": math.nan, "note": "x", "on": True}]), "a run")) == []
    assert "not recorded" in texts(training_figure([{"step": 1, "unheard_of": 1.0}], "a run"))


def test_panels_are_those_that_have_data_in_their_order() -> None:
    assert titles(drawn(GRPO)) == ["Training reward", "Held-out return", "Entropy, nats a token"]
    order = [panel.title for panel in PANELS]
    assert sorted(titles(drawn(GRPO)), key=order.index) == titles(drawn(GRPO))
    # One part is the reward itself; with a second one there is something to see.
    assert "Reward by part" not in titles(drawn(GRPO, DETAILED))
    both = [{**record, "reward/length": -1.0} for record in GRPO]
    assert "Reward by part" in titles(drawn(both, DETAILED))


def test_the_detailed_picture_has_every_metric() -> None:
    names = [info.name for info in entries() if not info.stands_for_many and info.name != "step"]
    record = {"step": 1, **dict.fromkeys(names, 1.0), "eval/pass@4": 0.5, "a/b": 1.0, "eval/mine": 2.0}
    found = drawn([record, {**record, "step": 2}], DETAILED)
    assert {"a/b", "Held-out mine", "Held-out pass@k", "skipped_updates, updates"} <= set(titles(found))
    shown = " ".join(texts(found))
    assert "js" not in titles(found)  # beside approx_kl in a panel of their own
    assert "Jensen-Shannon" in shown


def test_a_curve_is_where_its_numbers_are() -> None:
    figure = drawn([{"step": step, "loss": float(step)} for step in (0, 10, 20)])
    [line] = curves(figure, COLOURS[0])
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    # The steps 0 .. 20 with 3 % air on either side; the values with 6 %.
    np.testing.assert_allclose((x - x[0]) / WIDTH, np.array([0, 10, 20]) / 21.2, rtol=1e-6)
    np.testing.assert_allclose((y - y[0]) / HEIGHT, np.array([0, 10, 20]) / 22.4, rtol=1e-6)


def test_what_is_not_finite_leaves_a_gap() -> None:
    records = [{"step": 1, "a": 1.0}, {"step": 2}, {"step": 3, "a": math.inf}, {"step": 4, "a": 2}]
    assert series(records, "a") == ([1, 4], [1.0, 2])
    assert History(records).series("a") == ([1, 4], [1.0, 2])
    assert History(records).names == ["a"]


def test_the_interval_and_the_deviation_are_areas() -> None:
    def bands(figure: Any) -> list[Any]:
        return [patch.get_xy() for patch in figure.axes[0].patches if patch.get_alpha() == 0.13]

    [deviation] = bands(drawn(GRPO))  # a single evaluation has no area
    # Rewards from 0.5 to 2.5, with 0.1 around them: 2.2 high, and 12 % of air.
    assert np.ptp(deviation[:, 1]) / HEIGHT == pytest.approx(1 / 1.12)
    assert "± 1 standard deviation" in texts(drawn(GRPO))
    twice = drawn([*GRPO, {"step": 6, "eval/return": -1.0, "eval/low": -2.0, "eval/high": 0.0}])
    assert len(bands(twice)) == 2
    assert "95 % interval" in texts(twice)


def test_long_curves_are_smoothed_and_exact_ones_never() -> None:
    noise = np.random.default_rng(0).normal(size=SMOOTHED)
    records = [{"step": s, "loss": float(n), "learning_rate": 0.1 / s} for s, n in enumerate(noise, 1)]
    assert len(curves(drawn(records, OVERVIEW), COLOURS[0])) == 2  # as it is, and its running mean
    rates = dict(figures(History([{"step": r["step"], "learning_rate": r["learning_rate"]} for r in records]), "x"))
    assert len(curves(rates[DETAILED](), COLOURS[0])) == 1


def test_the_running_mean_by_hand() -> None:
    # Of 3 values it keeps a half: 2; (2 / 2 + 4) / (1 / 2 + 1) = 10 / 3; (5 / 2 + 0) / (3 / 4 + 1) = 10 / 7.
    assert running_mean([2.0, 4.0, 0.0]) == pytest.approx([2.0, 10 / 3, 10 / 7])
    assert running_mean([5.0] * 100) == pytest.approx([5.0] * 100)


def test_warnings_are_marked_in_their_panels_and_named_below() -> None:
    warnings = [
        {"step": 2, "name": "entropy_collapse", "message": "x", "metrics": {"entropy": 0.5}},
        {"step": 4, "name": "entropy_collapse", "message": "x", "metrics": {"entropy": 0.3}},
        {"step": 4, "name": "of_nothing_drawn", "message": "x"},
    ]
    figure = drawn(GRPO, warnings=warnings)
    assert "▼ warnings: entropy_collapse (steps 2, 4); of_nothing_drawn (step 4)" in texts(figure)
    triangles = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert len(triangles) == 2


def test_times_are_stacked() -> None:
    timing = [{"step": s, "sampling_seconds": 1.0, "learning_seconds": 2.0, "loading_seconds": 0.0} for s in (1, 2)]
    figure = drawn(GRPO, DETAILED, timing=timing)
    assert "Seconds of a step" in titles(figure)
    heights = sorted(
        round(float(np.ptp(patch.get_xy()[:, 1])), 4)
        for patch in figure.axes[0].patches
        if patch.get_alpha() == 0.8
    )  # fmt: skip
    assert heights == pytest.approx([0.0, HEIGHT / 4.2, 2 * HEIGHT / 4.2], abs=1e-3)  # of 3 s with 40 % air


def test_names_of_users_are_no_mathematics() -> None:
    hostile = "eval/$\\frac{1}{0}$"
    figure = drawn([{"step": 1, hostile: 1.0}], DETAILED)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert f"Held-out {hostile[5:]}" in titles(figure)


# ---- the canvas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((0.0, 10.0), [0, 2, 4, 6, 8, 10]),
        ((-0.3, 0.9), [-0.25, 0.0, 0.25, 0.5, 0.75]),
        ((0.0, 1e-4), [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        ((997.0, 1003.0), [998, 1000, 1002]),
    ],
)
def test_ticks_are_round(span: tuple[float, float], expected: list[float]) -> None:
    assert ticks(span) == pytest.approx(expected)


def test_ticks_of_steps_are_whole() -> None:
    assert ticks((-0.03, 1.03), whole=True) == [0, 1]
    assert ticks((1.0, 7.0), whole=True) == [2, 4, 6]


def test_numbers_are_short() -> None:
    shown = [told(value) for value in (0.0, -1e-320, 0.25, 1500.0, 2e-4, -1.25e-5, 3e7)]
    assert shown == ["0", "0", "0.25", "1,500", "2e−4", "−1.25e−5", "3e7"]


def test_a_range_has_air_and_a_constant_starts_at_zero() -> None:
    assert room([0.0, 10.0]) == pytest.approx((-0.6, 10.6))
    assert room([2.0, 2.0]) == pytest.approx((-0.1, 3.0))
    assert room([0.0]) == pytest.approx((-0.05, 1.0))
    assert room([-2.0]) == pytest.approx((-3.0, 0.1))
    assert room([0.5, 0.6], whole=True) == (-0.04, 1.04)
    assert room([0.5, 1.6], whole=True)[1] > 1.6  # no share after all


def test_the_legend_avoids_the_curves() -> None:
    def key(values: list[float]) -> float:
        sheet = Sheet(1, 1, "a sheet")
        plot = sheet.plot(0, "a plot")
        plot.scale((0.0, 10.0), (0.0, 10.0))
        plot.line(range(11), values, "one", color=COLOURS[0])
        plot.line(range(11), values, "two", color=COLOURS[1])
        plot.legend()
        return next(text.get_position() for text in sheet.figure.axes[0].texts if text.get_text() == "one")[0]

    rising, falling = [float(v) for v in range(11)], [float(v) for v in range(10, -1, -1)]
    assert key(rising) < key(falling)  # left of a curve that ends on the top right
