"""Every recipe that ships parses, with every overlay, and repeats itself; the example data are as the script makes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sapwood
from sapwood import configfile, plugins
from sapwood.config import Recipe, dump_recipe, load_recipe
from sapwood.pipeline.recipe import dump_pipeline, load_pipeline

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
OVERLAYS = sorted((FOLDER / "scenarios").glob("*.yaml"))
PIPELINES = [FOLDER / "hvac_self_distillation.yaml", FOLDER / "hvac" / "qwen7b.yaml"]
PIPELINE_OVERLAYS = sorted(path for path in (FOLDER / "hvac").glob("*.yaml") if path not in PIPELINES)
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path not in {*OVERLAYS, *PIPELINES, *PIPELINE_OVERLAYS})
ALGORITHMS = sorted(set(plugins.known("algorithm")))


def named(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_recipes_and_overlays() -> None:
    names = {named(path) for path in RECIPES}
    assert {"hvac_demo", "grpo_qwen3b"} <= names
    assert {f"qwen3b/{name}" for name in ("sft", "reward", "dpo", "ppo", "grpo")} <= names
    assert {"8gb", "16gb_quick", "production", "debug"} <= {path.stem for path in OVERLAYS}


def test_every_algorithm_has_a_recipe_for_a_cpu() -> None:
    found = {load_recipe(path).algorithm["name"] for path in (FOLDER / "smollm2").glob("*.yaml")}
    assert found >= {"sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo", "reinforce_pp", "distill"}


@pytest.mark.parametrize("overlay", [None, *PIPELINE_OVERLAYS], ids=lambda path: path and path.stem)
@pytest.mark.parametrize("path", PIPELINES, ids=named)
def test_a_pipeline_parses_and_repeats_itself(path: Path, overlay: Path | None, tmp_path: Path) -> None:
    recipe = load_pipeline([path, overlay] if overlay else path)
    (tmp_path / "again.yaml").write_text(dump_pipeline(recipe))
    assert load_pipeline(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_parses_and_repeats_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    recipe.check_trainable()
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    if recipe.env is not None:
        assert recipe.build_env().tasks("train", 1, 0)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_an_overlay_fits_every_recipe(path: Path, overlay: Path) -> None:
    recipe = load_recipe([path, overlay])
    recipe.check_trainable()
    only_soft_keys = not configfile.read(overlay).data
    assert recipe != load_recipe(path) or only_soft_keys


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_all_overlays_fit_together(path: Path) -> None:
    load_recipe([path, *OVERLAYS]).check_trainable()


@pytest.mark.parametrize("path", [*RECIPES, *OVERLAYS], ids=named)
def test_the_first_line_says_what_it_is_for(path: Path) -> None:
    first = path.read_text().split("\n")[0]
    assert first.startswith("# ")
    assert 20 < len(first) <= 120


# ---- values ----------------------------------------------------------------------------------------------------


def merged(recipe: str, *overlays: str) -> Recipe:
    return load_recipe([FOLDER / f"{recipe}.yaml", *(FOLDER / "scenarios" / f"{name}.yaml" for name in overlays)])


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_the_common_settings_for_3b(name: str) -> None:
    recipe = merged(f"qwen3b/{name}")
    assert recipe.model.name == "Qwen/Qwen2.5-3B"
    assert (recipe.run.epochs, recipe.eval.every, recipe.checkpoint.every) == (3, 500, 500)
    optim = recipe.optim
    assert (optim.learning_rate, optim.warmup_steps, optim.max_grad_norm) == (5e-5, 100, 1.0)
    assert (optim.batch_size, optim.gradient_accumulation) == (4, 1)
    assert recipe.data is not None
    assert (recipe.data.max_length, recipe.data.max_prompt_length) == (512, 256)
    if name in ("ppo", "grpo"):
        sampling = recipe.sampling()
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens) == (1.0, 50, 1.0, 256)
        wanted = {"epochs": 4, "clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.01}
        assert recipe.algorithm.items() >= wanted.items()
    if name == "ppo":
        assert recipe.algorithm.items() >= {"value_coef": 0.5, "gamma": 0.99, "gae_lambda": 0.95}.items()
    if name == "dpo":
        wanted = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0}
        assert recipe.algorithm.items() >= wanted.items()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_recipe_for_any_algorithm(algorithm: str) -> None:
    recipe = load_recipe(FOLDER / "qwen3b" / "any.yaml", [f"algorithm.name={algorithm}"])
    recipe.check_trainable()
    rollouts = recipe.build_algorithm().learns_from == "rollouts"
    assert (recipe.engine is not None) == (recipe.rewards is not None) == rollouts
    assert recipe.algorithm["epochs"] == (4 if rollouts else 1)


TENSORBOARD = ({"name": "tensorboard", "flush_seconds": 10},)
#: overlay, recipe, and the values that the pair must have.
SCENARIOS: list[tuple[str, str, dict[str, Any]]] = [
    ("8gb", "smollm2/ppo", {"optim.batch_size": 1, "optim.gradient_accumulation": 8, "algorithm.group_size": 1}),
    ("8gb", "smollm2/grpo", {"algorithm.group_size": 2, "eval.every": 100, "checkpoint.every": 200}),
    ("16gb_quick", "smollm2/grpo", {"algorithm.group_size": 2, "optim.batch_size": 4, "optim.schedule": "cosine"}),
    ("16gb_quick", "smollm2/dpo", {"early_stopping.patience": 3}),
    ("production", "smollm2/ppo", {"algorithm.group_size": 4, "optim.batch_size": 8, "optim.gradient_accumulation": 2}),
    ("production", "smollm2/ppo", {"optim.schedule": "plateau", "early_stopping.patience": 10}),
    ("production", "smollm2/sft", {"checkpoint.every": 500, "eval.every": 100, "trackers": TENSORBOARD}),
    ("debug", "smollm2/dpo", {"run.epochs": 1, "run.steps": None, "optim.batch_size": 2, "data.max_samples": 7}),
    ("debug", "smollm2/ppo", {"run.epochs": None, "run.steps": 3, "eval.max_samples": 2}),
    ("debug", "hvac_demo", {"data": None, "run.steps": 3, "eval.every": 5, "checkpoint.every": 10}),
    ("careful", "smollm2/ppo", {"optim.learning_rate": 1e-6, "algorithm.kl_coef": 0.02, "algorithm.value_coef": 1.0}),
    ("explore", "smollm2/grpo", {"algorithm.kl_coef": 0.005, "algorithm.clip_low": 0.3, "algorithm.clip_high": 0.3}),
    ("entropy", "smollm2/ppo", {"algorithm.entropy_coef": 0.05, "algorithm.clip_low": 0.15}),
    ("thorough", "smollm2/ppo", {"algorithm.epochs": 8, "optim.warmup_steps": 200, "run.steps": 1000}),
    ("thorough", "smollm2/dpo", {"algorithm.epochs": 1, "run.epochs": 5}),
]


@pytest.mark.parametrize(("overlay", "recipe", "expected"), SCENARIOS)
def test_a_scenario_sets_its_values(overlay: str, recipe: str, expected: dict[str, Any]) -> None:
    resolved = merged(recipe, overlay)
    for path, value in expected.items():
        found: Any = resolved
        for part in path.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == value, path


# ---- example data ----------------------------------------------------------------------------------------------


def test_the_example_data_are_what_the_script_makes() -> None:
    for name, text in script("make_example_data").files().items():
        assert (ROOT / "examples" / "data" / name).read_text() == text, "run scripts/make_example_data.py"


def test_the_example_data_are_right() -> None:
    """The chosen and the true are right sums, the rejected and the false are not, and no prompt comes twice."""
    read = {path.stem: [json.loads(line) for line in path.open()] for path in (ROOT / "examples/data").glob("*.jsonl")}

    def right(reply: str) -> bool:
        a, sign, b, _, result = reply.split()
        return {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)

    prompts = [item["prompt"] for item in read["arithmetic"]]
    assert len(set(prompts)) == len(prompts) == 400
    for item in read["arithmetic"]:
        assert right(item["response"])
        assert item["response"].endswith(f"= {item['answer']}")
    for item in read["arithmetic_pairs"]:
        assert right(item["chosen"])
        assert not right(item["rejected"])
    for item in read["arithmetic_labels"]:
        assert right(item["completion"]) == item["label"]


# ---- docs ------------------------------------------------------------------------------------------------------


def test_the_option_tables_are_current() -> None:
    docs = script("recipe_docs")
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert docs.BEGIN + docs.tables() + docs.END in page, "run `make docs`"


def test_the_page_names_what_ships() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for overlay in OVERLAYS:
        assert f"| `{overlay.name}` |" in page
    for folder in ("smollm2", "qwen3b"):
        names = page.partition(f"`recipes/{folder}/{{")[2].partition("}")[0].split(",")
        assert sorted(names) == sorted(path.stem for path in (FOLDER / folder).glob("*.yaml"))


def ours() -> list[str]:
    """Code in the second column of the tables of docs/migrating.md."""
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    return [code for row in rows for code in re.findall(r"`([^`]+)`", re.split(r"(?<=\S) \| ", row)[1])]


def test_migrating_names_only_options_that_exist() -> None:
    """`optim.batch_size` and the like; an option of `algorithm` is one of some algorithm."""
    sections = script("recipe_docs").SECTIONS
    known = {key: set(model.model_fields) for key, model in sections.items()} | {"model.lora": {"rank"}}
    known["data"] |= set(sections["data.sources"].model_fields)
    known["engine"] |= {"name"} | set(sections["engine (local)"].model_fields)
    known["algorithm"] = {"name"}.union(*(plugins.load("algorithm", name).model_fields for name in ALGORITHMS))
    found = [match.groups() for code in ours() if (match := re.match(r"([a-z_]+)\.([a-z_]+)(?![.\w/(])", code))]
    named = [(section, key) for section, key in found if section in known]
    assert len(named) > 80
    assert [f"{section}.{key}" for section, key in named if key not in known[section]] == []


def test_migrating_names_only_files_and_functions_that_exist() -> None:
    here = "`" + "` `".join(ours()) + "`"
    for path in re.findall(r"`((?:recipes|docs|examples)/[\w/.]+\.\w+)`", here):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`sapwood\.([A-Za-z_]+)[`(]", here):
        assert getattr(sapwood, name) is not None
    for module, name in re.findall(r"`(sapwood\.[a-z_.]+)\.([a-z_]+)[`(]", here):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for name in re.findall(r"`model\.(\w+)\(", here):
        assert hasattr(sapwood.Model, name), name
