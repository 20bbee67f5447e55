"""Stage 5: a run of Sapwood's on recorded decisions, with a final model that opens as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sapwood.data import recordings
from sapwood.envs.hvac.layout import world_of
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import DataError, ModelError
from sapwood.pipeline import finetune
from sapwood.pipeline.finetune import FinetuneOptions, FinetuneResult
from sapwood.run import Run
from sapwood.sections import ModelSection
from sapwood.train import Trainer
from tests.learning import save_tiny_model
from tests.pipeline.playing import silent
from tests.recorded import opened, record

FAMILY = Hvac(horizon=2, few_shot=0)
SMALL = {"learning_rate": 1e-2, "batch_size": 4, "gradient_accumulation": 2, "epochs": 1}


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "plot", lambda self: None)
    monkeypatch.setattr(Run, "plot_soon", lambda self: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decisions(base, tmp_path_factory.mktemp("data") / "distillation_data.json")


def decisions(base: Path, path: Path, start: Path | None = None, **options: Any) -> Path:
    """A recording of the tiny model in the family's world."""
    record(path, opened(base, start), base, states=10, **options)
    file = replace(recordings.read(path), world=world_of(FAMILY))
    path.write_bytes(b"".join(recordings.chunks(file)))
    return path


def run(base: Path, data: Path, folder: Path, *, model: dict[str, Any] | None = None, **options: Any) -> FinetuneResult:
    fresh = options.pop("fresh", False)
    section = ModelSection(name=str(base), **(model or {}))
    made = FinetuneOptions(**{**SMALL, **options})
    return finetune.run(made, data, section, FAMILY, folder, silent(), 7, fresh=fresh)


def rows(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


def test_the_defaults_are_those_of_the_method() -> None:
    options = FinetuneOptions()
    assert (options.epochs, options.learning_rate, options.lora_rank) == (3, 1e-4, 8)
    assert (options.batch_size, options.gradient_accumulation) == (2, 8)


def test_the_recipe(base, data, tmp_path) -> None:
    section = ModelSection(name=str(base))
    made = finetune.recipe(FinetuneOptions(), data, section, FAMILY, tmp_path / "run", 5, 100)
    assert (made.run.epochs, made.run.seed, made.run.dir) == (3, 5, tmp_path / "run")
    assert made.model.lora is not None
    assert (made.model.lora.rank, made.model.lora.alpha) == (8, 16)
    assert made.optim.groups_per_step == 16
    assert made.algorithm["name"] == "distill"
    assert made.critic is not None
    assert (made.critic.kind, made.critic.detach) == ("head", True)
    assert made.checkpoint.every == 6  # 95 decisions in steps of 16: an epoch
    assert made.env is None
    options = FinetuneOptions(algorithm={"value_coef": 0}, eval_tasks=3, stop=("}",), checkpoint_every=2)
    other = finetune.recipe(options, data, section, FAMILY, tmp_path / "run", 5, 100)
    assert (other.critic, other.optim.critic_learning_rate) == (None, None)
    assert (other.eval.tasks, other.checkpoint.every) == (3, 2)
    assert other.sampling().stop == ("}",)
    assert other.build_env() == FAMILY


def test_the_final_model_opens_with_peft(base, data, tmp_path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = run(base, data, tmp_path / "run")
    assert result.final_model == tmp_path / "run" / "final_model"
    assert result.steps == 3
    plain = AutoModelForCausalLM.from_pretrained(str(base))
    tuned = PeftModel.from_pretrained(plain, str(result.final_model))
    weights = {name: p for name, p in tuned.named_parameters() if "lora_B" in name}
    assert weights
    assert all(bool(torch.any(p != 0)) for p in weights.values())
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_what_is_finished_is_not_trained_again(base, data, tmp_path) -> None:
    first = run(base, data, tmp_path / "run")
    before = rows(first.run_dir)
    again = run(base, data, tmp_path / "run")
    assert rows(first.run_dir) == before
    assert again.steps == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_killed_run_goes_on_to_the_same_weights(base, data, tmp_path, monkeypatch) -> None:
    whole = run(base, data, tmp_path / "whole", checkpoint_every=1)
    steps = Trainer.step

    def dies(self: Trainer, step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return steps(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(base, data, tmp_path / "killed", checkpoint_every=1)
    assert not (tmp_path / "killed" / "final_model").exists()
    after = run(base, data, tmp_path / "killed", checkpoint_every=1)
    assert rows(after.run_dir) == rows(whole.run_dir)
    for name in ("adapter_model.safetensors",):
        assert (after.final_model / name).read_bytes() == (whole.final_model / name).read_bytes()


def test_another_run_in_the_way_is_kept(base, data, tmp_path) -> None:
    first = run(base, data, tmp_path / "run")
    before = rows(first.run_dir)
    run(base, data, tmp_path / "run", learning_rate=5e-3)
    [aside] = [p for p in tmp_path.iterdir() if p.name != "run"]
    assert rows(aside) == before
    # Other decisions under the same name are another run too; so is a fresh one.
    other = decisions(base, tmp_path / "other.json", seed=3)
    copy = tmp_path / "copy.json"
    copy.write_bytes(data.read_bytes())
    run(base, copy, tmp_path / "second")
    copy.write_bytes(other.read_bytes())
    run(base, copy, tmp_path / "second")
    run(base, copy, tmp_path / "second", fresh=True)
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("second")]) == 3


def test_a_second_round_goes_on_from_the_first(base, data, tmp_path) -> None:
    first = run(base, data, tmp_path / "one", lora_rank=4)
    start = {"init_from": first.final_model}
    own = decisions(base, tmp_path / "own.json", first.final_model, seed=1)
    second = run(base, own, tmp_path / "two", model=start)
    config = json.loads((second.final_model / "adapter_config.json").read_text())
    assert config["r"] == 4
    gaps = [row["gap_k3"] for row in map(json.loads, rows(second.run_dir).splitlines()) if "gap_k3" in row]
    assert gaps == [pytest.approx(0.0, abs=1e-6)]
    with pytest.raises(ModelError, match=r"recorded of another model than the one that would learn from it \(adapter"):
        run(base, data, tmp_path / "three", model=start)  # the first round's recording


def test_what_is_refused(base, data, tmp_path) -> None:
    with pytest.raises(DataError, match=r"there is no such file of recorded decisions; make one with"):
        run(base, tmp_path / "nowhere.json", tmp_path / "run")
    other = tmp_path / "other.json"
    file = replace(recordings.read(data), world=world_of(Hvac(building="OfficeMedium")))
    other.write_bytes(b"".join(recordings.chunks(file)))
    with pytest.raises(DataError, match=r"other\.json: its decisions were made in another world \(its building is"):
        run(base, other, tmp_path / "run")
    trajectory = tmp_path / "ppo_trajectory.json"
    trajectory.write_text(json.dumps({"format": 1, "controller": "ppo", "episodes": []}))
    with pytest.raises(DataError, match=r"holds whole trajectories \(of 'ppo'\), and only a language model's own"):
        run(base, trajectory, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"algorithm": {"name": "ppo"}}, "Extra inputs are not permitted"),
        ({"algorithm": {"clip_hihg": 1}}, "Extra inputs are not permitted"),
        ({"algorithm": {"loss_type": "weighted_sft", "advantage": "return"}}, "weighs by scores"),
        ({"stop": ["}"]}, "have no effect without finetune.eval_tasks"),
        ({"max_new_tokens": 4}, "have no effect without finetune.eval_tasks"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        FinetuneOptions(**options)
