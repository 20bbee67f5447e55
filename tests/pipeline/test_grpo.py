"""The other way from the same start: the run that it makes, and when it begins anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapwood.config import load_recipe
from sapwood.envs.hvac.text import Hvac
from sapwood.pipeline import grpo
from sapwood.pipeline.recipe import GrpoOptions
from sapwood.pipeline.rollout import RolloutOptions
from sapwood.sections import ModelSection
from tests.pipeline.playing import save_model, silent

FAMILY = Hvac(horizon=3, few_shot=1, history=0, start="random", control="uniform")
SAMPLING = RolloutOptions(stop=("}",), max_new_tokens=3, top_k=7)


def test_the_run_has_the_options_of_the_stage() -> None:
    options = GrpoOptions(steps=5, group_size=4, batch_size=3, learning_rate=2e-4, warmup_steps=9, temperature=0.9)
    made = grpo.recipe(options, SAMPLING, ModelSection(), {"max_batch": 8}, FAMILY, Path("x"), 11)
    assert (made.run.steps, made.run.seed, made.run.dir) == (5, 11, Path("x"))
    assert made.env is not None
    assert (made.env["horizon"], made.env["train_horizon"]) == (3, 1)
    assert (made.algorithm["group_size"], made.algorithm["entropy_coef"]) == (4, 0.03)
    assert made.engine is not None
    sampled = {name: made.engine[name] for name in ("temperature", "max_new_tokens", "stop", "top_k", "max_batch")}
    assert sampled == {"temperature": 0.9, "max_new_tokens": 3, "stop": ["}"], "top_k": 7, "max_batch": 8}
    assert (made.optim.batch_size, made.optim.warmup_steps) == (3, 5)  # warming up ends with the run
    assert made.optim.min_learning_rate == pytest.approx(2e-5)
    assert made.model.lora is not None
    assert made.model.lora.rank == 16


def test_it_trains_once_and_anew_where_it_starts_from_another_adapter(tmp_path: Path) -> None:
    model = ModelSection(name=str(save_model(tmp_path / "tiny")))
    options = GrpoOptions(steps=1, group_size=2, batch_size=1, lora_rank=2)
    out = tmp_path / "grpo"

    def run(start: ModelSection, folder: Path) -> grpo.GrpoResult:
        return grpo.run(options, SAMPLING, start, {}, FAMILY, folder, silent(), 0)

    first = run(model, out)
    assert first.steps == 1
    assert (first.final_model / "adapter_config.json").is_file()
    events = (out / "events.jsonl").read_text()
    run(model, out)  # nothing is left to do
    assert (out / "events.jsonl").read_text().count('"finish"') >= events.count('"finish"')
    assert not (tmp_path / "grpo-2").exists()

    start = model.model_copy(update={"init_from": first.final_model})
    run(start, tmp_path / "next")
    config = first.final_model / "README.md"
    config.write_text("another adapter at the same place")
    run(start, tmp_path / "next")
    assert load_recipe(tmp_path / "next-2").model.init_from == first.final_model  # the run before is kept
