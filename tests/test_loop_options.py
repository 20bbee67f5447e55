"""Options of the loop that every algorithm shares, on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sapwood.config import parse_recipe
from sapwood.errors import ConfigError, DataError
from sapwood.run import read_metrics
from sapwood.train import train
from tests.learning import save_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ("lamp", "table")
    records = [
        {"prompt": f"{i} {words[i % 2]}", "chosen": words[i % 2], "rejected": words[1 - i % 2]} for i in range(60)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def recipe(model_dir, pairs, folder, **changes):
    data = {
        "run": {"dir": str(folder), "steps": 6, "seed": 1},
        "model": {"name": str(model_dir), "lora": {"rank": 4}},
        "data": {"path": str(pairs), "eval_fraction": 0.3},
        "algorithm": {"name": "dpo"},
        "optim": {"learning_rate": 1e-2, "batch_size": 8},
        "eval": {"at_start": False},
        "samples": {"every": 0},
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(data)


def trained(model_dir, pairs, folder, **changes):
    train(recipe(model_dir, pairs, folder, **changes))
    return read_metrics(folder / "metrics.jsonl")


def losses(records):
    return [record["loss"] for record in records]


def test_epochs_are_passes_over_the_data(model_dir, pairs, tmp_path):
    records = trained(model_dir, pairs, tmp_path / "run", run={"steps": None, "epochs": 2})
    # 42 of 60 records are learnt from: 84 in two passes, 8 a step, makes 11 steps, the last into a third pass.
    assert len(records) == 11
    assert records[0]["epoch"] == pytest.approx(8 / 42)
    assert records[-1]["epoch"] == pytest.approx(88 / 42)


def test_accumulation_changes_no_number(model_dir, pairs, tmp_path):
    whole = trained(model_dir, pairs, tmp_path / "whole", optim={"batch_size": 8})
    parts = trained(model_dir, pairs, tmp_path / "parts", optim={"batch_size": 2, "gradient_accumulation": 4})
    np.testing.assert_allclose(losses(whole), losses(parts), rtol=2e-4)
    np.testing.assert_allclose(
        [r["grad_norm"] for r in whole], [r["grad_norm"] for r in parts], rtol=2e-3, err_msg="gradient norms"
    )


def test_a_precomputed_reference_changes_no_number(model_dir, pairs, tmp_path):
    direct = trained(model_dir, pairs, tmp_path / "direct")
    cached = trained(model_dir, pairs, tmp_path / "cached", reference={"precompute": True})
    np.testing.assert_allclose(losses(direct), losses(cached), rtol=1e-4)
    assert (tmp_path / "cached" / "reference" / "logprobs.f32").stat().st_size > 0


def test_a_reference_of_its_own_is_not_the_policy(model_dir, pairs, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=3)
    own = trained(model_dir, pairs, tmp_path / "own", run={"steps": 1}, reference={"name": str(other)})
    step_zero = trained(model_dir, pairs, tmp_path / "zero", run={"steps": 1})
    assert losses(step_zero)[0] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(losses(own)[0] - np.log(2)) > 1e-3


def test_early_stopping_ends_the_run_and_keeps_a_checkpoint(model_dir, pairs, tmp_path):
    changes = {
        "run": {"steps": 30},
        "optim": {"learning_rate": 1e-9},
        "eval": {"every": 2},
        "early_stopping": {"metric": "eval/loss", "patience": 2, "min_delta": 0.01},
    }
    records = trained(model_dir, pairs, tmp_path / "run", **changes)
    # Nothing improves: the first measurement (step 2) is the best, those of steps 4 and 6 are the second and last.
    assert records[-1]["step"] == 6
    assert (tmp_path / "run" / "checkpoints" / "step_000006" / "policy").is_dir()


def test_plateau_lowers_the_rate(model_dir, pairs, tmp_path):
    changes = {
        "run": {"steps": 8},
        "optim": {"learning_rate": 1e-9, "schedule": "plateau", "plateau_metric": "eval/loss", "plateau_patience": 0},
        "eval": {"every": 2},
    }
    rates = [record["learning_rate"] for record in trained(model_dir, pairs, tmp_path / "run", **changes)]
    # At step 4 the loss hasn't improved by much, if at all: what counts is that the rate only ever halves.
    assert set(np.round(np.log2(np.array(rates) / 1e-9), 6)) <= {0.0, -1.0, -2.0, -3.0}


@pytest.mark.parametrize("changes", [{"autocast": "bfloat16"}, {"autocast": "float16"}, {"dtype": "bfloat16"}])
def test_lower_precision_learns_too(model_dir, pairs, tmp_path, changes):
    records = trained(model_dir, pairs, tmp_path / "run", run={"steps": 15}, model=changes)
    assert all(np.isfinite(losses(records)))
    assert losses(records)[-1] < 0.6 < losses(records)[0]
    assert ("loss_scale" in records[0]) == (changes.get("autocast") == "float16")


def test_eight_bit_optimiser_and_checkpointing_learn(model_dir, pairs, tmp_path):
    changes = {"optim": {"name": "adamw_8bit"}, "model": {"gradient_checkpointing": True}, "run": {"steps": 15}}
    assert losses(trained(model_dir, pairs, tmp_path / "run", **changes))[-1] < 0.6


def test_checkpointing_changes_no_number(model_dir, pairs, tmp_path):
    plain = trained(model_dir, pairs, tmp_path / "plain")
    saved = trained(model_dir, pairs, tmp_path / "saved", model={"gradient_checkpointing": True})
    np.testing.assert_allclose(losses(plain), losses(saved), rtol=1e-5)


def test_a_metric_that_is_never_measured_is_an_error(model_dir, pairs, tmp_path):
    changes = {"eval": {"every": 1}, "early_stopping": {"metric": "eval/acuracy"}}
    with pytest.raises(ConfigError, match=r"no metric 'eval/acuracy' is measured; did you mean 'eval/accuracy'\?"):
        trained(model_dir, pairs, tmp_path / "a", **changes)
    with pytest.raises(ConfigError, match=r"eval\.every is 0"):
        trained(model_dir, pairs, tmp_path / "b", early_stopping={"metric": "eval/loss"})


def test_records_that_never_fit_are_an_error(model_dir, pairs, tmp_path):
    with pytest.raises(DataError, match="fits"):
        trained(model_dir, pairs, tmp_path / "run", data={"max_length": 3, "long_prompt": "drop"})


def test_a_run_repeats_byte_for_byte(model_dir, pairs, tmp_path):
    for name in ("a", "b"):
        trained(model_dir, pairs, tmp_path / name, run={"steps": 3})
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
