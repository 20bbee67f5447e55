"""Updates that aren't finite are skipped and kept; where memory runs out, the same update is made in smaller parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import PrivateAttr

from sapwood import evidence
from sapwood.algorithms.grpo import GRPO
from sapwood.config import parse_recipe
from sapwood.errors import BudgetError, TrainingStopped
from sapwood.progress import Progress
from sapwood.run import Run, read_metrics
from sapwood.train import Trainer, train
from tests.learning import LowTokens, save_tiny_model


class Breaks(GRPO):
    """GRPO whose loss is multiplied by `factor` at some steps."""

    at: tuple[int, ...] = (2,)
    factor: str = "nan"  # as text: a recipe keeps no NaN
    _now: int = PrivateAttr(default=0)

    def begin(self, step, steps):
        self._now = step
        return super().begin(step, steps)

    def loss(self, forward, batch, totals):
        output = super().loss(forward, batch, totals)
        factor = float(self.factor) if self._now in self.at else 1.0
        return dataclasses.replace(output, loss=output.loss * factor)


class Same(LowTokens):
    """Every reply is worth the same."""

    def score(self, groups):
        return [[{"same": 1.0} for _ in group.trajectories] for group in groups]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def recipe_for(model_dir, run_dir, **changes):
    data = {
        "run": {"dir": str(run_dir), "steps": 4, "seed": 1},
        "model": {"name": str(model_dir), "lora": None},
        "env": {"name": "prompts", "items": [{"prompt": "go"}, {"prompt": "say"}, {"prompt": "the lamp"}]},
        "rewards": [{"name": "tests.learning:LowTokens"}],
        "algorithm": {"name": "tests.test_learner:Breaks", "group_size": 4},
        "engine": {"name": "local", "max_new_tokens": 6, "ignore_eos": True},
        "optim": {"learning_rate": 1e-2, "batch_size": 4},
        "eval": {"tasks": 1, "at_start": False},
        "samples": {"every": 0},
        "trackers": [],
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(data)


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.policy.parameters()]


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_an_update_that_is_not_finite_is_skipped_and_kept(model_dir, tmp_path, factor):
    recipe = recipe_for(model_dir, tmp_path / "run", algorithm={"factor": factor, "epochs": 1})
    with Run.create(recipe) as run, Progress() as progress:
        trainer = Trainer.of(recipe, run, progress)
        trainer.step(1)
        before, state = weights(trainer), trainer.stepper.state()["optimizer"]["state"][0]["exp_avg"].clone()
        metrics, _ = trainer.step(2)
        assert metrics["skipped_updates"] == 1
        assert metrics["updates"] == 0
        assert "loss" not in metrics
        assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
        assert torch.equal(state, trainer.stepper.state()["optimizer"]["state"][0]["exp_avg"])
        metrics, _ = trainer.step(3)
        assert "skipped_updates" not in metrics
        assert trainer.learner.skipped == 0
        assert not any(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    (kept,) = evidence.found(tmp_path / "run")
    assert kept.name == "step_000002_1"
    assert len(evidence.load(kept).rows) == 16
    (event,) = (record for record in read_metrics(tmp_path / "run" / "events.jsonl") if record["kind"] == "skip")
    assert f"sapwood replay {kept}" in event["message"]


def test_too_many_of_them_stop_the_run(model_dir, tmp_path):
    recipe = recipe_for(
        model_dir, tmp_path / "run", algorithm={"at": [2, 3, 4]}, guards={"max_skipped": 1}, checkpoint={"every": 0}
    )
    with pytest.raises(TrainingStopped, match=r"2 updates in a row that aren't finite \(guards.max_skipped is 1\)"):
        train(recipe)
    # The step before the last skipped one is saved, as nothing of the last has reached the weights.
    assert (tmp_path / "run" / "checkpoints" / "step_000002" / "training_state.pt").is_file()


def test_a_run_with_a_skipped_update_ends_well(model_dir, tmp_path):
    result = train(
        recipe_for(model_dir, tmp_path / "run", algorithm={"epochs": 2, "updates": 2}, guards={"max_skipped": 4})
    )
    rows = read_metrics(result.run_dir / "metrics.jsonl")
    assert [row.get("skipped_updates", 0) for row in rows] == [0, 4, 0, 0]


def test_where_memory_runs_out_the_update_is_the_same_in_smaller_parts(model_dir, tmp_path, monkeypatch):
    """No micro-batch of more than 60 distinct tokens fits: scoring, learning and the numbers go on as with less."""
    finals, steps = [], {}
    for name, limit, budget in (("large", 10_000, 8192), ("small", 60, 8192)):
        algorithm = {"at": [], "epochs": 2, "updates": 2, "kl_coef": 0.1}
        optim = {"token_budget": budget}
        recipe = recipe_for(model_dir, tmp_path / name, algorithm=algorithm, optim=optim, run={"steps": 2})
        with Run.create(recipe) as run, Progress() as progress:
            trainer = Trainer.of(recipe, run, progress)
            for method in ("forward", "score"):
                original = getattr(trainer.models, method)

                def limited(given, *rest, original=original, limit=limit, method=method):
                    for micro in [given] if method == "forward" else given:
                        if sum(len(row.token_ids) for row in micro) > limit and len(micro) > 1:
                            raise torch.OutOfMemoryError("CUDA out of memory")
                    return original(given, *rest)

                monkeypatch.setattr(trainer.models, method, limited)
            trainer.run_all()
            finals.append(torch.cat([w.flatten() for w in weights(trainer)]))
            steps[name] = read_metrics(tmp_path / name / "metrics.jsonl")
            kinds = [record["kind"] for record in read_metrics(tmp_path / name / "events.jsonl")]
            assert ("memory" in kinds) == (name == "small")
            assert (trainer.learner.budget.tokens < 8192) == (name == "small")
    np.testing.assert_allclose(finals[0], finals[1], rtol=0, atol=1e-4)
    assert steps["large"][0]["loss"] == pytest.approx(steps["small"][0]["loss"], abs=1e-6)
    assert steps["large"][0]["grad_norm"] == pytest.approx(steps["small"][0]["grad_norm"], rel=1e-4)


def test_where_nothing_smaller_is_left_it_says_what_to_change(model_dir, tmp_path, monkeypatch):
    recipe = recipe_for(model_dir, tmp_path / "run", algorithm={"at": []}, run={"steps": 1})
    with Run.create(recipe) as run, Progress() as progress:
        trainer = Trainer.of(recipe, run, progress)

        def full(*_):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        monkeypatch.setattr(trainer.models, "forward", full)
        with pytest.raises(BudgetError, match=r"which can.t be split; set model\.gradient_checkpointing"):
            trainer.run_all()


def test_a_warning_is_written_and_may_stop_the_run(model_dir, tmp_path):
    """A loss multiplied by zero teaches nothing; rewards that never differ are what the guard names."""
    recipe = recipe_for(
        model_dir,
        tmp_path / "run",
        algorithm={"at": []},
        rewards=[{"name": "tests.test_learner:Same"}],
        run={"steps": 40},
        guards={"stop_on": ["no_signal"]},
    )
    with pytest.raises(TrainingStopped, match=r"stopped by guards\.stop_on: no_signal"):
        train(recipe)
    (warning,) = (w for w in read_metrics(tmp_path / "run" / "warnings.jsonl") if w["name"] == "no_signal")
    assert warning["remedies"]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == warning["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{int(warning['step']):06d}").is_dir()
