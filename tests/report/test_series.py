"""Columns of metrics, and what is kept of long ones."""

from __future__ import annotations

import math

import numpy as np

from sapwood.report.series import POINTS, Series, clock, longest_seconds, thin


def series(*records: dict) -> Series:
    made = Series()
    made.add(records)
    return made


def test_gaps_and_what_is_no_number() -> None:
    made = series(
        {"step": 1, "loss": 1.0, "note": "text", "list": [1]},
        {"step": 2, "loss": None},
        {"step": 3, "loss": math.inf, "late": 2},
        {"loss": 4.0},
        {"step": True, "loss": 4.0},
        {"step": 2.5, "loss": 4.0},
    )
    assert made.names == ["loss", "late"]
    assert made.points("loss") == [(1, 1.0)]
    assert made.bad_records == 3
    assert made.last_step == 3
    assert made.curves() == [
        {"name": "loss", "x": [1, 2, 3], "y": [1, None, None], "gaps": 2},
        {"name": "late", "x": [3], "y": [2], "gaps": 0},
    ]


def test_a_step_that_was_written_twice_has_its_later_value_and_steps_are_in_order() -> None:
    made = series({"step": 1, "a": 1}, {"step": 3, "a": 3}, {"step": 2, "a": 2}, {"step": 3, "a": 9})
    assert made.points("a") == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert made.at("a", 3) == 9.0
    assert made.at("a", 4) is None


def test_thinning_keeps_the_ends_and_the_extremes_of_every_stretch() -> None:
    # Two stretches of five: least 0 and greatest 9 of the first, -1 and 7 of the second.
    values = np.array([5.0, 9, 0, 5, 5, 6, 7, -1, 6, 6])
    assert thin(values, 4).tolist() == [0, 1, 2, 6, 7, 9]
    assert thin(values, 10).tolist() == list(range(10))
    gaps = np.array([1.0, 2, np.nan, np.nan, 3, 4])
    assert [values for values in gaps[thin(gaps, 5)].tolist() if values == values] == [1.0, 2.0, 3.0, 4.0]


def test_a_spike_in_a_long_curve_survives() -> None:
    made = Series()
    made.add({"step": step, "a": 100.0 if step == 54_321 else 1.0} for step in range(1, 60_001))
    [curve] = made.curves()
    assert len(curve["x"]) <= POINTS + 2
    assert curve["x"][0] == 1
    assert curve["x"][-1] == 60_000
    assert (54_321, 100) in zip(curve["x"], curve["y"], strict=True)


def test_names_that_are_too_many_or_too_long_are_left_out() -> None:
    made = series({"step": 1, **{f"m{i}": i for i in range(700)}, "x" * 1000: 1.0})
    assert len(made.names) == 600
    assert len(made.left_out) == 101


def test_the_clock_adds_up_what_steps_took() -> None:
    made = series(
        {"step": 1, "sampling_seconds": 2.0, "learning_seconds": 1.0, "tokens_per_second": 50},
        {"step": 2, "sampling_seconds": 4.0, "learning_seconds": 1.5},
    )
    assert clock(made) == {"x": [1, 2], "y": [3, 8.5]}
    assert longest_seconds(made) == 5.5
    assert clock(Series()) == {"x": [], "y": []}
