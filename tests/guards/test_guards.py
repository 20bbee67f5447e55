"""Every warning: a history that must raise it, at the step worked out by hand, and near ones that must not."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sapwood.config import parse_recipe
from sapwood.errors import ConfigError
from sapwood.guards import AGAIN, CLEARED, Watch, flat, reply_metrics
from sapwood.guards._checks import CHECKS
from sapwood.guards._history import Evaluation as Held
from sapwood.guards._history import HeldOut, History, Series, noise
from sapwood.guards._remedies import REMEDIES, remedies_of
from sapwood.sections import GuardLimits, GuardsSection, WarningName
from sapwood.types import Group, StopReason, Task, Trajectory, Turn

NAMES = get_args(WarningName)
ROOT = Path(__file__).parents[2]
Curve = Callable[[int], dict[str, float]]


def alarms(curve: Curve, steps: int, learns_from="rollouts", options=None, first=1, **section):
    """(step, name) of every alarm over steps first..steps."""
    watch = Watch(GuardsSection(**section), learns_from, options)
    return [(alarm.step, alarm.name) for step in range(first, steps + 1) for alarm in watch.see(step, curve(step))]


def since(start: int, before: float, after: float) -> Callable[[int], float]:
    """`before` until step `start`, then `after`."""
    return lambda step: after if step >= start else before


# --- statistics --------------------------------------------------------------------------------------------------


def test_noise_is_the_deviation_around_a_trend():
    assert noise([1.0, 2.0]) == 0.0
    # Steps of 1, 3, 1, 3: their median is 2, and 2 / 0.9539 = 2.0967.
    assert noise([0.0, 1.0, 4.0, 5.0, 8.0]) == pytest.approx(2.0967, abs=1e-4)
    rng = np.random.default_rng(0)
    rising = np.arange(4000) * 0.01 + rng.normal(0, 0.5, 4000)
    assert noise(rising.tolist()) == pytest.approx(0.5, rel=0.05)
    rising[::50] += 100  # outliers don't move it
    assert noise(rising.tolist()) == pytest.approx(0.5, rel=0.1)


def test_a_series_keeps_its_start_its_best_windows_and_a_bounded_past():
    series = Series()
    for value in [1.0, 9.0, 2.0, 3.0]:
        series.add(value)
    assert (series.start, series.lately(), series.highest) == (None, None, None)
    series.add(4.0)
    assert series.start == 3.0  # of 1 9 2 3 4
    assert series.highest == (3.0, 1.0)
    assert series.lowest == (3.0, 9.0)
    for value in [8.0, 8.0, 7.0]:
        series.add(value)
    # 9 2 3 4 8, then 2 3 4 8 8, then 3 4 8 8 7: medians 4, 4, 7.
    assert series.highest == (7.0, 3.0)
    assert series.lately(3) == 8.0
    for _ in range(200):
        series.add(0.0)
    assert len(series.recent) == 60
    assert series.lowest == (0.0, 0.0)
    assert series.highest == (7.0, 3.0)


def test_a_rise_is_counted_in_standard_errors():
    series = Series()
    for value in [0.0, 1.0, 0.0, 1.0, 0.0, 4.0, 5.0, 4.0, 5.0, 4.0]:
        series.add(value)
    # The steps are 1 but for one of 4, so the noise is 1 / 0.9539 = 1.0483; the medians are 0 and 4, and
    # 4 / (1.2533 * 1.0483 * sqrt(2 / 5)) = 4.814.
    assert series.rise() == pytest.approx(4.814, abs=1e-3)
    assert series.rise(since=4.0) == 0.0
    assert Series().rise() == 0.0


def test_a_held_out_fall_is_one_beyond_doubt():
    held = HeldOut()
    held.add(Held(0, 0.5, 0.4, 0.6))
    held.add(Held(10, 0.7, 0.6, 0.8))
    held.add(Held(20, 0.65, 0.55, 0.75))
    assert not held.fell()
    held.add(Held(30, 0.5, 0.4, 0.59))
    assert held.fell()
    assert held.improved is False
    alone = HeldOut()
    for step, value in enumerate([0.5, 0.9, 0.8, 0.6, 0.55]):
        alone.add(Held(step, value))
    assert not alone.fell()  # three falls, but not below the first
    alone.add(Held(5, 0.4))
    assert alone.fell()


# --- every warning -----------------------------------------------------------------------------------------------


def trend(start: float, end: float, steps: int, wobble: float = 0.0) -> Callable[[int], float]:
    """A straight line over steps 1..`steps`, then flat, with a wobble of alternating sign."""
    return lambda s: start + (end - start) * min((s - 1) / (steps - 1), 1.0) + wobble * (-1) ** s


GAP = {"optim.max_gap": 0.1}

# name, kind of data, options, curve, the first steps at which it is raised (None: never)
CASES: dict[str, tuple[str, str, dict, Curve, int | None]] = {
    # The median of 3 passes a quarter of the bound when two of the three do.
    "gap": ("sampler_gap", "rollouts", GAP, lambda s: {"gap_k3": since(10, 1e-9, 0.03)(s)}, 11),
    "gap below": ("sampler_gap", "rollouts", GAP, lambda s: {"gap_k3": since(10, 1e-9, 9e-4)(s)}, None),
    # From 1e-4 to 2e-3 is 20 times as much; the median of 5 is there with the third.
    "gap rising": ("sampler_gap", "rollouts", GAP, lambda s: {"gap_k3": since(10, 1e-4, 2e-3)(s)}, 12),
    "gap of data": ("sampler_gap", "rollouts", {}, lambda s: {"gap_k3": 5.0}, None),
    # A tenth of 1.0: three of the last five are below it at step 22.
    "entropy": (
        "entropy_collapse",
        "rollouts",
        {},
        lambda s: {"entropy": since(20, 1.0, 0.09)(s), "no_signal_share": 0.6, "distinct_replies": 0.5},
        22,
    ),
    "entropy, replies alike": (
        "entropy_collapse",
        "rollouts",
        {},
        lambda s: {"entropy": since(20, 1.0, 0.09)(s), "no_signal_share": 0.1, "distinct_replies": 0.2},
        22,
    ),
    "entropy, unknown groups": ("entropy_collapse", "rollouts", {}, lambda s: {"entropy": since(20, 1, 0.09)(s)}, 22),
    "sure but exploring": (
        "entropy_collapse",
        "rollouts",
        {},
        lambda s: {"entropy": since(20, 1.0, 0.01)(s), "no_signal_share": 0.3, "distinct_replies": 0.9},
        None,
    ),
    "halved entropy": (
        "entropy_collapse",
        "rollouts",
        {},
        lambda s: {"entropy": since(20, 1, 0.11)(s), "no_signal_share": 0.6},
        None,
    ),
    "noise": ("entropy_explosion", "rollouts", {}, lambda s: {"entropy": since(20, 0.7, 2.0)(s)}, 22),
    "twice of little": ("entropy_explosion", "rollouts", {}, lambda s: {"entropy": since(20, 0.2, 0.9)(s)}, None),
    "kl": ("kl_runaway", "rollouts", {}, lambda s: {"kl": since(7, 0.1, 2.5)(s)}, 8),
    "kl jumps": ("kl_runaway", "rollouts", {}, lambda s: {"kl": since(20, 0.02, 0.7)(s)}, 21),
    "kl jumps once": ("kl_runaway", "rollouts", {}, lambda s: {"kl": 1.9 if s == 20 else 0.02}, None),
    "kl grows": ("kl_runaway", "rollouts", {}, lambda s: {"kl": trend(0, 1.9, 60)(s)}, None),
    "kl of KTO": ("kl_runaway", "labels", {}, lambda s: {"kl": 9.0}, None),
    "lag": ("policy_lag", "rollouts", {}, lambda s: {"approx_kl": since(3, 0.01, 0.4)(s)}, 5),
    "no lag": ("policy_lag", "rollouts", {}, lambda s: {"approx_kl": 0.29}, None),
    # Each side alone is below the limit of 0.5; their sum is 0.52.
    "clip": (
        "clip_fraction",
        "rollouts",
        {},
        lambda s: {"clip_fraction_low": 0.3, "clip_fraction_high": 0.22},
        5,
    ),
    "no clip": ("clip_fraction", "rollouts", {}, lambda s: {"clip_fraction_low": 0.3, "clip_fraction_high": 0.2}, None),
    "target": (
        "target_kl_stops",
        "rollouts",
        {"algorithm.target_kl": 0.02, "algorithm.epochs": 4, "algorithm.updates": 1},
        lambda s: {"updates": 4 if s < 6 else 1},
        15,
    ),
    "one update planned": (
        "target_kl_stops",
        "rollouts",
        {"algorithm.target_kl": 0.02, "algorithm.epochs": 1, "algorithm.updates": 1},
        lambda s: {"updates": 1},
        None,
    ),
    # The held-out interval of step 40 lies below the best one's, while the reward rises all along.
    "hacked": (
        "reward_hacking",
        "rollouts",
        {},
        lambda s: {
            "reward": trend(0.2, 0.9, 60, 0.02)(s),
            "reward_std": 0.4,
            **({"eval/return": r, "eval/low": r - 0.05, "eval/high": r + 0.05} if (r := RETURNS.get(s)) else {}),
        },
        40,
    ),
    # 100 tokens become 310 by step 31, three times as many as at the start (the median of steps 1 to 5, 114): 342 at
    # step 35.5, and the median of the last ten is there five steps later, at step 40; the reward has risen by then.
    "longer": (
        "reward_hacking",
        "rollouts",
        {},
        lambda s: {"reward": trend(0.2, 0.9, 60, 0.02)(s), "reply_tokens": 100 + 7 * (s - 1)},
        41,
    ),
    "longer and better": (
        "reward_hacking",
        "rollouts",
        {},
        lambda s: {
            "reward": trend(0.2, 0.9, 60, 0.02)(s),
            "reply_tokens": 100 + 7 * (s - 1),
            **({"eval/return": s / 60} if s % 20 == 0 else {}),
        },
        None,
    ),
    "longer for nothing": (
        "reward_hacking",
        "rollouts",
        {},
        lambda s: {"reward": 0.5 + 0.02 * (-1) ** s, "reply_tokens": 100 + 7 * (s - 1)},
        None,
    ),
    "repeating": (
        "reward_hacking",
        "rollouts",
        {},
        lambda s: {
            "reward": trend(0.2, 0.9, 60, 0.02)(s),
            "distinct_2": since(30, 0.6, 0.15)(s),
            "reply_tokens": 50,
        },
        35,  # half of the last ten, and the mean of the middle two is then 0.375 ... at 36 all of the middle is 0.15
    ),
    # 0.5 for ten steps, then 0.1: step 20 is the tenth below.
    "collapse": (
        "reward_collapse",
        "rollouts",
        {},
        lambda s: {"reward": since(11, 0.5, 0.1)(s) + 0.02 * (-1) ** s, "reward_std": 0.4},
        20,
    ),
    # A fall of 0.09 is less than a quarter of the rewards' deviation, 0.1.
    "small fall": (
        "reward_collapse",
        "rollouts",
        {},
        lambda s: {"reward": since(11, 0.5, 0.41)(s), "reward_std": 0.4},
        None,
    ),
    "held-out collapse": (
        "reward_collapse",
        "rollouts",
        {},
        lambda s: {
            "reward": 0.3 + 0.02 * (-1) ** s,
            **({"eval/return": r, "eval/low": r - 0.05, "eval/high": r + 0.05} if (r := RETURNS.get(s)) else {}),
        },
        40,
    ),
    "stalled": (
        "reward_stalled",
        "rollouts",
        {},
        lambda s: {"reward": 0.3 + 0.02 * (-1) ** s - 0.001 * s, "reward_std": 0.4},
        100,
    ),
    "not stalled, held out": (
        "reward_stalled",
        "rollouts",
        {},
        lambda s: {"reward": 0.3 - 0.001 * s, "reward_std": 0.4, **({"eval/return": s / 50} if s % 20 == 0 else {})},
        None,
    ),
    "stalled, mixed groups only": (
        "reward_stalled",
        "rollouts",
        {"algorithm.dynamic_sampling": True},
        lambda s: {"reward": 0.5 - 0.001 * s, "reward_std": 0.5},
        None,
    ),
    "equal groups": ("no_signal", "rollouts", {}, lambda s: {"no_signal_share": since(11, 0.3, 0.8)(s)}, 13),
    "some equal groups": ("no_signal", "rollouts", {}, lambda s: {"no_signal_share": 0.7}, None),
    "no updates": ("no_signal", "rollouts", {}, lambda s: {"updates": since(4, 1, 0)(s)}, 6),
    "equal rewards": ("no_signal", "rollouts", {}, lambda s: {"reward_std": since(4, 0.2, 0)(s), "reward": 1.0}, 8),
    "failures": ("env_failures", "rollouts", {}, lambda s: {"failed_share": since(9, 0, 0.3)(s)}, 10),
    "unparsed": ("parse_failures", "rollouts", {}, lambda s: {"parse_failed_share": 0.6}, 10),
    # A rise of 0.25 above its lowest: 0.05 to 0.30.
    "unparsed later": (
        "parse_failures",
        "rollouts",
        {},
        lambda s: {"parse_failed_share": since(20, 0.05, 0.31)(s)},
        22,
    ),
    "learning to be parsed": (
        "parse_failures",
        "rollouts",
        {},
        lambda s: {"parse_failed_share": trend(0.9, 0.0, 12)(s)},
        None,
    ),
    "cut": ("length_limit", "rollouts", {}, lambda s: {"cut_share": 0.6}, 5),
    "cut on purpose": ("length_limit", "rollouts", {"engine.ignore_eos": True}, lambda s: {"cut_share": 1.0}, None),
    # 0.1 at its best; five steps at 0.6 are more than five times that.
    "critic": ("value_divergence", "rollouts", {}, lambda s: {"value_loss": since(15, 0.1, 0.6)(s)}, 19),
    # Twenty values have to be there; nine of the last ten are bad by then.
    "critic blind": ("value_divergence", "rollouts", {}, lambda s: {"explained_variance": since(12, 0, -0.6)(s)}, 20),
    "critic slow": ("value_divergence", "rollouts", {}, lambda s: {"explained_variance": -0.3}, None),
    "spike": (
        "gradient_spike",
        "rollouts",
        {"optim.max_grad_norm": 1.0},
        lambda s: {"grad_norm": 30.0 if s == 25 else 1.0 + s % 3},
        None,  # nine in ten are at most 3, and ten times that is 30
    ),
    "spike above": (
        "gradient_spike",
        "demonstrations",
        {"optim.max_grad_norm": 1.0},
        lambda s: {"grad_norm": 31.0 if s == 25 else 1.0 + s % 3},
        25,
    ),
    "signal at last": (
        "gradient_spike",
        "rollouts",
        {"optim.max_grad_norm": 1.0},
        lambda s: {"grad_norm": 0.9 if s == 25 else 0.0},
        None,  # clipping lets it through
    ),
    "skipped": ("not_finite", "labels", {}, lambda s: {"skipped_updates": 2} if s == 7 else {"loss": 1.0}, 7),
    "nan": ("not_finite", "rollouts", {}, lambda s: {"kl": math.nan if s == 7 else 0.1, "perplexity": math.inf}, 7),
    "diverged": ("loss_divergence", "demonstrations", {}, lambda s: {"loss": since(20, 1.0, 1.6)(s)}, 24),
    "noisy loss": (
        "loss_divergence",
        "demonstrations",
        {},
        lambda s: {"loss": since(20, 1.0, 1.6)(s) + 0.3 * (-1) ** s},
        None,
    ),
    "loss of rollouts": ("loss_divergence", "rollouts", {}, lambda s: {"loss": since(20, 0.01, 9)(s)}, None),
    # 1.0, 0.8, 0.9, 0.95: the third and fourth are more than 5 % above the best, and the training loss falls.
    "overfit": (
        "overfitting",
        "demonstrations",
        {},
        lambda s: {
            "loss": 2.0 * 0.97**s,
            **({"eval/loss": {10: 1.0, 20: 0.8, 30: 0.9, 40: 0.95}.get(s, 1.0)} if s % 10 == 0 else {}),
        },
        40,
    ),
    "harder data": (
        "overfitting",
        "demonstrations",
        {},
        lambda s: {
            "loss": 2.0 + 0.01 * s,
            **({"eval/loss": {10: 1.0, 20: 0.8, 30: 0.9, 40: 0.95}.get(s, 1.0)} if s % 10 == 0 else {}),
        },
        None,
    ),
    # At step 15 the medians are -0.084 after -0.024, and 0.105 after 0.03: a fall of 0.06 beside a growth of 0.075. Its
    # error is 1.2533 * (0.008 / 0.9539) * sqrt(1/5 + 1/10) = 0.00576, and 0.06 - 3 * 0.00576 is above half of 0.075.
    "displaced": (
        "chosen_falls",
        "pairs",
        {},
        lambda s: {"reward_chosen": -0.008 * s, "margin": 0.01 * s, "logprob_chosen": -20.0},
        15,
    ),
    "displaced less": (
        "chosen_falls",
        "pairs",
        {},
        lambda s: {"reward_chosen": -0.004 * s, "margin": 0.01 * s, "logprob_chosen": -20.0},
        None,
    ),
    "a reward model": (
        "chosen_falls",
        "pairs",
        {},
        lambda s: {"reward_chosen": -0.8 * (s > 5), "margin": 1.0 * (s > 5)},
        None,
    ),
    # 16 pairs a step: 100 of them take 7 steps.
    "too easy": ("too_easy", "pairs", {"optim.batch_size": 16}, lambda s: {"accuracy": 1.0, "epoch": 0.1}, 7),
    "easy after long": (
        "too_easy",
        "pairs",
        {"optim.batch_size": 16},
        lambda s: {"accuracy": since(17, 0.8, 1.0)(s), "epoch": 0.1},
        None,
    ),
    "seen before": ("too_easy", "pairs", {"optim.batch_size": 64}, lambda s: {"accuracy": 1.0, "epoch": 1.5}, None),
}
RETURNS = {1: 0.3, 20: 0.6, 40: 0.2, 60: 0.2}


@pytest.mark.parametrize("case", CASES)
def test_when_it_is_raised(case):
    name, learns_from, options, curve, expected = CASES[case]
    raised = alarms(curve, 60 if expected is None or expected < 60 else 110, learns_from, options)
    assert [step for step, found in raised if found == name][:1] == ([] if expected is None else [expected])
    assert {found for _, found in raised} <= {name}, "another warning than the one that the history is about"


def test_every_warning_has_a_case_a_limit_remedies_and_a_section_in_the_docs():
    assert set(NAMES) == set(CHECKS) == set(REMEDIES) == {case[0] for case in CASES.values()}
    assert set(GuardLimits.model_fields) == set(NAMES) - {"not_finite"}
    page = (ROOT / "docs" / "guards.md").read_text("utf-8")
    for name in NAMES:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        if name != "not_finite":
            assert f"{GuardLimits.model_fields[name].default:g}" in row, f"{name}: the page has another limit"


# --- real runs ---------------------------------------------------------------------------------------------------


def histories():
    """Runs of recipes/chain: metrics that guards look at, with the options that they ask for."""
    with gzip.open(Path(__file__).with_name("histories.jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


def raised_by(history) -> list[tuple[int, str]]:
    watch = Watch(GuardsSection(), history["learns_from"], history["options"])
    found = []
    for row in history["metrics"]:
        numbers = {name: math.nan if value is None else value for name, value in row.items() if name != "step"}
        found += [(alarm.step, alarm.name) for alarm in watch.see(row["step"], numbers)]
    return found


def test_runs_that_learnt_raise_nothing_and_the_one_that_fell_apart_is_caught():
    told = {history["run"]: raised_by(history) for history in histories()}
    assert {run: found for run, found in told.items() if run != "grpo_twin_0"} == {
        run: [] for run in ("grpo_0", "grpo_1", "grpo_2", "ppo_0", "ppo_1", "sft", "reward", "dpo_0", "dpo_1", "dpo_2")
    }
    # Its rewards were dealt out at random: 29 % of right answers at the start, 12 % by step 15 and 3 % at the end.
    assert told["grpo_twin_0"][0] == (15, "reward_collapse")
    assert {name for _, name in told["grpo_twin_0"]} == {"reward_collapse", "no_signal"}


def test_long_noisy_runs_that_are_healthy_raise_nothing():
    """Ten runs of 400 steps: reward and held-out return rise, entropy halves, lengths double, all of it noisily."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)

        def curve(step, rng=rng):
            done = 1 / (1 + math.exp(-8 * (step / 400 - 0.3)))
            right = 0.2 + 0.6 * done
            metrics = {
                "reward": right + 0.08 * rng.normal(),
                "reward_std": math.sqrt(right * (1 - right)),
                "entropy": 1.5 * (1 - 0.6 * done) * math.exp(0.25 * rng.normal()),
                "no_signal_share": min(max(0.1 + 0.4 * done + 0.12 * rng.normal(), 0), 1),
                "grad_norm": math.exp(0.6 * rng.normal()),
                "approx_kl": abs(0.02 * rng.normal()),
                "clip_fraction_low": 0.1 * rng.random(),
                "clip_fraction_high": 0.1 * rng.random(),
                "kl": 0.4 * done + 0.05 * rng.normal(),
                "reply_tokens": 60 * (1 + done) * math.exp(0.1 * rng.normal()),
                "distinct_2": 0.5 - 0.15 * done + 0.05 * rng.normal(),
                "value_loss": math.exp(-done + 0.4 * rng.normal()),
                "explained_variance": 0.6 * done + 0.1 * rng.normal(),
                "updates": 4,
            }
            if step % 20 == 0:
                value = right + 0.05 * rng.normal()
                metrics |= {"eval/return": value, "eval/low": value - 0.1, "eval/high": value + 0.1}
            return metrics

        found += alarms(curve, 400, options={"optim.max_grad_norm": 1.0, "optim.max_gap": 0.1}, first=0)
    assert found == []


# --- telling -----------------------------------------------------------------------------------------------------


def test_a_warning_is_told_once_again_while_it_lasts_and_anew_after_it_was_gone():
    def curve(step):
        gone = 300 <= step < 300 + CLEARED + 6  # the median of 5 needs 3 steps to leave, and 3 to come back
        return {"cut_share": 0.0 if gone or step == 50 else 0.9}

    steps = [step for step, _ in alarms(curve, 330)]
    assert steps == [5, 5 + AGAIN, 5 + 2 * AGAIN, 300 + CLEARED + 8]


def test_a_flicker_is_not_told_twice():
    # For six steps the median is below the limit: it is the same warning still.
    curve = lambda step: {"cut_share": 0.0 if 20 <= step < 26 else 0.9}  # noqa: E731
    assert [step for step, _ in alarms(curve, 80)] == [5]


def test_off_limits_and_stop_are_the_recipes():
    curve = lambda step: {"cut_share": 0.45, "failed_share": 0.5}  # noqa: E731
    assert [name for _, name in alarms(curve, 9)] == ["env_failures"]
    assert alarms(curve, 9, off=("env_failures",)) == []
    assert [name for _, name in alarms(curve, 9, limits=GuardLimits(length_limit=0.4))][1] == "length_limit"
    watch = Watch(GuardsSection(stop_on=("env_failures",)), "rollouts")
    told = [alarm for step in range(1, 6) for alarm in watch.see(step, {"failed_share": 0.5, "cut_share": 0.9})]
    assert [(alarm.name, alarm.stop) for alarm in told] == [("env_failures", True), ("length_limit", False)]
    assert "stopped by guards.stop_on: env_failures: 50% of the episodes" in told[0].reason_to_stop()
    assert "remove env_failures from guards.stop_on and resume" in told[0].reason_to_stop()


def test_a_record_is_plain_and_finite():
    watch = Watch(GuardsSection(), "rollouts", {"optim.learning_rate": 1e-5, "model.dtype": "auto"})
    [alarm] = watch.see(3, {"loss": math.nan, "grad_norm": math.inf})
    record = json.loads(json.dumps(alarm.record(), allow_nan=False))
    assert record["name"] == "not_finite"
    assert record["step"] == 3
    assert record["message"] == "loss is not finite."
    assert "lower optim.learning_rate (1e-05 here), by half to begin with" in record["remedies"]
    assert alarm.sentence().startswith("not_finite at step 3: loss is not finite. Try: `sapwood replay`")


def test_a_watch_that_is_saved_and_loaded_goes_on_as_if_nothing_had_been():
    for name in ("entropy", "hacked", "collapse", "overfit", "critic", "too easy"):
        _, learns_from, options, curve, _ = CASES[name]
        whole = Watch(GuardsSection(), learns_from, options)
        expected = [[alarm.record() for alarm in whole.see(step, curve(step))] for step in range(1, 120)]
        watch = Watch(GuardsSection(), learns_from, options)
        found = []
        for step in range(1, 120):
            found.append([alarm.record() for alarm in watch.see(step, curve(step))])
            state = json.loads(json.dumps(watch.state(), allow_nan=False))
            watch = Watch(GuardsSection(), learns_from, options)
            watch.load_state(state)
        assert found == expected
        assert watch.state() == whole.state()
        assert any(expected)


def test_memory_is_bounded():
    watch = Watch(GuardsSection(), "rollouts")
    sizes = {}
    for step in range(1, 2001):
        watch.see(step, dict.fromkeys(("reward", "entropy", "grad_norm", "unheard_of"), 0.123456789))
        sizes[step] = len(json.dumps(watch.state()))
    assert sizes[2000] < 1.1 * sizes[200] < 10_000


# --- recipes -----------------------------------------------------------------------------------------------------


def recipe(**guards):
    return parse_recipe(
        {
            "run": {"dir": "runs/x", "steps": 1},
            "env": {"name": "prompts", "items": [{"prompt": "a"}]},
            "rewards": [{"name": "exact_match"}],
            "algorithm": {"name": "grpo", "entropy_coef": 0.01},
            "guards": guards,
        }
    )


@pytest.mark.parametrize(
    ("guards", "told"),
    [
        ({"stop_on": ["kl_runawy"]}, r"did you mean 'kl_runaway'\?"),
        ({"off": ["entropy"]}, r"guards\.off\.0 is 'entropy'; it should be 'not_finite', .*'too_easy'"),
        ({"limits": {"kl_runaway_": 1}}, r"unknown key 'kl_runaway_' in guards\.limits; did you mean 'kl_runaway'\?"),
        ({"limits": {"kl_runaway": 0}}, r"guards\.limits\.kl_runaway is 0; it should be greater than 0"),
        ({"limits": {"no_signal": 1.5}}, r"guards\.limits\.no_signal is 1\.5; it should be less than or equal to 1"),
        ({"limits": {"no_signal": True}}, r"guards\.limits\.no_signal is True"),
        ({"stop_on": ["no_signal"], "off": ["no_signal"]}, r"guards\.stop_on and guards\.off both name no_signal"),
        ({"off": ["no_signal"], "limits": {"no_signal": 0.9}}, r"guards\.limits\.no_signal has no effect"),
        ({"max_skiped": 1}, r"did you mean 'max_skipped'\?"),
    ],
)
def test_a_wrong_section_is_told_with_the_nearest_name(guards, told):
    with pytest.raises(ConfigError, match=told):
        recipe(**guards)


def test_a_watch_of_a_recipe_knows_its_options_in_its_remedies():
    watch = Watch.of(recipe(limits={"length_limit": 0.2}), "rollouts")
    alarm = next(a for step in range(1, 9) for a in watch.see(step, {"cut_share": 0.3}))
    assert alarm.remedies[0] == "raise engine.max_new_tokens (32 here)"
    options = flat(recipe().model_dump(mode="json"))
    entropy = remedies_of("entropy_collapse", options)
    assert entropy[0] == "raise algorithm.entropy_coef (0.01 here), to 0.05 for example"
    assert "replace groups that can't teach: algorithm.dynamic_sampling=true (false here)" in entropy
    # What a recipe lacks (GRPO has no value_coef) or has already isn't advised.
    assert not any("value_coef" in remedy for remedy in remedies_of("value_divergence", options))
    options["algorithm.dynamic_sampling"] = True
    assert not any("dynamic_sampling" in remedy for remedy in remedies_of("entropy_collapse", options))


def test_every_option_that_a_remedy_names_exists():
    known = set()
    for algorithm in ("grpo", "ppo", "dpo", "kto", "sft", "reward", "rloo", "reinforce_pp"):
        data = {"data": "x.jsonl"} if algorithm in ("dpo", "kto", "sft", "reward") else {}
        world = {"env": {"name": "prompts", "items": [{"prompt": "a"}]}, "rewards": ["exact_match"]}
        given = {"run": {"dir": "runs/x", "steps": 1}, "algorithm": {"name": algorithm}, **(data or world)}
        known |= set(flat(parse_recipe(given).model_dump(mode="json")))
    for name, remedies in REMEDIES.items():
        for remedy in remedies:
            for option in re.findall(r"\{([\w.]+?)(?:=[^}]*)?\}", remedy):
                assert option in known, f"{name}: {option}"


# --- replies -----------------------------------------------------------------------------------------------------


def turn(ids, stop=StopReason.EOS, **info):
    logprobs = np.zeros(len(ids), np.float32)
    return Turn(np.zeros(1, np.int64), np.asarray(ids, np.int64), logprobs, logprobs, stop, "", info=info)


def test_metrics_of_replies():
    task = Task("t")
    same = Group(task, [Trajectory(task, [turn([1, 2, 3], parsed="json")]) for _ in range(3)])
    mixed = Group(
        task,
        [
            Trajectory(task, [turn([1, 2], StopReason.LENGTH, parsed="failed", fallback=True)]),
            Trajectory(task, [turn([5]), turn([6, 7, 6, 7], StopReason.CONTEXT, parsed="regex", fallback=False)]),
            Trajectory(task, [turn([1, 2], parsed="failed", fallback=True)]),
        ],
    )
    found = reply_metrics([same, mixed])
    # 7 replies of 3 3 3 2 1 4 2 tokens; two of them were cut.
    assert found["reply_tokens"] == pytest.approx(18 / 7)
    assert found["cut_share"] == pytest.approx(2 / 7)
    # Bigrams: 12 23 three times, 12, 67 76 67, 12: eleven, of which 12 23 67 76 are different.
    assert found["distinct_2"] == pytest.approx(4 / 11)
    # Three alike: 0. Three of which two are alike: (2 - 1) / (3 - 1).
    assert found["distinct_replies"] == pytest.approx(0.25)
    assert found["parse_failed_share"] == pytest.approx(2 / 6)
    assert found["fallback_share"] == pytest.approx(2 / 3)
    assert reply_metrics([same], sampled=False) == {"reply_tokens": 3.0}
    assert reply_metrics([]) == {"reply_tokens": 0.0}


def test_a_history_ignores_what_is_not_a_number():
    history = History("rollouts", {})
    for step, value in enumerate([1.0, math.nan, 2.0, math.inf, 3.0]):
        history.add(step, {"reward": value, "eval/return": value})
    assert history.of("reward").recent == [1.0, 2.0, 3.0]
    assert [one.value for one in history.held_out.last] == [1.0, 2.0, 3.0]
