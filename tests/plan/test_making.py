"""Whole plans: whether they fit, what to change, and how they are shown."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from sapwood import cli
from sapwood.config import parse_recipe
from sapwood.errors import ConfigError, TrainingStopped
from sapwood.plan import plan, warning
from sapwood.plan.advice import Change, size
from sapwood.plan.machine import GIB, MIB, Room
from sapwood.plan.making import Survey, of_survey
from sapwood.plan.show import between, mebi, span, to_json, verdict
from tests.learning import save_tiny_model

WORDS = ("lamp", "table")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    records = [{"prompt": f"{i} {WORDS[i % 2]} " * 8, "response": f"{WORDS[i % 2]} {i} " * 6} for i in range(200)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """A plan opens no weight."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def refuse(*_, **__):
        raise AssertionError("a weight was loaded")

    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(kind, "from_pretrained", refuse)


def written(model_dir: Path, file: Path, folder: Path, **changes) -> dict:
    data: dict = {
        "run": {"dir": str(folder / "run"), "steps": 4, "seed": 1},
        "model": {"name": str(model_dir), "lora": {"rank": 4}},
        "data": {"path": str(file), "eval_fraction": 0.02},
        "algorithm": {"name": "sft"},
        "optim": {"batch_size": 64},
    }
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values} if isinstance(values, dict) else values
    return data


@pytest.fixture
def recipe_file(model_dir, file, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(written(model_dir, file, tmp_path)))
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["train", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_plan_is_printed_and_nothing_is_made(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr("sapwood.plan.making.room", lambda _: Room(64 * GIB, "that this machine has to spare"))
    code, out, _ = run(capsys, recipe_file, "--plan")
    assert code == 0
    for part in ("parameters: ", "weights", "optimiser", "activations", "logits", "in all"):
        assert part in out
    assert re.search(
        r"^It fits: the run needs [\d.]+ \wiB .*of the 64.0 GiB that this machine has to spare\.$", out, re.M
    )
    assert re.search(r"^time: about \S+ to \S+ \w+ for 4 steps$", out, re.M)
    assert not any(line.endswith(" ") and not line.strip() for line in out.splitlines() if len(line) > 200)
    assert not (recipe_file.parent / "run").exists()


def test_a_plan_as_json_adds_up(recipe_file, capsys):
    code, out, _ = run(capsys, recipe_file, "--plan", "--json")
    made = json.loads(out)
    assert code == (1 if made["fits"] == "no" else 0)
    memory = made["memory"]
    for phase, total in memory["phases"].items():
        assert total == sum(sizes[phase] for sizes in memory["parts"].values())
    assert memory["peak"] == memory["phases"][memory["peak_phase"]] == max(memory["phases"].values())
    assert memory["peak"] <= memory["at_most"]
    assert made["tokens"]["largest"] <= made["tokens"]["at_most"] <= made["tokens"]["budget"]
    low, high = made["time"]["seconds"]
    assert 0 < low < high
    assert made["time"]["evaluations"] == 2


def test_what_does_not_fit_ends_with_1_and_advice_that_holds(model_dir, file, tmp_path, capsys, monkeypatch):
    data = written(model_dir, file, tmp_path)
    survey = Survey.of(parse_recipe(data))
    stays = survey.sizes.memory({}).peak
    space = Room(stays + (survey.memory.peak - stays) // 3, "that this test allows")
    monkeypatch.setattr("sapwood.plan.making.room", lambda _: space)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    code, out, _ = run(capsys, path, "--plan")
    assert code == 1
    assert "It does not fit: the run needs" in out
    advised = re.search(r"^  With (optim\.token_budget=\d+) it needs ", out, re.M)
    assert advised is not None
    code, out, _ = run(capsys, path, "--plan", advised[1])
    assert (code, "It does not fit" in out) == (0, False)


def test_a_run_is_warned_of_in_one_line(model_dir, file, tmp_path, monkeypatch):
    recipe = parse_recipe(written(model_dir, file, tmp_path, model={"device": "cpu"}))
    monkeypatch.setattr("sapwood.plan.making.room", lambda _: Room(64 * GIB, "of this test"))
    assert warning(recipe) is None
    monkeypatch.setattr("sapwood.plan.making.room", lambda _: Room(MIB, "of this test"))
    told = warning(recipe)
    assert told is not None
    assert re.fullmatch(r"the run needs .* of the 1 MiB of this test; .*--plan` says what to change\.", told)


def test_training_begins_with_a_warning_where_memory_is_short(model_dir, file, tmp_path, monkeypatch, capsys):
    def train(recipe, *_):
        raise TrainingStopped("it began.")

    monkeypatch.setattr(importlib.import_module("sapwood.train"), "train", train)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(written(model_dir, file, tmp_path, model={"device": "cpu"})))
    monkeypatch.setattr("sapwood.plan.making.room", lambda _: Room(MIB, "of this test"))
    assert run(capsys, path)[2].splitlines()[0].startswith("warning: the run needs ")
    monkeypatch.setattr("sapwood.plan.making.room", lambda _: Room(64 * GIB, "of this test"))
    assert run(capsys, path)[2] == "sapwood: it began.\n"

    def fail(recipe):
        raise RuntimeError("no plan for this model")

    monkeypatch.setattr(importlib.import_module("sapwood.plan"), "warning", fail)
    assert run(capsys, path)[2] == "sapwood: it began.\n"


def test_a_step_of_a_million_records_is_not_planned(model_dir, file, tmp_path):
    with pytest.raises(ConfigError, match=r"^a step of 1,000,000 rows is beyond planning; lower optim\.batch_size\.$"):
        plan(parse_recipe(written(model_dir, file, tmp_path, optim={"batch_size": 1_000_000})))


def test_a_plan_says_when_it_cannot_tell(model_dir, file, tmp_path):
    survey = Survey.of(parse_recipe(written(model_dir, file, tmp_path)))
    peak = survey.memory.peak
    fits = {room: of_survey(survey, Room(room, "x")).fits for room in (peak - 1, peak, survey.at_most * 2)}
    assert list(fits.values()) == ["no", "maybe", "yes"]
    unknown = of_survey(survey, None)
    assert unknown.fits == "unknown"
    assert "doesn't say how much" in verdict(unknown)
    assert to_json(unknown)["room"] is None


def test_where_no_single_change_is_enough_several_are_named(model_dir, file, tmp_path):
    data = written(model_dir, file, tmp_path, model={"lora": None})
    recipe = parse_recipe(data)
    floor = Survey.of(recipe).sizes.runtime
    made = plan(recipe, timed=False, space=Room(floor, "that this test allows"))
    assert made.fits == "no"
    assert len(made.advice) == 1
    assert made.advice[0].startswith("Even with ")
    assert made.advice[0].endswith("choose a smaller model.name, or a machine with more memory.")


def test_changes_are_written_as_on_the_command_line():
    change = Change({"model.lora": {"rank": 16}, "optim.token_budget": 512, "model.gradient_checkpointing": True}, "")
    assert str(change) == "model.lora='{rank: 16}' optim.token_budget=512 model.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("model.name=./no/such/model", "no model folder"),
        ("model.name=nobody/has-this-model", "nobody/has-this-model"),
        ("optim.token_budget=16", "raise the budget"),
        ("optim.warmup_steps=99", "warmup_steps"),
        ("optim.toke_budget=16", "did you mean"),
        ("model.device=cuda", "cuda"),
    ],
)
def test_bad_input_is_told_as_in_training(recipe_file, capsys, monkeypatch, override, sentence):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = run(capsys, recipe_file, "--plan", override)
    assert (code, out) == (1, "")
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.2, 0.4, "about 1 to 2 seconds"),
        (31.4, 94.0, "about 31 to 94 seconds"),
        (400, 740, "about 7 to 12 minutes"),
        (95, 130, "about 1.6 to 2.2 minutes"),
        (3600, 7201, "about 1 to 2 hours"),
        (10 * 86400, 21 * 86400, "about 10 to 21 days"),
    ],
)
def test_ranges_in_words(low, high, told):
    assert between(low, high) == told


def test_sizes_and_spans_in_words():
    assert [size(n) for n in (512 * MIB, GIB, 1_600 * GIB)] == ["512 MiB", "1.0 GiB", "1,600.0 GiB"]
    assert [mebi(n) for n in (1, MIB, 2_500 * MIB)] == ["< 1 MiB", "1 MiB", "2,500 MiB"]
    assert [span(s) for s in (0.04, 9.96, 12.2, 300)] == ["0.0 s", "10.0 s", "12 s", "5 min"]
