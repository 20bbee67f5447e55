"""DPO's options, losses, metrics and AOT's sorting against numbers worked by hand; packing changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from sapwood.algorithms import Forward, Needs, RowBatch, Totals
from sapwood.algorithms.dpo import DPO, LossType
from sapwood.errors import DataError
from sapwood.plugins import load
from sapwood.types import Group, Row, Task

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms" / "dpo.md"
LOSSES: list[str] = [name for part in get_args(LossType) for name in (get_args(part) or (part,))]


def row(group: int, member: int, **arrays: Any) -> Row:
    """A reply whose tokens have these arrays, after a prompt of one token."""
    packed: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in arrays.items()}
    size = len(next(iter(packed.values())))
    mask = np.array([False] + [True] * size)
    return Row(np.arange(size + 1), mask, np.zeros(size, np.int32), group=group, member=member, **packed)


def groups(count: int) -> list[Group]:
    return [Group(Task(f"pair-{g}"), []) for g in range(count)]


def loss_of(algorithm: DPO, rows: list[Row], logprobs: list[float]) -> tuple[float, list[float], dict[str, float]]:
    """Loss, gradient and metrics of an update of one micro-batch."""
    new = torch.tensor(logprobs, requires_grad=True)
    output = algorithm.loss(Forward(new, torch.full_like(new, 0.5)), RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert new.grad is not None
    return float(output.loss.detach()), new.grad.tolist(), {k: float(v) for k, v in output.metrics.items()}


def options_for(name: str, **options: Any) -> dict[str, Any]:
    """What this loss can't do without."""
    return {"loss_type": name, **({"label_smoothing": 1e-3} if name == "exo_pair" else {}), **options}


# --- options --------------------------------------------------------------------------------------------------


def test_is_the_plugin() -> None:
    assert load("algorithm", "dpo") is DPO
    assert DPO.learns_from == "pairs"
    assert DPO.atomic


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": "sigmod"}, r"unknown loss_type 'sigmod': did you mean 'sigmoid'\?"),
        ({"loss_type": "IPO"}, r"unknown loss_type 'IPO': did you mean 'ipo'\?"),
        ({"loss_type": "zzz"}, "unknown loss_type 'zzz': known are sigmoid, robust"),
        ({"loss_type": "sigmoid_norm"}, "use loss_type: sigmoid with length_normalize: true"),
        ({"loss_type": "kto"}, "use algorithm: {name: kto}"),
        ({"loss_type": ["sigmoid", "sft"]}, "unknown loss_type"),
        ({"loss_type": {}}, "at least one loss"),
        ({"loss_type": {"sigmoid": 0}}, "positive finite weights"),
        ({"loss_type": {"sigmoid": 1, "simpo": 1}}, "simpo can't be mixed"),
        ({"loss_type": {"aot": 1, "ipo": 1}}, "aot can't be mixed"),
        ({"beta": 0}, "greater than 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing has no effect with loss_type: hinge"),
        ({"loss_type": "exo_pair"}, "infinite at label_smoothing: 0"),
        ({"f_divergence": "js", "loss_type": "nca_pair"}, "f_divergence: js has no effect with loss_type: nca_pair"),
        ({"f_divergence": "js", "loss_type": {"sigmoid": 1, "bco_pair": 1}}, "no effect with loss_type: bco_pair"),
        ({"f_divergence": "js", "reference_free": True}, "remove reference_free"),
        ({"f_alpha": 0.3}, "set f_divergence: alpha"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no effect with loss_type: sigmoid"),
        ({"simpo_alpha": 0.1}, "simpo_alpha has no effect"),
        ({"discopop_tau": 0.1}, "discopop_tau has no effect"),
        ({"reference_free": True, "loss_type": "simpo"}, "which has no reference"),
        ({"length_normalize": False, "loss_type": "orpo"}, "mean log-probabilities"),
        ({"sft_coef": 1.0, "loss_type": "orpo"}, "sft_coef has no effect with loss_type: orpo"),
        ({"loss_type": "aot", "reference_free": True}, "sorts against the reference"),
        ({"loss_type": "aot", "updates": 2}, "set epochs and updates to 1"),
        ({"group_size": 2}, "Extra inputs are not permitted"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DPO(**options)


def test_options_survive_a_resolved_recipe() -> None:
    """A run writes all its options, defaults included, and starts again from them."""
    for name in LOSSES:
        algorithm = DPO(**options_for(name))
        assert DPO(**algorithm.model_dump()) == algorithm


def test_needs() -> None:
    assert DPO().needs == Needs(reference_logprobs=True)
    for options in ({"loss_type": "simpo"}, {"loss_type": "orpo"}, {"reference_free": True}):
        assert DPO.model_validate(options).needs == Needs()
    assert DPO(loss_type="aot").needs == Needs(old_logprobs=True, reference_logprobs=True)


# --- loss -----------------------------------------------------------------------------------------------------


def one_pair(**reference: Any) -> tuple[list[Row], list[float]]:
    """Chosen: -1, -3 (reference -2, -3: log-ratio 1); rejected: -2 (reference -1: log-ratio -1)."""
    rows = [row(0, 0, reference_logprobs=[-2.0, -3.0]), row(0, 1, reference_logprobs=[-1.0])]
    return rows, [-1.0, -3.0, -2.0]


def test_dpo() -> None:
    # beta 0.5: m = 0.5 (1 + 1) = 1, -log s(1) = 0.313262, slope -0.5 s(-1) = -0.134471 by every chosen token.
    loss, gradient, metrics = loss_of(DPO(beta=0.5), *one_pair())
    assert loss == pytest.approx(0.313262, rel=1e-5)
    assert gradient == pytest.approx([-0.134471, -0.134471, 0.134471], rel=1e-5)
    assert metrics == pytest.approx(
        {
            "loss": 0.313262,
            "preference_loss": 0.313262,
            "accuracy": 1.0,
            "margin": 1.0,
            "reward_chosen": 0.5,
            "reward_rejected": -0.5,
            "logprob_chosen": -4.0,
            "logprob_rejected": -2.0,
            "nll_chosen": 2.0,
            "entropy": 0.5,
        },
        rel=1e-5,
    )


def test_the_first_step_is_ln_2() -> None:
    generator = np.random.default_rng(0)
    rows, logprobs = [], []
    for g in range(16):
        for m in range(2):
            values = (-3.0 * generator.random(int(generator.integers(1, 40)))).astype(np.float32)
            rows.append(row(g, m, reference_logprobs=values))
            logprobs += values.tolist()
    for options in ({}, {"label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.2}, {"beta": 2.0}):
        loss, gradient, metrics = loss_of(DPO.model_validate(options), rows, logprobs)
        assert abs(loss - math.log(2.0)) < 1e-6
        assert metrics["margin"] == 0.0
        assert metrics["accuracy"] == 0.5
        assert gradient[0] != 0.0


@pytest.mark.parametrize(
    ("options", "expected"),
    # beta 0.5. Log-ratios 1 and -1, lengths 2 and 1; log-probabilities -4 and -2, means -2 and -2.
    [
        ({"label_smoothing": 0.1}, 0.413262),  # 0.9 * 0.313262 + 0.1 * 1.313262
        ({"length_normalize": True}, 0.386871),  # m = 0.5 (0.5 + 1): -log s(0.75)
        ({"loss_type": "ipo"}, (0.5 + 1.0 - 1.0) ** 2),
        ({"loss_type": "ipo", "length_normalize": False}, (1.0 + 1.0 - 1.0) ** 2),
        ({"loss_type": "hinge"}, 0.0),
        ({"reference_free": True}, 1.313262),  # m = 0.5 (-4 + 2) = -1
        ({"sft_coef": 0.25}, 0.313262 + 0.25 * 2.0),
        ({"loss_type": {"sigmoid": 2.0, "apo_zero": 0.5}}, 2 * 0.313262 + 0.5 * 2 * 0.377541),  # s(-0.5) = 0.377541
        # The chosen reply's second token beyond the shared length 1 weighs 0: -1 + 2 = 1 as before.
        ({"ld_alpha": 0.0}, 0.313262),
        ({"f_divergence": "js"}, 0.474077),  # log s(1) - log s(-1) = 1, m = 0.5: -log s(0.5)
        ({"loss_type": "simpo"}, 0.974077),  # means are equal: -log s(0 - 0.5)
        ({"loss_type": "simpo", "simpo_gamma": 1.0, "label_smoothing": 0.1}, 1.213262),
        ({"loss_type": "orpo"}, 2.0 + 0.5 * math.log(2.0)),  # equal odds
    ],
)
def test_options(options: dict[str, Any], expected: float) -> None:
    assert loss_of(DPO(beta=0.5, **options), *one_pair())[0] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_ld_alpha_weighs_what_is_beyond_the_shared_length() -> None:
    # Chosen tokens' log-ratios 1 and 4, the second beyond the rejected reply's one token: 1 + 0.5 * 4 = 3, less -1.
    rows = [row(0, 0, reference_logprobs=[-2.0, -5.0]), row(0, 1, reference_logprobs=[-1.0])]
    loss, gradient, metrics = loss_of(DPO(beta=1.0, ld_alpha=0.5), rows, [-1.0, -1.0, -2.0])
    assert loss == pytest.approx(math.log1p(math.exp(-4.0)), rel=1e-5)
    assert gradient[1] == pytest.approx(0.5 * gradient[0])
    assert metrics["reward_chosen"] == pytest.approx(3.0)
    assert metrics["logprob_chosen"] == pytest.approx(-1.5)


def test_turns_of_a_reply_are_one_sequence() -> None:
    """Scored tokens of several turns, the user's between them, add up."""
    mask, turn = np.array([False, True, False, True]), np.array([0, 1], np.int32)
    reference = np.array([-2.0, -3.0], np.float32)
    several = Row(np.arange(4), mask, turn, reference_logprobs=reference, group=0, member=0)
    rows, logprobs = one_pair()
    assert loss_of(DPO(), [several, rows[1]], logprobs) == loss_of(DPO(), rows, logprobs)


def test_far_pairs_stay_finite() -> None:
    rows = [row(0, 0, reference_logprobs=[0.0]), row(0, 1, reference_logprobs=[0.0])]
    for name in LOSSES:
        for logprobs in ([-5000.0, 0.0], [0.0, -5000.0]):
            algorithm = DPO(**options_for(name, beta=0.5))
            for each, value in zip(rows, logprobs, strict=True):
                each.old_logprobs = np.array([value], np.float32)
            algorithm.credit(groups(1), rows)
            loss, gradient, _ = loss_of(algorithm, rows, logprobs)
            assert math.isfinite(loss), name
            assert all(math.isfinite(value) for value in gradient), name
    # The worst pair of all still pushes with its full weight.
    assert loss_of(DPO(beta=0.5), rows, [-5000.0, 0.0])[1] == [-0.5, 0.5]


def test_missing_scores_are_named() -> None:
    rows = [row(0, 0, advantages=[0.0]), row(0, 1, advantages=[0.0])]
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        loss_of(DPO(), rows, [0.0, 0.0])
    with pytest.raises(ValueError, match="needs old_logprobs"):
        DPO(loss_type="aot").credit(groups(1), rows)


def test_credit_leaves_broken_pairs_out() -> None:
    rows = [row(0, 0, advantages=[0.0]), row(1, 0, advantages=[0.0]), row(1, 1, advantages=[0.0])]
    kept, metrics = DPO().credit(groups(2), rows)
    assert kept == rows[1:]
    assert metrics == {"incomplete_share": 0.5}
    with pytest.raises(DataError, match="two unbroken conversations"):
        DPO().credit(groups(2), [*rows, rows[0]])


# --- AOT ------------------------------------------------------------------------------------------------------


def three_pairs() -> tuple[list[Row], list[float]]:
    """One token each. log-ratios of chosen: 3, 1, 2; of rejected: 0, 2, -1; references -1, -2, ..., -6."""
    logprobs = [3.0 - 1.0, 0.0 - 2.0, 1.0 - 3.0, 2.0 - 4.0, 2.0 - 5.0, -1.0 - 6.0]
    rows = [row(i // 2, i % 2, old_logprobs=[value], reference_logprobs=[-1.0 - i]) for i, value in enumerate(logprobs)]
    return rows, logprobs


def aot_loss(name: str, sizes: tuple[int, ...] = (6,)) -> tuple[float, list[float]]:
    """Loss and gradient of the three pairs, in micro-batches of these sizes."""
    rows, logprobs = three_pairs()
    algorithm = DPO.model_validate({"loss_type": name, "beta": 1.0})
    kept, _ = algorithm.credit(groups(3), rows)
    new, loss, start = torch.tensor(logprobs, requires_grad=True), 0.0, 0
    for size in sizes:
        micro = slice(start, start + size)
        output = algorithm.loss(Forward(new[micro]), RowBatch.of(kept[micro]), Totals.of(kept))
        output.loss.backward()
        loss, start = loss + float(output.loss.detach()), start + size
    assert new.grad is not None
    return loss, new.grad.tolist()


def test_aot_unpaired_compares_ranks() -> None:
    # Sorted chosen (1, 2, 3) against sorted rejected (-1, 0, 2): differences 2, 2, 1.
    loss, gradient = aot_loss("aot_unpaired")
    two, one = math.log1p(math.exp(-2.0)), math.log1p(math.exp(-1.0))
    assert loss == pytest.approx((two + two + one) / 3, rel=1e-6)
    # Chosen 3 (pair 0) meets rejected 2 (pair 1): both have the slope of the difference 1; all else that of 2.
    near, far = 1 / (1 + math.exp(1.0)) / 3, 1 / (1 + math.exp(2.0)) / 3
    assert gradient == pytest.approx([-near, far, -far, near, -far, far], rel=1e-5)


def test_aot_compares_ranks() -> None:
    # log pi chosen - rejected: 2 + 2 = 4, -2 + 2 = 0, -3 + 7 = 4; of the reference 1, 1, 1: differences 3, -1, 3.
    loss, gradient = aot_loss("aot")
    assert loss == pytest.approx((2 * math.log1p(math.exp(-3.0)) + math.log1p(math.exp(1.0))) / 3, rel=1e-6)
    far, wrong = 1 / (1 + math.exp(3.0)) / 3, 1 / (1 + math.exp(-1.0)) / 3
    assert gradient == pytest.approx([-far, far, -wrong, wrong, -far, far], rel=1e-5)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorting_is_over_the_batch_not_the_micro_batch(name: str) -> None:
    whole, parts = aot_loss(name), aot_loss(name, (2, 4))
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)


# --- packing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*map(options_for, LOSSES), {"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2}}])
def test_packing_changes_nothing(options: dict[str, Any]) -> None:
    """Micro-batches of whole pairs sum to the update's loss, gradient and metrics."""
    generator = np.random.default_rng(11)
    rows = []
    for i, size in enumerate(generator.integers(1, 7, 12).tolist()):
        names = ("reference_logprobs", "old_logprobs")
        rows.append(row(i // 2, i % 2, **{name: -generator.random(size) for name in names}))
    extra: dict[str, Any] = {} if options["loss_type"] == "orpo" else {"sft_coef": 0.5}
    algorithm = DPO(**options, ld_alpha=0.7, **extra)
    algorithm.credit(groups(6), rows)
    totals, logprobs = Totals.of(rows), -torch.rand(sum(r.scored for r in rows))
    results = []
    for size in (12, 8, 2):
        new, loss, metrics, start = logprobs.clone().requires_grad_(), 0.0, dict[str, float](), 0
        for first in range(0, 12, size):
            micro = rows[first : first + size]
            stop = start + sum(r.scored for r in micro)
            output = algorithm.loss(Forward(new[start:stop], -new[start:stop]), RowBatch.of(micro), totals)
            output.loss.backward()
            loss += float(output.loss.detach())
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in output.metrics.items()}
            start = stop
        results.append((loss, metrics, new.grad))
    assert results[0][2].abs().sum() > 0.0
    for part in results[1:]:
        assert part[0] == pytest.approx(results[0][0], rel=1e-5)
        assert part[1] == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(part[2], results[0][2], rtol=1e-5, atol=1e-7)


# --- the document ---------------------------------------------------------------------------------------------


def test_presets_of_the_document_are_valid() -> None:
    lines = [line for line in DOCUMENT.read_text().splitlines() if "{name: dpo" in line]
    presets = [yaml.safe_load(line[line.index("{name") : line.rindex("}") + 1]) for line in lines]
    assert len(presets) >= 6
    for preset in presets:
        assert preset.pop("name") == "dpo"
        DPO(**preset)


def test_every_option_loss_and_metric_is_documented() -> None:
    text = DOCUMENT.read_text()
    logged = {"incomplete_share", *loss_of(DPO(), *one_pair())[2]}
    names = [*DPO.model_fields, *LOSSES, *logged]
    assert [name for name in names if f"`{name}`" not in text] == []
