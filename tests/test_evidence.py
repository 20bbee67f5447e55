"""What is kept of an update that isn't finite, and what running it again says of where it began."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch

from sapwood import cli, evidence
from sapwood.algorithms.grpo import GRPO
from sapwood.config import parse_recipe
from sapwood.errors import StorageError
from sapwood.parts import build
from sapwood.progress import Progress
from sapwood.replay import replay
from sapwood.rollout import to_rows
from sapwood.train import train
from tests.learning import save_tiny_model


class Rooted(GRPO):
    """GRPO whose loss takes the root of a log-probability's difference from itself: 0, with a gradient of 0 * inf."""

    def loss(self, forward, batch, totals):
        output = super().loss(forward, batch, totals)
        nothing = (forward.logprobs - forward.logprobs).abs().sqrt().sum()
        return dataclasses.replace(output, loss=output.loss + nothing)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def recipe_for(model_dir, run_dir, **changes):
    data = {
        "run": {"dir": str(run_dir), "steps": 4, "seed": 1},
        "model": {"name": str(model_dir), "lora": None},
        "env": {"name": "prompts", "items": [{"prompt": "go"}, {"prompt": "say"}]},
        "rewards": [{"name": "tests.learning:LowTokens"}],
        "algorithm": {"name": "grpo", "group_size": 3, "epochs": 2},
        "engine": {"name": "local", "max_new_tokens": 6, "ignore_eos": True},
        "optim": {"learning_rate": 1e-2, "batch_size": 2, "token_budget": 80},
        "eval": {"tasks": 1, "at_start": False},
        "samples": {"every": 0},
        "trackers": [],
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(data)


class Batch:
    """A run's parts and one batch, scored and credited, of which evidence can be kept."""

    def __init__(self, recipe, folder):
        self.recipe, self.dir = recipe, folder
        self.parts = build(recipe, folder, Progress())
        self.groups = self.parts.source.groups(1)
        rows = to_rows(self.groups, 1.0)
        algorithm = self.parts.algorithm
        algorithm.begin(1, 4)
        rows += (extra := algorithm.augment(rows))
        self.parts.models.score([rows], algorithm.extra_needs if extra else algorithm.needs)
        self.rows, _ = algorithm.credit(self.groups, rows)

    def keep(self, step=1, update=1, rng=None, **numbers):
        return evidence.save(
            self.dir,
            self.recipe,
            self.parts.models,
            self.parts.algorithm,
            self.groups,
            self.rows,
            step=step,
            update=update,
            steps=4,
            numbers=numbers or {"loss": math.nan, "grad_norm": math.inf},
            token_budget=self.recipe.optim.token_budget,
            decode=lambda ids: self.parts.chat.decode(ids, skip_special_tokens=False),
            rng=rng,
        )

    def weight(self, name):
        return dict(self.parts.policy.model.named_parameters())[name].data


@pytest.fixture
def batch(model_dir, tmp_path):
    return Batch(recipe_for(model_dir, tmp_path / "run"), tmp_path / "run")


# --- keeping -----------------------------------------------------------------------------------------------------


def test_everything_comes_back(batch):
    batch.rows[1].reference_logprobs = np.arange(batch.rows[1].scored, dtype=np.float32)  # an array of one row alone
    folder = batch.keep(loss=math.nan, grad_norm=math.inf, entropy=1.5)
    assert folder.name == "step_000001_1"
    found = evidence.load(folder)
    assert (found.step, found.update, found.steps, found.token_budget) == (1, 1, 4, 80)
    assert math.isnan(found.numbers["loss"])
    assert (found.numbers["grad_norm"], found.numbers["entropy"]) == (math.inf, 1.5)
    assert [g.task.id for g in found.groups] == [g.task.id for g in batch.groups]
    assert found.recipe == batch.recipe
    for mine, theirs in zip(batch.rows, found.rows, strict=True):
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            assert (a is None) == (b is None), field.name
            assert a is None or (np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype), field.name
    texts = [json.loads(line) for line in (folder / evidence.TEXTS).read_text("utf-8").splitlines()]
    assert [text["task"] for text in texts] == [batch.groups[row.group].task.id for row in batch.rows]
    assert "user\ngo<|im_end|>" in texts[0]["text"]
    assert f"sapwood replay {folder}" in (folder / "README.txt").read_text()


def test_the_newest_stay_and_none_where_none_is_asked_for(model_dir, tmp_path):
    recipe = recipe_for(model_dir, tmp_path / "run", guards={"keep_evidence": 2})
    batch = Batch(recipe, tmp_path / "run")
    for step, update in ((9, 1), (10, 2), (10, 1), (100, 1)):
        batch.keep(step, update)
    assert [path.name for path in evidence.found(tmp_path / "run")] == ["step_000010_2", "step_000100_1"]
    assert {path.name for path in (tmp_path / "run" / "evidence").iterdir()} == {"step_000010_2", "step_000100_1"}
    batch.recipe = recipe_for(model_dir, tmp_path / "run", guards={"keep_evidence": 0})
    assert batch.keep(200) is None
    assert len(evidence.found(tmp_path / "run")) == 2


def test_a_disk_that_refuses_leaves_nothing_half_written(batch, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(StorageError, match="the disk is full"):
        batch.keep()
    assert list((batch.dir / "evidence").iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: shutil.rmtree(d), "there is no such folder; there: none"),
        (lambda d: (d / "summary.json").unlink(), "no evidence folder; replay takes RUN/evidence/step_NNNNNN_U"),
        (lambda d: (d / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda d: (d / "rows.npz").write_bytes(b"PK"), r"rows\.npz has 2 bytes in place of"),
        (lambda d: (d / "policy" / "config.json").unlink(), r"policy/config\.json is missing"),
        (lambda d: rewrite(d, "summary.json", b"{}"), "can't be read as evidence of a skipped update"),
        (lambda d: rewrite(d, "summary.json", b'{"format": 9}'), "can't be read as evidence of a skipped update"),
        (lambda d: later(d), "a later version of Sapwood wrote it"),
        (lambda d: rewrite(d, "rows.npz", b"PK\x05\x06" + bytes(18)), "can't be read as the rows of an update"),
        (lambda d: cut(d), "can't be read as the rows of an update .token_ids has"),
        (lambda d: rewrite(d, "training_state.pt", b"junk"), "can't be read as a training state"),
    ],
)
def test_a_damaged_folder_is_told_in_a_sentence(batch, spoil, told, capsys):
    folder = batch.keep()
    spoil(folder)
    with pytest.raises(StorageError, match=told):
        evidence.load(folder)
    assert cli.main(["replay", str(folder)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def rewrite(folder, name, content):
    """Change a file behind its manifest's back, as an attacker or a tool that recomputes sums would."""
    import hashlib

    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def later(folder):
    summary = json.loads((folder / "summary.json").read_text())
    rewrite(folder, "summary.json", json.dumps({**summary, "format": 9}).encode())


def cut(folder):
    with np.load(folder / "rows.npz") as stored:
        arrays = dict(stored)
    arrays["token_ids"] = arrays["token_ids"][:-1]
    np.savez(folder / "other.npz", **arrays)
    rewrite(folder, "rows.npz", (folder / "other.npz").read_bytes())


def test_a_run_is_asked_for_one_of_its_updates(batch):
    batch.keep(3)
    with pytest.raises(StorageError, match=r"name one of its skipped updates: .*step_000003_1"):
        evidence.load(batch.dir)
    with pytest.raises(StorageError, match=r"name one of its skipped updates: .*step_000003_1"):
        evidence.load(batch.dir / "evidence")
    with pytest.raises(StorageError, match=r"no such folder; there: step_000003_1"):
        evidence.load(batch.dir / "evidence" / "step_000004_1")


# --- replaying ---------------------------------------------------------------------------------------------------


def outcome_of(batch):
    return replay(evidence.load(batch.keep()))


def test_a_finite_update_is_the_one_of_the_run(batch):
    """Loss and gradient norm are those of the run's own forward and backward, over the same micro-batches."""
    from sapwood.learner import Learner

    parts, progress = batch.parts, Progress()
    for parameter in parts.policy.parameters():  # not the model as it is loaded from its folder
        parameter.data.mul_(1.01)
    learner = Learner(batch.recipe, parts.algorithm, parts.models, parts.stepper, None, progress, 4, parts.chat.decode)
    found = outcome_of(batch)
    sums = learner._gradients(batch.rows, keep=False) | parts.stepper.clip()
    assert found.outcome.cause == "none"
    assert found.outcome.loss == pytest.approx(sums["loss"], abs=1e-7)
    assert found.outcome.grad_norm == pytest.approx(sums["grad_norm"], rel=1e-6)
    assert len(learner.pack(batch.rows)) > 1
    assert "hardware" in found.remedies[0]


def test_an_advantage_that_is_infinite_is_named_with_its_row_and_token(batch):
    batch.rows[4].advantages[2] = math.inf
    found = outcome_of(batch)
    assert found.outcome.cause == "arrays"
    task = batch.groups[1].task.id
    (told,) = found.outcome.found["arrays"]
    assert told == f"advantages of row 4 (task {task!r}, group 1, member 1): inf at token 3 of 6 scored ones"
    assert list(found.outcome.found) == ["arrays", "loss", "slope", "gradient"]
    assert found.variants == ()
    assert "credit()" in found.remedies[0]


def test_a_reward_that_is_not_a_number_is_named(batch):
    batch.rows[0].reward = math.nan
    found = outcome_of(batch)
    assert found.outcome.found["arrays"][0].startswith("the reward of row 0")
    assert found.remedies[0].startswith("check the rewards of this task")


def test_a_broken_weight_is_named_and_so_is_the_module_that_it_breaks(batch):
    batch.weight("model.layers.1.mlp.down_proj.weight")[3, 5] = math.inf
    found = outcome_of(batch)
    assert found.outcome.cause == "weights"
    assert found.outcome.found["weights"] == (
        "1 of 2,048 values of the trained weight model.layers.1.mlp.down_proj.weight isn't finite",
    )
    assert found.outcome.module == "model.layers.1.mlp.down_proj"
    assert "came in is" in found.outcome.found["module"][0]
    assert "go on from a checkpoint before step 1" in found.remedies[0]


def test_an_activation_that_overflows_in_half_precision_is_finite_in_float32(model_dir, tmp_path):
    recipe = recipe_for(model_dir, tmp_path / "run", model={"autocast": "float16"})
    batch = Batch(recipe, tmp_path / "run")
    # Float16 ends at 65504: products of these two are beyond it, and each alone is not.
    batch.weight("model.layers.0.mlp.up_proj.weight").mul_(3e4)
    found = outcome_of(batch)
    assert found.outcome.cause == "module"
    assert found.outcome.module.startswith("model.layers.0.mlp")
    variants = dict(found.variants)
    assert variants["in float32"].cause == "none"
    assert variants["by plain rows"].cause == "module"
    assert found.remedies[0] == "it is finite in float32: set model.autocast=bfloat16 or none"


def test_a_loss_whose_gradient_alone_breaks_names_the_operation(model_dir, tmp_path):
    recipe = recipe_for(model_dir, tmp_path / "run", algorithm={"name": "tests.test_evidence:Rooted"})
    found = outcome_of(Batch(recipe, tmp_path / "run"))
    assert found.outcome.cause == "slope"
    assert math.isfinite(found.outcome.loss)
    assert found.outcome.found["slope"][0].startswith("the loss's gradient with respect to logprobs of row ")
    # At 0 the root's slope is infinite, and that of the absolute value before it is 0: their product is no number.
    assert "the operation whose gradient is NaN is Abs" in found.outcome.found["slope"]
    assert {variant.cause for _, variant in found.variants} == {"slope"}
    assert "algorithm of your own" in found.remedies[0]


def test_a_gradient_that_overflows_below_a_finite_loss_is_named_from_the_loss_backwards(batch):
    batch.weight("model.layers.1.mlp.down_proj.weight").mul_(1e38)
    found = outcome_of(batch)
    assert found.outcome.cause == "gradient"
    assert found.outcome.parameters[0] == "model.layers.1.post_attention_layernorm.weight"
    assert found.outcome.largest > 1e36
    assert "the weights have grown too large" in found.remedies[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"lora": {"rank": 4, "dropout": 0.3}}},
        {"model": {"lora": {"rank": 4}}, "algorithm": {"name": "ppo", "group_size": 2, "clip_schedule": "linear"}},
        {"algorithm": {"name": "ppo", "group_size": 2}, "critic": {"kind": "head"}},
        {"algorithm": {"name": "ppo", "group_size": 2}, "critic": {"kind": "model"}},
    ],
)
def test_adapters_and_critics_come_back(model_dir, tmp_path, changes):
    """The loss of the replay is that of the models at hand, after an update has moved all of them."""
    recipe = recipe_for(model_dir, tmp_path / "run", **changes)
    batch = Batch(recipe, tmp_path / "run")
    parts, rows = batch.parts, batch.rows
    for group in parts.models.parameter_groups().values():
        for parameter in group:
            parameter.data.add_(0.01)
    from sapwood.algorithms import RowBatch, Totals
    from sapwood.tree import pack

    drawn = torch.get_rng_state()
    kept = batch.keep(rng=drawn)
    torch.rand(7)
    found = replay(evidence.load(kept))
    parts.models.train()
    torch.set_rng_state(drawn)  # dropout leaves out the same units
    loss = 0.0
    for micro in pack(rows, 80):
        forward = parts.models.forward(micro, parts.algorithm.needs)
        loss += float(parts.algorithm.loss(forward, RowBatch.of(micro), Totals.of(rows)).loss.detach())
    assert found.outcome.cause == "none"
    assert found.outcome.loss == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "dpo"},
        {"name": "dpo", "loss_type": "aot"},  # compares with ranks over the batch, which its credit keeps
        {"name": "kto"},
        {"name": "sft"},
        {"name": "reward"},
    ],
)
def test_algorithms_that_learn_from_data_are_replayed_too(model_dir, tmp_path, algorithm):
    data = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"say {i}", "chosen": f"the lamp {i}", "rejected": "in a room"} for i in range(6)]
    data.write_text("\n".join(json.dumps(record) for record in records))
    recipe = parse_recipe(
        {
            "run": {"dir": str(tmp_path / "run"), "steps": 2},
            "model": {"name": str(model_dir), "lora": {"rank": 4}},
            "data": str(data),
            "algorithm": algorithm,
            "optim": {"batch_size": 3},
        }
    )
    batch = Batch(recipe, tmp_path / "run")
    finite = outcome_of(batch)
    assert finite.outcome.cause == "none"
    assert finite.outcome.grad_norm > 0
    name = next(name for name in dict(batch.parts.policy.model.named_parameters()) if "lora_B" in name)
    batch.weight(name)[0, 0] = math.nan
    broken = outcome_of(batch)
    assert broken.outcome.cause == "weights"
    assert name.removeprefix("base_model.model.") in broken.outcome.found["weights"][0]


# --- the whole way -----------------------------------------------------------------------------------------------


def test_a_run_that_breaks_is_explained_by_the_command(model_dir, tmp_path, capsys):
    """Too large a learning rate breaks the weights for real; the next update is skipped, kept and explained."""
    recipe = recipe_for(
        model_dir,
        tmp_path / "run",
        optim={"learning_rate": 1e30},
        algorithm={"epochs": 1},
        run={"steps": 3},
        guards={"max_skipped": 9},
    )
    train(recipe)
    folder = evidence.found(tmp_path / "run")[0]
    capsys.readouterr()
    assert cli.main(["replay", str(folder)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("update    step 2, update 1: 6 rows of 2 groups, 36 scored tokens")
    assert "cause     the gradient below the loss" in told
    assert "also run  by plain rows: not finite either, in the gradient below the loss" in told
    assert "try       lower optim.learning_rate (1e+30 here)" in told
    assert "holds values up to 1e+30: the weights have grown too large" in told
    assert cli.main(["replay", str(folder), "--json", "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["update"], found["cause"]) == (2, 1, "gradient")
    assert found["variants"] == {}
    assert found["grad_norm"] == "nan"
