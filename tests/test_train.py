"""The loop end to end on a tiny model: it learns, its twin doesn't, and what it leaves opens elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapwood.config import parse_recipe
from sapwood.errors import ConfigError, EnvError, TrainingStopped
from sapwood.learner import split_updates
from sapwood.models.load import load_policy
from sapwood.ops.schedules import learning_rate
from sapwood.progress import Progress
from sapwood.run import Run
from sapwood.train import Trainer, train
from tests.conftest import make_row
from tests.learning import save_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def recipe_for(model_dir, run_dir, **changes):
    data = {
        "run": {"dir": str(run_dir), "steps": 25, "seed": 1},
        "model": {"name": str(model_dir), "lora": None},
        "env": {"name": "prompts", "items": [{"prompt": "go"}, {"prompt": "say"}, {"prompt": "the lamp"}]},
        "rewards": [{"name": "tests.learning:LowTokens"}],
        "algorithm": {"name": "grpo", "group_size": 8},
        "engine": {"name": "local", "max_new_tokens": 6, "ignore_eos": True},
        "optim": {"learning_rate": 1e-2, "batch_size": 4},
        "eval": {"tasks": 1, "at_start": False},
        "samples": {"every": 0},
    }
    for section, values in changes.items():
        data[section] = {**data[section], **values} if isinstance(values, dict) and section != "env" else values
    return parse_recipe(data)


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rewards_of(run_dir):
    return np.array([record["reward"] for record in metrics_of(run_dir) if record["step"]])


@pytest.mark.parametrize(("lora", "steps", "rate", "reached"), [(None, 25, 0.01, 0.85), ({"rank": 8}, 40, 0.01, 0.65)])
def test_it_learns(model_dir, tmp_path, lora, steps, rate, reached):
    changes = {"model": {"lora": lora}, "run": {"steps": steps}, "optim": {"learning_rate": rate}}
    train(recipe_for(model_dir, tmp_path / "run", **changes))
    rewards = rewards_of(tmp_path / "run")
    # 32 replies of 6 tokens a step: the standard error of a step's mean is at most .5 / sqrt(192) = .036.
    assert rewards[:3].mean() < 0.62
    assert rewards[-3:].mean() > reached


def test_shuffled_rewards_teach_nothing(model_dir, tmp_path):
    train(recipe_for(model_dir, tmp_path / "run", rewards=[{"name": "tests.learning:ShuffledLowTokens"}]))
    rewards = rewards_of(tmp_path / "run")
    # The policy wanders with the noise; what it must not do is improve (the learner above gains 0.4).
    assert rewards[-3:].mean() < rewards[:3].mean() + 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"updates": 2, "epochs": 2, "kl_coef": 0.01, "entropy_coef": 0.01, "gap_correction": "token"},
        {"dynamic_sampling": True, "baseline": "loo", "ratio_level": "sequence", "aggregation": "sequence"},
    ],
)
def test_options_run_through_the_loop(model_dir, tmp_path, options):
    train(recipe_for(model_dir, tmp_path / "run", run={"steps": 3}, algorithm=options))
    records = metrics_of(tmp_path / "run")
    assert [record["updates"] for record in records] == [options.get("updates", 1) * options.get("epochs", 1)] * 3
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    assert all(record["gap_k3"] < 1e-6 for record in records)
    if "kl_coef" in options:
        assert records[0]["kl"] > 0


def test_the_first_ratio_is_exactly_one(model_dir, tmp_path):
    train(recipe_for(model_dir, tmp_path / "run", run={"steps": 1}, algorithm={"epochs": 1, "updates": 2}))
    # Of two updates, the first has ratio 1 at every token, so its share of the mean ratio is exact.
    [record] = metrics_of(tmp_path / "run")
    assert record["approx_kl"] > 0
    train(recipe_for(model_dir, tmp_path / "one", run={"steps": 1}, algorithm={"kl_coef": 0.1, "kl_in": "reward"}))
    [record] = metrics_of(tmp_path / "one")
    assert record["ratio"] == 1.0
    assert record["approx_kl"] == 0.0


def test_the_reference_of_an_adapter_that_starts_at_zero_is_the_base(model_dir, tmp_path):
    changes = {"model": {"lora": {"rank": 4}}, "run": {"steps": 1}, "algorithm": {"kl_coef": 0.1}}
    train(recipe_for(model_dir, tmp_path / "run", **changes))
    assert metrics_of(tmp_path / "run")[0]["kl"] == 0.0


def test_an_adapter_continues_and_its_reference_is_where_it_started(model_dir, tmp_path):
    first = train(recipe_for(model_dir, tmp_path / "a", model={"lora": {"rank": 4}}, run={"steps": 3}))
    changes = {
        "model": {"lora": {"rank": 4}, "init_from": str(first.run_dir)},
        "run": {"steps": 2},
        "algorithm": {"kl_coef": 0.1},
    }
    recipe = recipe_for(model_dir, tmp_path / "b", **changes)
    started = load_policy(recipe.model)
    saved = load_file(first.policy_dir / "adapter_model.safetensors")
    for name, parameter in started.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, saved[name.replace(".default", "")])
    train(recipe)
    records = metrics_of(tmp_path / "b")
    assert records[0]["kl"] == 0.0  # measured before the first update, from where the adapter started
    assert records[1]["kl"] > 0.0


def test_runs_repeat_byte_for_byte(model_dir, tmp_path):
    for name in ("a", "b"):
        train(recipe_for(model_dir, tmp_path / name, run={"steps": 3}, samples={"every": 1}))
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    samples = sorted(path.name for path in (tmp_path / "a/samples").iterdir())
    assert samples == ["eval_000003.jsonl.gz", *(f"step_00000{step}.jsonl.gz" for step in (1, 2, 3))]
    for name in samples:
        assert (tmp_path / "a/samples" / name).read_bytes() == (tmp_path / "b/samples" / name).read_bytes()


def test_token_budget_changes_memory_not_numbers(model_dir, tmp_path):
    for name, budget in (("whole", 10_000), ("parts", 130)):
        train(recipe_for(model_dir, tmp_path / name, run={"steps": 2}, optim={"token_budget": budget}))
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_plain_rows_train_the_same(model_dir, tmp_path):
    for name, tree in (("tree", True), ("rows", False)):
        train(recipe_for(model_dir, tmp_path / name, run={"steps": 2}, model={"tree": tree}))
    for a, b in zip(metrics_of(tmp_path / "tree"), metrics_of(tmp_path / "rows"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_adapter_opens_in_transformers_and_peft_and_says_the_same(model_dir, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sapwood.engines import Request, Sampling
    from sapwood.engines.local import LocalEngine
    from sapwood.sections import ModelSection

    result = train(recipe_for(model_dir, tmp_path / "run", model={"lora": {"rank": 4}}))
    adapter = result.policy_dir
    assert str(tmp_path) not in json.dumps(json.loads((adapter / "adapter_config.json").read_text())["peft_type"])
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "go"}], add_generation_prompt=True)["input_ids"]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter).eval()
    expected = peft.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    policy = load_policy(ModelSection(name=str(model_dir), init_from=result.run_dir))
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    [reply] = LocalEngine(policy).generate([Request(0, np.array(ids), greedy, seed=0, episode="e")])
    assert reply.token_ids.tolist() == expected
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    assert base.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist() != expected


def test_a_gap_beyond_its_bound_stops_the_run(model_dir, tmp_path, monkeypatch):
    recipe = recipe_for(model_dir, tmp_path / "run", run={"steps": 2})
    with Run.create(recipe) as run, Progress() as progress:
        trainer = Trainer.of(recipe, run, progress)
        with torch.no_grad():  # the sampler keeps the weights that it loaded
            for parameter in trainer.policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        with pytest.raises(TrainingStopped, match=r"step 1: sampler and trainer disagree by .* nats a token"):
            trainer.run_all()


def test_an_environment_that_always_fails_is_one_sentence(model_dir, tmp_path):
    recipe = recipe_for(model_dir, tmp_path / "run", env={"name": "tests.learning:Broken"}, run={"steps": 1})
    with pytest.raises(EnvError, match="every episode failed"):
        train(recipe)


def test_greedy_sampling_cannot_teach(model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.temperature is 0"):
        train(recipe_for(model_dir, tmp_path / "run", engine={"temperature": 0.0}))


def test_updates_deal_whole_groups():
    rows = [make_row([1, 2], [1], group=g) for g in (0, 0, 1, 2, 2)]
    parts = split_updates(rows, 2, seed=3)
    assert sorted(len({row.group for row in part}) for part in parts) == [1, 2]
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
    assert all(not ({r.group for r in a} & {r.group for r in b}) for a in parts for b in parts if a is not b)
    assert len(split_updates(rows, 9, seed=0)) == 3


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 1, 0.5),  # warm-up of 2: 1/2 of the peak
        ("constant", 2, 1.0),
        ("constant", 9, 1.0),
        ("linear", 5, 0.1 + 0.9 * (1 - 3 / 9)),  # step 2 is at the peak, step 11 would be at the minimum
        ("cosine", 5, 0.1 + 0.9 * 0.75),  # (1 + cos(pi / 3)) / 2 = 3/4
        ("linear", 10, 0.1 + 0.9 / 9),
    ],
)
def test_schedules(schedule, step, expected):
    rate = learning_rate(step, peak=1.0, schedule=schedule, warmup=2, total=10, minimum=0.1)
    assert rate == pytest.approx(expected)
