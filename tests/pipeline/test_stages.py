"""The pipeline's order: what is run, what is skipped, what is missing, and which round is the last."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sapwood import cli
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import ConfigError, DataError, Stopped, StorageError
from sapwood.pipeline import distill, evaluation, finetune, grpo, ppo, rollout, select, stages
from sapwood.pipeline.digests import digest
from sapwood.pipeline.recipe import PipelineRecipe, dump_pipeline, load_pipeline, parse_pipeline
from sapwood.pipeline.stages import Pipeline
from sapwood.pipeline.trajectories import Decision, Episode, recorded, write
from sapwood.progress import Progress

ENV = {"name": "hvac", "control": "uniform", "horizon": 2, "few_shot": 2}


@dataclass(frozen=True)
class Result:
    """What a stage found."""

    note: str = ""
    mean: float = 1.5


class Stand:
    """In the place of every stage: writes what the stage would, and counts.

    quality: mean return of a round's model (0: the untuned one) on training days.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.content: dict[str, str] = {}
        self.started_from: list[str | None] = []
        self.quality = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}
        self.fail: BaseException | None = None
        for name, module in {"ppo": ppo, "select": select, "distill": distill}.items():
            monkeypatch.setattr(module, "run", self.stage(name))
        for name, module in {"rollout": rollout, "finetune": finetune, "grpo": grpo}.items():
            monkeypatch.setattr(module, "run", self.stage(name))
        monkeypatch.setattr(stages, "load_ppo", lambda path, family, trust: SimpleNamespace(value=None))
        monkeypatch.setattr(evaluation, "play_model", self.play)
        monkeypatch.setattr(evaluation, "play_controller", lambda name, family, held, seed, make, value=None: name)
        monkeypatch.setattr(evaluation, "publish", self.publish)

    def stage(self, name: str) -> Any:
        made = {
            "ppo": (stages.TRAJECTORY, stages.POLICY),
            "select": (stages.EXAMPLES,),
            "rollout": (stages.ROLLOUT,),
            "distill": (stages.DECISIONS, distill.REPORT),
            "finetune": (f"{stages.FINAL}/weights",),
            "grpo": (f"{stages.FINAL}/weights",),
        }[name]

        def run(*arguments: Any, **options: Any) -> Result:
            if self.fail is not None and name == "rollout":
                raise self.fail
            self.calls.append(name)
            folder = [item for item in arguments if isinstance(item, Path)][-1]
            model = next((item for item in arguments if hasattr(item, "init_from")), None)
            if name == "rollout":
                self.started_from.append(None if model.init_from is None else str(model.init_from))
            for file in made:
                path = folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.content.get(name, name) + ("" if model is None else str(model.init_from)))
            return Result()

        return run

    def play(self, options, family: Hvac, model, engine, held, path: Path, progress, seed, **_: Any) -> Any:
        start = "" if model.init_from is None else str(model.init_from)
        number = int(Path(start).parts[-3]) if "rounds" in Path(start).parts else int(bool(start))
        step = Decision(0, (0.0,) * 10, (0.0,), self.quality[number], 0.0, 0.0)
        episodes = [Episode(task.id, 0, 0, 0, self.quality[number] + i, (step,)) for i, task in enumerate(held.tasks)]
        file = recorded(family, "llm", 0, episodes)
        write(path, file)
        return file

    def publish(self, family, held, files: Mapping[str, Any], folder: Path) -> Any:
        self.calls.append("eval")
        for name in (evaluation.TABLE, evaluation.PICTURE, evaluation.PAGE):
            (folder / name).write_text("result")
        row = SimpleNamespace(name="base", interval=SimpleNamespace(mean=-1.0))
        return SimpleNamespace(
            path=folder / evaluation.TABLE,
            picture=folder / evaluation.PICTURE,
            table=SimpleNamespace(results=[row], render=lambda: "the table"),
        )


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(monkeypatch)


def recipe(folder: Path, **sections: Any) -> PipelineRecipe:
    run = {"dir": str(folder / "run"), **sections.pop("run", {})}
    return parse_pipeline({"run": run, "env": ENV, "eval": {"days": 3}, **sections})


def pipeline(made: PipelineRecipe, **options: Any) -> Pipeline:
    return Pipeline(made, Progress(stream=io.StringIO()), **options)


ALL = ["ppo", "select", "rollout", "distill", "finetune", "eval"]


def test_a_pipeline_is_run_once(stand: Stand, tmp_path: Path) -> None:
    first = pipeline(recipe(tmp_path)).run()
    assert stand.calls == ALL
    assert [done.skipped for done in first] == [False] * 6
    again = pipeline(recipe(tmp_path)).run()
    assert stand.calls == ALL
    assert [done.skipped for done in again] == [True] * 6
    assert again[0].summary == {"note": "", "mean": 1.5}


@pytest.mark.parametrize(
    ("changes", "rerun"),
    [
        ({"eval": {"days": 4}}, ["eval"]),
        ({"distill": {"min_percentile": 0.7}}, ["distill", "finetune", "eval"]),
        ({"finetune": {"epochs": 1}}, ["finetune", "eval"]),
        ({"run": {"seed": 1}}, ALL),
        ({"env": {**ENV, "target": 21.0}}, ALL),
    ],
)
def test_a_change_runs_what_depends_on_it(changes: dict, rerun: list[str], stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path)).run()
    stand.calls.clear()
    # What a stage makes of other options is something else, or what follows would be up to date.
    stand.content = {name: f"{name} of {changes}" for name in ("ppo", "select", "rollout", "distill", "finetune")}
    data = {"eval": {"days": 3}, "env": ENV, **changes}
    data["run"] = {"dir": str(tmp_path / "run"), **changes.get("run", {})}
    pipeline(parse_pipeline(data)).run()
    assert stand.calls == rerun


def test_a_stage_that_makes_the_same_again_stops_the_chain(stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path)).run()
    stand.calls.clear()
    pipeline(recipe(tmp_path, ppo={"total_steps": 1000})).run()
    assert stand.calls == ["ppo"]


def test_a_file_that_was_changed_or_removed_is_made_again(stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path)).run()
    stand.calls.clear()
    (tmp_path / "run" / "03_llm_rollout" / stages.ROLLOUT).write_text("edited")
    (tmp_path / "run" / "05_evaluation" / evaluation.TABLE).unlink()
    pipeline(recipe(tmp_path)).run()
    assert stand.calls == ["rollout", "eval"]


def test_force_runs_all_of_it(stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path)).run()
    pipeline(recipe(tmp_path), force=True).run()
    assert stand.calls == ALL * 2


def test_a_stage_that_ended_early_is_run_again(stand: Stand, tmp_path: Path) -> None:
    stand.fail = Stopped("stopped by Ctrl-C; saved.", 130)
    with pytest.raises(Stopped, match=r"^stopped by Ctrl-C in stage rollout; the same command goes on from there\.$"):
        pipeline(recipe(tmp_path)).run()
    assert stand.calls == ["ppo", "select"]
    assert json.loads((tmp_path / "run" / "manifests" / "rollout.json").read_text())["state"] == "running"
    stand.fail = None
    pipeline(recipe(tmp_path)).run()
    assert stand.calls == ALL


@pytest.mark.parametrize(
    ("stage", "file", "maker"),
    [
        ("select", "01_ppo_training/ppo_trajectory.json", "ppo"),
        ("rollout", "02_few_shot_samples/few_shot_examples_structured.json", "select"),
        ("distill", "03_llm_rollout/llm_rollout.json", "rollout"),
        ("finetune", "03_llm_rollout/distillation_data.json", "distill"),
        ("eval", "01_ppo_training/ppo_final.zip", "ppo"),
    ],
)
def test_a_stage_out_of_order_names_what_is_missing(stage, file, maker, stand: Stand, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        pipeline(recipe(tmp_path), stage=stage).run()
    assert str(error.value) == (
        f"{stage}: {tmp_path}/run/{file} is missing; make it with `sapwood pipeline RECIPE --stage {maker}`, or name "
        f"another by --input {NAMES[stage]}=PATH."
    )
    assert stand.calls == []


NAMES = {"select": "trajectory", "rollout": "examples", "distill": "rollout", "finetune": "decisions", "eval": "ppo"}


def test_a_stage_by_itself_takes_files_and_leaves_the_rest_alone(stand: Stand, tmp_path: Path) -> None:
    mine = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in mine:
        path.write_text(path.name)
    made = pipeline(recipe(tmp_path), stage="distill", given={"rollout": mine}, out=tmp_path / "out").run()
    assert made[0].outputs[0] == tmp_path / "out" / stages.DECISIONS
    assert not (tmp_path / "run" / "manifests").exists()
    told = json.loads((tmp_path / "out" / "distill.manifest.json").read_text())
    assert told["inputs"] == {str(path): digest(path) for path in mine}
    # the same again is up to date; other files would replace what is there
    assert pipeline(recipe(tmp_path), stage="distill", given={"rollout": mine}, out=tmp_path / "out").run()[0].skipped
    mine[0].write_text("other")
    with pytest.raises(StorageError, match=r"is there already and would be overwritten; give another folder by --out"):
        pipeline(recipe(tmp_path), stage="distill", given={"rollout": mine}, out=tmp_path / "out").run()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stage": "train"}, "--stage train: choose ppo, select, rollout, distill, finetune, grpo, eval or all."),
        ({"out": Path("x")}, "--input and --out are for one stage: name it with --stage."),
        ({"stage": "grpo"}, "--stage grpo: the recipe has no grpo section; add one, such as grpo: {steps: 30}."),
        (
            {"stage": "select", "given": {"rollout": [Path("x")]}},
            "--input rollout: stage select takes no such file (trajectory: a trajectory file).",
        ),
        (
            {"stage": "finetune", "given": {"decisions": [Path("x"), Path("y")]}},
            "--input decisions: given 2 times; stage finetune takes one.",
        ),
        ({"stage": "select", "given": {"trajectory": [Path("nowhere")]}}, "--input trajectory=nowhere: no such file"),
    ],
)
def test_wrong_arguments(options: dict, sentence: str, stand: Stand, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        pipeline(recipe(tmp_path), **options)
    assert str(error.value).startswith(sentence)


def test_rounds_begin_with_the_model_of_the_one_before(stand: Stand, tmp_path: Path) -> None:
    made = pipeline(recipe(tmp_path, run={"rounds": 3}))
    made.run()
    run = tmp_path / "run"
    assert stand.started_from == [
        None,
        str(run / "04_finetuning" / "final_model"),
        str(run / "rounds" / "02" / "04_finetuning" / "final_model"),
    ]
    assert [done.name for done in made.done if done.name.startswith("finetune")] == [
        "finetune",
        "finetune-2",
        "finetune-3",
    ]
    assert json.loads((run / "rounds" / "best.json").read_text())["best"] == 3
    assert made.done[-1].name == "eval"


def test_a_round_that_is_no_better_is_the_last(stand: Stand, tmp_path: Path) -> None:
    stand.quality[2] = 0.5
    made = pipeline(recipe(tmp_path, run={"rounds": 3}))
    made.run()
    assert len(stand.started_from) == 2
    assert json.loads((tmp_path / "run" / "rounds" / "best.json").read_text())["best"] == 1


def test_the_other_way_is_run_where_the_recipe_has_it(stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path, grpo={"steps": 3})).run()
    assert stand.calls == ["ppo", "select", "rollout", "distill", "finetune", "grpo", "eval"]


def test_a_policy_of_ones_own_must_be_there(stand: Stand, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^ppo: .*nowhere\.zip: there is no such file\.$"):
        pipeline(recipe(tmp_path, ppo={"policy": str(tmp_path / "nowhere.zip")})).run()


def test_a_changed_adapter_is_started_from_anew(stand: Stand, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "weights").write_text("one")
    made = recipe(tmp_path, model={"init_from": str(adapter)})
    pipeline(made).run()
    stand.calls.clear()
    (adapter / "weights").write_text("two")
    stand.content["rollout"] = "another"
    pipeline(made).run()
    assert stand.calls == ["rollout", "distill", "finetune", "eval"]


def test_another_temperature_validates_anew(stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path, run={"rounds": 2})).run()
    warm = recipe(tmp_path, run={"rounds": 2}, rollout={"stop": ["}"]})
    done = pipeline(warm.model_copy(update={"eval": warm.eval.model_copy(update={"temperature": 0.7})})).run()
    validated = [each for each in done if each.name.startswith("validate")]
    assert not any(each.skipped for each in validated[:2])


def test_an_evaluation_of_rounds_that_have_changed_is_refused(stand: Stand, tmp_path: Path) -> None:
    made = recipe(tmp_path, run={"rounds": 2})
    pipeline(made).run()
    (tmp_path / "run" / "04_finetuning" / "final_model" / "weights").write_text("tuned by hand")
    with pytest.raises(DataError, match="the rounds aren't up to date; run the pipeline without --stage"):
        pipeline(made, stage="eval").run()


def test_a_stage_does_not_take_what_an_unfinished_one_left(stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path)).run()
    stand.fail = Stopped("stopped by Ctrl-C; saved.", 130)
    changed = recipe(tmp_path, rollout={"episodes": 3})
    with pytest.raises(Stopped):
        pipeline(changed).run()
    with pytest.raises(DataError, match="stage rollout has not finished after a change"):
        pipeline(changed, stage="distill").run()


def test_a_run_can_be_made_in_a_folder_that_has_a_manifest(tmp_path: Path) -> None:
    from sapwood.config import parse_recipe
    from sapwood.run import Run

    (tmp_path / "finetune.manifest.json").write_text("{}")
    plain = {"run": {"dir": str(tmp_path), "steps": 1}, "env": ENV, "algorithm": "grpo", "trackers": []}
    Run.create(parse_recipe(plain)).close()
    assert (tmp_path / "recipe.yaml").is_file()
    assert (tmp_path / "finetune.manifest.json").read_text() == "{}"


def test_a_manifest_that_was_tampered_with_is_no_traceback(stand: Stand, tmp_path: Path) -> None:
    pipeline(recipe(tmp_path)).run()
    path = tmp_path / "run" / "manifests" / "ppo.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "summary": [1]}))
    assert pipeline(recipe(tmp_path)).run()[0].skipped
    path.write_text("[" * 100_000)
    stand.calls.clear()
    pipeline(recipe(tmp_path)).run()
    assert stand.calls == ["ppo"]


def test_two_processes_cannot_run_one_pipeline(stand: Stand, tmp_path: Path) -> None:
    from sapwood.run import take_lock

    (tmp_path / "run").mkdir()
    lock = take_lock(tmp_path / "run", "holds it")
    assert lock is not None
    with lock, pytest.raises(StorageError, match="is running this pipeline; wait for it"):
        pipeline(recipe(tmp_path)).run()


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("env: {name: hvac}\nrun: {dir: x}\nrolout: {}", "line 3: unknown key 'rolout'; did you mean 'rollout'?"),
        ("env: {name: hvac, climat: x}\nrun: {dir: x}", "line 1: unknown key 'climat' in env; did you mean 'climate'?"),
        ("env: {name: prompts}\nrun: {dir: x}", "env.name is 'prompts', and this pipeline is for buildings"),
        ("run: {dir: x}", "env is missing"),
        ("env: hvac\nrun: {dir: x}\nalgorithm: grpo", "line 3: this is the recipe of a run and not of a pipeline"),
        ("env: hvac\nrun: {dir: x}\neval: {seeds: 3}", "line 3: eval.seeds is 3, but with env.start=day"),
        ("env: hvac\nrun: {dir: x}\neval: {days: 99}", "line 3: eval.days is 99, and 52 days are held out"),
        ("env: hvac\nrun: {dir: x}\nmodel: {lora: {rank: 32}}", "line 3: model.lora has no effect"),
        (
            "env: hvac\nrun: {dir: x}\nfinetune: {algorithm: {value_coef: 0}, critic: {kind: adapter}}",
            "line 3: finetune.critic has no effect: finetune.algorithm learns no values",
        ),
        ("env: {name: hvac, memory: chat}\nrun: {dir: x}", "env.memory is chat"),
        ("env: {name: hvac, train_horizon: 1}\nrun: {dir: x}\nselect: {rank: advantage}", "the value of a next step"),
        ("env: hvac\nrun: {dir: x, rounds: 0}", "line 2: run.rounds is 0"),
    ],
)
def test_a_wrong_recipe_is_told_by_its_line(text: str, sentence: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert cli.main(["pipeline", str(path)]) == 1
    assert sentence in capsys.readouterr().err


def test_a_pipeline_is_not_trained(tmp_path: Path, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_pipeline(recipe(tmp_path)))
    assert cli.main(["train", str(path)]) == 1
    assert "this is the recipe of a pipeline and not of a run: use `sapwood pipeline`." in capsys.readouterr().err


def test_a_recipe_repeats_itself(tmp_path: Path) -> None:
    made = recipe(tmp_path, rollout={"temperature": 0.5}, grpo={"steps": 2})
    (tmp_path / "again.yaml").write_text(dump_pipeline(made))
    assert load_pipeline(tmp_path / "again.yaml") == made
    assert load_pipeline(tmp_path / "again.yaml", ["rollout.episodes=3"]).rollout.episodes == 3


def test_the_command_tells_what_was_done(stand: Stand, tmp_path: Path, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_pipeline(recipe(tmp_path)))
    assert cli.main(["pipeline", str(path)]) == 0
    out = capsys.readouterr().out
    assert "the table" in out
    assert f"{tmp_path}/run/05_evaluation/evaluation.json" in out
    assert cli.main(["pipeline", str(path), "--json", "--stage", "eval"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(stage["stage"], stage["skipped"]) for stage in told["stages"]] == [("eval", True)]
    assert cli.main(["pipeline", str(path), "--stage", "distill", "--input", "rollout"]) == 1
    assert "--input rollout: write it as NAME=PATH" in capsys.readouterr().err
