"""From a recipe to the parts of a run: what has no effect is refused, and what limits lengths does so everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood import checkpoint
from sapwood.config import parse_recipe
from sapwood.errors import ConfigError, DataError, TrainingStopped
from sapwood.models.load import load_policy
from sapwood.models.roles import Models
from sapwood.parts import Parts, build
from sapwood.progress import Progress
from sapwood.run import Run
from sapwood.sections import LoraSection, ModelSection
from sapwood.train import Trainer
from tests.learning import save_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    words = ("lamp", "table")
    pairs = [{"prompt": f"{i} {words[i % 2]}", "chosen": words[i % 2], "rejected": words[1 - i % 2]} for i in range(20)]
    prompts = [{"prompt": "go " * (30 if i % 2 else 1) + str(i), "answer": "go"} for i in range(20)]
    labels = [{"prompt": f"{i} lamp", "completion": words[i % 2], "label": i % 2 == 0} for i in range(20)]
    for name, records in (("pairs", pairs), ("prompts", prompts), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def recipe(model_dir, files, folder, algorithm="dpo", **changes):
    name = {"dpo": "pairs", "kto": "labels"}.get(algorithm, "prompts")
    data: dict[str, Any] = {
        "run": {"dir": str(folder), "steps": 3, "seed": 1},
        "model": {"name": str(model_dir), "lora": {"rank": 4}},
        "data": {"path": str(files / f"{name}.jsonl"), "eval_fraction": 0.3},
        "algorithm": {"name": algorithm},
        "optim": {"batch_size": 4},
        "eval": {"at_start": False},
    }
    if algorithm == "grpo":
        data |= {"rewards": ["exact_match"], "engine": {"max_new_tokens": 4}}
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(data)


def built(model_dir, files, folder, algorithm="dpo", **changes) -> Parts:
    with Progress() as progress:
        return build(recipe(model_dir, files, folder, algorithm, **changes), folder, progress)


def test_watching_what_is_never_measured_is_refused_before_the_first_step(model_dir, files, tmp_path):
    watch = {"eval": {"every": 1}, "data": {"eval_fraction": 0}}
    for algorithm, metric in (("grpo", "eval/return"), ("dpo", "eval/loss")):
        with pytest.raises(ConfigError, match=f"early_stopping watches {metric}, but no data is held out"):
            built(model_dir, files, tmp_path, algorithm, early_stopping={"patience": 2}, **watch)
    with pytest.raises(ConfigError, match="schedule: plateau watches eval/return, but no data is held out"):
        built(model_dir, files, tmp_path, "grpo", optim={"schedule": "plateau"}, **watch)
    with pytest.raises(ConfigError, match=r"eval\.metrics measure held-out replies, but no data is held out"):
        built(model_dir, files, tmp_path, "grpo", data={"eval_fraction": 0}, eval={"metrics": ["response_length"]})


def test_prompts_that_are_too_long_are_not_rolled_out(model_dir, files, tmp_path):
    parts = built(model_dir, files, tmp_path, "grpo", data={"max_prompt_length": 80}, optim={"batch_size": 14})
    groups = parts.source.groups(1)
    assert 0 < len(groups) < 14
    assert max(t.turns[0].prompt_ids.size for group in groups for t in group.trajectories) <= 80
    assert parts.source.counts() == {"dropped for a long prompt": 14 - len(groups)}
    assert parts.tasks is not None
    assert all(len(task.prompt[0].content) < 60 for task in parts.tasks.tasks)
    assert parts.source.counts() == {"dropped for a long prompt": 14 - len(groups)}  # those held out are no part of it


def test_prompts_none_of_which_fits_are_an_error(model_dir, files, tmp_path):
    parts = built(model_dir, files, tmp_path, "grpo", data={"max_prompt_length": 3, "eval_fraction": 0})
    assert parts.source.groups(1) == []
    with pytest.raises(DataError, match="none of the first 20 records fits"):
        parts.source.groups(5)


def test_records_end_at_the_models_context(model_dir, files, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.max_length \(300\) is more than the model's context of 256 tokens"):
        built(model_dir, files, tmp_path, data={"max_length": 300})
    long = tmp_path / "long.jsonl"
    records = [{"prompt": f"{i} go", "chosen": "lamp " * (300 if i % 2 else 1), "rejected": "go"} for i in range(8)]
    long.write_text("".join(json.dumps(record) + "\n" for record in records))
    parts = built(model_dir, files, tmp_path, data={"path": str(long), "eval_fraction": 0}, optim={"batch_size": 8})
    assert len(parts.source.groups(1)) == 4
    assert parts.source.counts() == {"dropped for a long reply": 4}


def test_an_adapter_that_goes_on_keeps_its_rank(model_dir, files, tmp_path):
    policy = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=4)))
    checkpoint.save(policy, tmp_path / "sft", 1, keep=1)
    start = {"init_from": str(tmp_path / "sft")}
    with pytest.raises(ConfigError, match=r"model\.lora\.rank is 8, but .* whose rank is 4"):
        built(model_dir, files, tmp_path, model={**start, "lora": {"rank": 8}})
    with pytest.raises(ConfigError, match=r"model\.lora is null, .* is an adapter"):
        built(model_dir, files, tmp_path, model={**start, "lora": None})
    assert built(model_dir, files, tmp_path, model=start).policy.model.peft_config["default"].r == 4


def test_a_reference_on_the_policys_base_shares_it(model_dir, files, tmp_path):
    other = load_policy(ModelSection(name=str(model_dir), lora=LoraSection(rank=2)))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    checkpoint.save(other, tmp_path / "sft", 1, keep=1)
    parts = built(model_dir, files, tmp_path, reference={"init_from": str(tmp_path / "sft")})
    models = parts.models
    assert models.reference is not None
    assert models.reference.model is parts.policy.model
    assert not any(p.requires_grad for p in models.reference.trunk_parameters())
    from sapwood.models.roles import Models
    from sapwood.ops.batch import Needs
    from tests.conftest import make_row

    alone, shared = make_row([1, 5, 9, 4], [1, 2, 3]), make_row([1, 5, 9, 4], [1, 2, 3])
    Models(other).score([[alone]], Needs(old_logprobs=True))
    models.score([[shared]], Needs(reference_logprobs=True))
    assert shared.reference_logprobs == pytest.approx(alone.old_logprobs, abs=1e-6)


def trainer(model_dir, files, folder, algorithm, **changes) -> Trainer:
    asked = recipe(model_dir, files, folder, algorithm, **changes)
    with Run.create(asked) as run, Progress() as progress:
        return Trainer.of(asked, run, progress)


def test_evaluation_leaves_ktos_reference_point_alone(model_dir, files, tmp_path):
    made = trainer(model_dir, files, tmp_path / "run", "kto")
    made.algorithm.load_state({"kl": 0.25, "estimated": False})
    assert "eval/loss" in made._evaluate("x")
    assert made.algorithm.state() == {"kl": 0.25, "estimated": False}


def test_kto_takes_the_reference_of_its_records_from_the_file(model_dir, files, tmp_path, monkeypatch):
    losses = []
    for precompute in (False, True):
        changes = {"reference": {"precompute": True}} if precompute else {}
        made = trainer(model_dir, files, tmp_path / f"run{precompute}", "kto", **changes)
        if made.parts.reference_cache is not None:
            made.parts.reference_cache.build(made.learner.scored, made.learner.pack)
        scored: list[int] = []
        score = made.models.score

        def spy(batches, needs, score=score, scored=scored):
            scored += [row.member for rows in batches for row in rows if needs.reference_logprobs]
            score(batches, needs)

        monkeypatch.setattr(made.models, "score", spy)
        losses.append(made.step(1)[0]["loss"])
        assert (0 in scored) != precompute  # labelled replies are member 0, mismatched ones member 1
        assert 1 in scored
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_gradient_that_no_loss_scale_saves_stops_the_run(model_dir, files, tmp_path):
    made = trainer(model_dir, files, tmp_path / "run", "dpo", model={"autocast": "float16"})
    overflow = {"grad_norm": float("inf"), "loss": 1.0}
    assert made.learner._is_finite({**overflow, "loss_scale": 1024.0})  # expected now and then
    with pytest.raises(TrainingStopped, match=r"not finite even at a loss scale of 0\.5"):
        made.learner._is_finite({**overflow, "loss_scale": 0.5})


def test_a_watched_metric_that_was_seen_may_be_missing(model_dir, files, tmp_path):
    made = trainer(model_dir, files, tmp_path / "run", "dpo", early_stopping={"metric": "sometimes", "patience": 1})
    with pytest.raises(ConfigError, match="no metric 'sometimes' is measured"):
        made._see({"updates": 1.0, "loss": 1.0}, evaluated=False)
    assert not made._see({"updates": 1.0, "sometimes": 1.0}, evaluated=False)
    assert not made._see({"updates": 1.0}, evaluated=False)


def test_a_reference_of_its_own_is_freed_once_every_record_has_been_scored(model_dir, files, tmp_path, monkeypatch):
    asked: list[bool] = []
    score = Models.score

    def spy(self, batches, needs):
        asked.append(needs.reference_logprobs and bool(batches))
        score(self, batches, needs)

    monkeypatch.setattr(Models, "score", spy)
    found = []
    for precompute in (False, True):
        changes = {"reference": {"precompute": True}} if precompute else {}
        made = trainer(model_dir, files, tmp_path / f"run{precompute}", "dpo", model={"lora": None}, **changes)
        if made.parts.reference_cache is not None:
            made.parts.reference_cache.build(made.learner.scored, made.learner.pack)
        assert (made.models.reference is None) == precompute
        asked.clear()
        measured = made._evaluate("before")
        losses = [made.step(1)[0]["loss"], made.step(2)[0]["loss"]]
        again = made._evaluate("after")
        found.append((measured["eval/loss"], *losses, again["eval/loss"]))
        # Without the file, what is held out is asked for at the first evaluation, and every step asks for its own.
        assert any(asked) != precompute
        assert not asked[-1]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] == pytest.approx(math.log(2), rel=1e-5)
    assert found[0][3] != found[0][0]


def test_a_step_that_sees_more_records_than_there_are_is_noted(model_dir, files, tmp_path):
    told = "optim.batch_size x optim.gradient_accumulation is 16, more than the 14 records"
    parts = built(model_dir, files, tmp_path, optim={"batch_size": 8, "gradient_accumulation": 2})
    assert any(note.startswith(told) for note in parts.notes)
    assert not any("is 14, more" in note for note in built(model_dir, files, tmp_path, optim={"batch_size": 14}).notes)


def test_prompts_without_room_name_it(model_dir, files, tmp_path):
    # 256 tokens of context less 250 for the reply.
    parts = built(model_dir, files, tmp_path, "grpo", engine={"max_new_tokens": 250})
    assert parts.tasks is not None
    with pytest.raises(ConfigError, match=r"none of 6 held-out prompts is within 6 tokens, .* engine.max_new_tokens"):
        _ = parts.tasks.tasks


def test_a_reward_that_fails_to_get_ready_is_told(model_dir, files, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from sapwood import Reward\n"
        "class Mine(Reward):\n"
        "    def bind(self, models):\n"
        "        raise KeyError('weights')\n"
        "    def score(self, groups):\n"
        "        return []\n"
    )
    with pytest.raises(
        DataError, match=r"bind of 'Mine' raised KeyError \('weights'\) at .*mine.py line 4; fix it there"
    ):
        built(model_dir, files, tmp_path / "run", "grpo", rewards=[f"{mine}:Mine"])
