"""`sapwood eval`: base, start and trained on the same tasks, records and text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sapwood.compare import recipe_for, run_eval, text_perplexity, with_metrics
from sapwood.config import parse_recipe
from sapwood.errors import ConfigError, DataError, ModelError
from sapwood.evaluate import run_rollout
from sapwood.opening import load_policy, locate
from sapwood.sections import ModelSection
from sapwood.train import train
from tests.learning import save_tiny_model

PAIRS = [{"prompt": f"say {i}", "chosen": f"the lamp {i}", "rejected": f"a room {i}"} for i in range(8)]
SHORT = {"trackers": [], "samples": {"every": 0}, "optim": {"learning_rate": 1e-2, "batch_size": 4}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAPWOOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def recipe_of(folder, model_dir, algorithm, pairs, **more):
    made = {
        "run": {"dir": str(folder), "steps": 3},
        "model": {"name": str(model_dir), "lora": {"rank": 2}},
        "data": {"path": str(pairs), "eval_fraction": 0.25},
        "algorithm": algorithm,
        **SHORT,
    }
    return parse_recipe({**made, **more})


@pytest.fixture(scope="module")
def dpo(model_dir, pairs, tmp_path_factory):
    recipe = recipe_of(tmp_path_factory.mktemp("runs") / "dpo", model_dir, {"name": "dpo"}, pairs)
    train(recipe)
    return recipe


def test_a_dpo_run_is_measured_as_in_training(dpo):
    found = run_eval(dpo, dpo.run.dir).records
    assert found is not None
    base, trained = found.results["base"], found.results["trained"]
    # policy = reference: every log-ratio is 0, so the loss is -log sigmoid(0) = ln 2, and equal rewards count half
    assert base["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (base["margin"], base["accuracy"]) == (0.0, 0.5)
    assert trained["margin"] != 0.0
    logged = [json.loads(line) for line in (dpo.run.dir / "metrics.jsonl").read_text().splitlines()][-1]
    for name in ("loss", "logprob_chosen", "nll_chosen"):
        assert trained[name] == pytest.approx(logged[f"eval/{name}"], abs=1e-5)
    # the mean over records of what each has by itself is that of all together
    difference = found.differences["trained", "base"]["loss"]
    assert difference.n == 2
    assert difference.mean == pytest.approx(trained["loss"] - base["loss"], abs=1e-6)
    assert json.loads(json.dumps(found.to_json()))["held_out"]["differences"]


def test_two_runs_stand_beside_each_other(dpo, model_dir, pairs, tmp_path):
    other = recipe_of(tmp_path / "sft", model_dir, {"name": "sft"}, pairs)
    train(other)
    found = run_eval(dpo, [str(dpo.run.dir), other.run.dir], 1).records
    assert found is not None
    assert list(found.results) == ["base", "dpo", "sft"]
    assert list(found.differences) == [("dpo", "base"), ("sft", "base")]
    assert next(iter(found.differences.values()))["loss"].n == 1
    with pytest.raises(ConfigError, match="the same adapter is given twice"):
        run_eval(dpo, [other.run.dir, other.run.dir])
    with pytest.raises(ModelError, match="holds no adapter or model"):
        run_eval(dpo, tmp_path)
    # from SFT on: what DPO was held to is what it started from
    chained = dpo.model_copy(update={"model": dpo.model.model_copy(update={"init_from": other.run.dir})})
    found = run_eval(chained, dpo.run.dir).records
    assert found is not None
    assert list(found.results) == ["base", "start", "trained"]
    assert found.results["start"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found.results["base"]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert list(found.differences) == [("base", "start"), ("trained", "start")]


def test_a_file_takes_the_place_of_the_held_out_records(dpo, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:3]))
    found = run_eval(dpo, data=other).records
    assert found is not None
    assert "3 held-out records" in found.heading
    with pytest.raises(DataError, match="there is no file"):
        run_eval(dpo, data=tmp_path / "none.jsonl")


def test_a_reward_model_is_measured_by_its_head(model_dir, pairs, tmp_path):
    recipe = recipe_of(tmp_path / "reward", model_dir, {"name": "reward"}, pairs)
    train(recipe)
    found = run_eval(recipe, recipe.run.dir).records
    assert found is not None
    logged = [json.loads(line) for line in (tmp_path / "reward" / "metrics.jsonl").read_text().splitlines()]
    assert found.results["base"]["margin"] == pytest.approx(logged[0]["eval/margin"], abs=1e-5)
    assert found.results["trained"]["margin"] == pytest.approx(logged[-1]["eval/margin"], abs=1e-5)


def test_a_head_that_was_never_trained_is_not_measured(model_dir, pairs):
    recipe = recipe_for(locate(model_dir), pairs, "reward")
    with pytest.raises(ModelError, match=r"has no trained scalar head, so its scores would be drawn at random"):
        run_eval(recipe, data=pairs, base_name="tiny")


def test_records_beyond_the_models_context_are_left_out_and_counted(dpo, tmp_path):
    # A letter is at least a token, and the tiny model's context is 256.
    long = {"prompt": "z" * 300, "chosen": "the lamp", "rejected": "a room"}
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(pair) + "\n" for pair in [*PAIRS[:3], long]))
    found = run_eval(dpo, data=other).records
    assert found is not None
    assert "dpo: 3 held-out records, 1 dropped for a long prompt" in found.heading


def test_any_model_is_measured_on_a_file(model_dir, pairs):
    origin = locate(model_dir)
    found = run_eval(recipe_for(origin, pairs), data=pairs, base_name="tiny").records
    assert found is not None
    assert list(found.results) == ["tiny"]
    assert found.results["tiny"]["perplexity"] == pytest.approx(math.exp(found.results["tiny"]["nll"]))
    with pytest.raises(ConfigError, match="learns from rollouts"):
        recipe_for(origin, pairs, "grpo")


def test_tasks_are_played_by_all_with_the_same_seeds(dpo, model_dir, tmp_path):
    recipe = parse_recipe(
        {
            "run": {"dir": str(tmp_path / "run"), "steps": 1},
            "model": {"name": str(model_dir), "lora": {"rank": 2}},
            "env": {"name": "tests.worlds:Guess", "limit": 2},
            "algorithm": {"name": "grpo", "group_size": 2},
            "engine": {"name": "scripted", "reply": ["1", "3"]},
            "eval": {"tasks": 3, "at_start": False},
            **SHORT,
        }
    )
    table = run_eval(recipe, dpo.run.dir).returns
    assert table is not None
    assert [result.name for result in table.results] == ["one by one", "first only", "base", "trained"]
    assert table.difference is not None
    assert (table.difference.mean, table.difference.n) == (0.0, 3)  # the script says the same for both
    assert [r.name for r in run_eval(recipe, count=2).returns.results] == ["one by one", "first only", "base"]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="this one plays an env"):
        run_eval(recipe, data=Path("x.jsonl"))
    with pytest.raises(ConfigError, match="unknown metric 'pass_at_kk'"):
        with_metrics(recipe, [{"name": "pass_at_kk"}])


def test_the_prompts_of_data_are_played(model_dir, pairs, tmp_path):
    recipe = recipe_of(
        tmp_path / "run",
        model_dir,
        {"name": "grpo", "group_size": 2},
        pairs,
        rewards=[{"name": "length", "rate": 1.0, "unit": "words"}],
        engine={"name": "scripted", "reply": ["a b c"]},
    )
    table = run_eval(recipe).returns
    assert table is not None
    [base] = table.results
    assert list(base.returns.values()) == [-3.0, -3.0]  # three words, -1 for each
    assert list(run_rollout(recipe, "train", 3).returns.values()) == [-3.0] * 3


def by_hand(policy, ids):
    """-log p of every token but the first, one plain forward."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids])).logits[0]
    return -torch.log_softmax(logits.double(), -1)[range(len(ids) - 1), ids[1:]].numpy()


def test_the_perplexity_of_text(model_dir, tmp_path):
    policy = load_policy(ModelSection(name=str(model_dir), lora=None))
    text = "the lamp is on the table and you are in a room"
    ids = [policy.tokenizer.bos_token_id, *policy.tokenizer(text, add_special_tokens=False)["input_ids"]]
    whole = by_hand(policy, ids)
    found = text_perplexity(policy, [text])
    assert found["tokens"] == len(ids) - 1
    assert found["nll"] == pytest.approx(whole.mean(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(whole.mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(whole.sum() / math.log(2) / len(text), abs=1e-5)
    # windows of 8 that overlap by half: tokens 1..7 after the first ones, then 4 at a time after the 4 before
    parts, at = [by_hand(policy, ids[:8])], 8
    while at < len(ids):
        end = min(at + 4, len(ids))
        parts.append(by_hand(policy, ids[end - 8 : end])[-(end - at) :])
        at = end
    assert text_perplexity(policy, [text], window=8)["nll"] == pytest.approx(np.concatenate(parts).mean(), abs=1e-5)
    with pytest.raises(DataError, match="nothing to predict"):
        text_perplexity(policy, [""])
    file = tmp_path / "t.txt"
    file.write_text(text)
    table = run_eval(recipe_for(locate(model_dir), file), data=file).records
    assert table is not None
    assert table.results["base"]["nll"] == found["nll"]
