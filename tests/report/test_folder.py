"""A run folder as the page gets it: finished, running, killed, old, damaged, or none at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapwood.errors import StorageError
from sapwood.report.folder import RunFolder
from sapwood.report.status import Status, ago, status_of
from tests.report.synthetic import make_run


def state(path: Path) -> dict:
    return RunFolder(path).state(final=True)


def quiet_since(folder: Path, seconds: float) -> None:
    """Set the clock of every file back."""
    moment = time.time() - seconds
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (moment, moment))


def test_a_finished_run(tmp_path: Path) -> None:
    found = state(make_run(tmp_path / "office", algorithm="grpo", steps=40, attempts=4))
    assert found["name"] == "office"
    assert found["status"] == {"state": "finished", "detail": "all steps are done"}
    assert (found["done"], found["total"]) == (40, 40)
    assert found["what"] == {
        "algorithm": "grpo",
        "model": "smollm2-135m (LoRA rank 16)",
        "start": "",
        "world": "hvac OfficeSmall Hot_Dry",
    }
    assert found["problems"] == []
    assert found["checkpoints"] == [20, 40]
    groups = {curve["name"]: curve["group"] for curve in found["curves"]}
    assert groups["reward/env"] == "Reward and return"
    assert groups["eval/return"] == "Reward and return"
    assert groups["gap_k3"] == "Policy health"
    assert groups["tokens_per_second"] == "Speed"
    assert groups["eval/parsed"] == "Policy health"
    assert found["evaluation"]["returns"]["results"][-1]["name"] == "trained model"
    assert json.dumps(found, allow_nan=False)


def test_the_headline_is_base_best_and_last_with_their_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=40)
    rows = [(0, 1.0), (10, 5.0), (20, 9.0), (30, 8.0)]
    records = [{"step": s, "eval/return": v, "eval/low": v - 1, "eval/high": v + 1} for s, v in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    head = state(run)["headline"]
    assert head["base"] == {"step": 0, "value": 1, "lo": 0, "hi": 2}
    assert head["best"] == {"step": 20, "value": 9, "lo": 8, "hi": 10}
    assert head["last"] == {"step": 30, "value": 8, "lo": 7, "hi": 9}
    assert head["difference"]["mean"] == 30.7
    # 24 tasks: better, equal and worse add up.
    assert sum(head["difference"]["tally"]) == 24


@pytest.mark.parametrize(
    ("algorithm", "name", "more"),
    [("sft", "eval/loss", False), ("dpo", "eval/accuracy", True), ("ppo", "eval/return", True)],
)
def test_every_algorithm_has_its_figure(tmp_path: Path, algorithm: str, name: str, more: bool) -> None:
    found = state(make_run(tmp_path / "r", algorithm=algorithm, steps=20))
    assert (found["headline"]["name"], found["headline"]["more"]) == (name, more)
    assert found["headline"]["base"]["step"] == 0
    if algorithm == "dpo":
        assert found["headline"]["difference"]["metric"] == "accuracy"
        assert found["evaluation"]["held_out"]["models"] == ["base model", "trained model"]


def test_a_run_that_was_killed_and_one_that_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=40, done=25, state="")
    assert state(run)["status"]["state"] == "running"
    quiet_since(run, 3600)
    died = state(run)["status"]
    assert died["state"] == "died"
    assert died["detail"].startswith("Nothing was written for 60 minutes")


def test_a_held_lock_says_that_a_run_goes_on_however_quiet_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=40, done=25, state="")
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+b'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True);"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        quiet_since(run, 3600)
        assert state(run)["status"]["state"] == "running"
        assert holder.stdin is not None
        holder.stdin.close()
    quiet_since(run, 200)  # too short for a guess, but nobody holds the lock
    assert state(run)["status"]["state"] == "died"


def test_status_from_events_and_steps() -> None:
    def status(kinds: list[str], **facts: object) -> str:
        given = {"done": 5, "total": 10, "evaluated": False, "longest": 1.0, "quiet": 5.0} | facts
        quiet = given.pop("quiet")
        return status_of([{"kind": kind, "message": ""} for kind in kinds], **given, quiet=quiet).state

    assert status(["start", "checkpoint", "finish"]) == "finished"
    assert status(["start", "stop"]) == "stopped"
    assert status(["start", "stop", "resume"]) == "running"
    assert status(["start", "stop", "resume"], quiet=1e5) == "died"
    assert status([], evaluated=True) == "finished"
    assert status([], done=10, quiet=1e5) == "finished"
    assert status([], quiet=1e5) == "died"
    assert status([], quiet=1000.0, longest=200.0) == "running"  # eight times its longest step isn't over
    assert status([], quiet=None) == "empty"
    assert status_of([], None, None, False, 0.0, quiet=3.0) == Status("running", "Last written to 3 seconds ago.")
    assert [ago(s) for s in (5, 150, 7300, 400_000)] == ["5 seconds", "2 minutes", "2 hours", "5 days"]


def test_a_run_without_events_as_older_ones_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=20)
    for name in ("events.jsonl", "warnings.jsonl", "timing.jsonl", "environment.json"):
        (run / name).unlink()
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["differences"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    found = state(run)
    assert found["status"]["state"] == "finished"
    assert found["clock"] == {"x": [], "y": []}
    assert found["evaluation"]["returns"]["differences"][0]["mean"] == 30.7
    assert found["problems"] == []


def test_nothing_yet(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "recipe.yaml").write_text("run: {steps: 5}\n")
    found = state(run)
    assert found["done"] is None
    assert found["total"] == 5
    assert found["headline"] is None
    assert found["problems"] == ["metrics.jsonl: no finished step yet."]


def test_epochs_give_the_steps_once_there_is_progress(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "recipe.yaml").write_text("run: {epochs: 3}\n")
    (run / "metrics.jsonl").write_text('{"step": 10, "epoch": 0.5}\n')
    assert state(run)["total"] == 60  # half an epoch took 10 steps


def test_damage_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=20)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'not json\n{"step": 21, "loss": NaN}\n{"loss": 1}\n{"step": 22, "lo')
    (run / "evaluation.json").write_text('{"results": [{"na')
    (run / "environment.json").write_text("[1, 2]")
    (run / "recipe.yaml").write_text("run: [")
    found = state(run)
    assert found["done"] == 21
    assert found["problems"] == [
        "recipe.yaml: not YAML, or cut short; left out.",
        "evaluation.json: not JSON, or cut short; left out.",
        "metrics.jsonl: records without a step: 1; left out.",
        "metrics.jsonl line 22: not a JSON record; left out.",
        "metrics.jsonl: its last line is cut short; left out.",
    ]
    assert [curve["gaps"] for curve in found["curves"] if curve["name"] == "loss"] == [1]
    assert "its last line is cut short" not in " ".join(RunFolder(run).state()["problems"])  # it may be on its way


@pytest.mark.parametrize("content", ["7", "[]", "{}", '{"results": 3}', '{"results": [{}], "held_out": []}', "null"])
def test_an_evaluation_of_another_shape_does_no_harm(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=20)
    (run / "evaluation.json").write_text(content)
    assert json.dumps(state(run), allow_nan=False)


def test_odd_values_in_every_file_do_no_harm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=20)
    odd = [None, True, 3, -1.5, "x", [], {}, [[1]], {"a": {"b": None}}]
    for name in ("warnings.jsonl", "events.jsonl"):
        keys = ("step", "time", "kind", "name", "message", "remedies", "metrics")
        (run / name).write_text("".join(json.dumps(dict.fromkeys(keys, value)) + "\n" for value in odd))
    (run / "recipe.yaml").write_text("run: 3\nmodel: []\nenv: {name: [1]}\ndata: {sources: 7}\nalgorithm: x\n1: 2\n")
    for facts in ({"packages": 1, "git": 2, "command": "x"}, {"git": {"commit": 5}, "memory_bytes": "y"}):
        (run / "environment.json").write_text(json.dumps(facts))
        found = state(run)
    assert len(found["warnings"]) == len(odd)
    assert json.dumps(found, allow_nan=False)


def test_changes_are_seen_and_nothing_is_read_twice(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=40, done=10, state="")
    folder = RunFolder(run)
    assert folder.state()["done"] == 10
    version = folder.version
    folder.state()
    assert folder.version == version
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 0.5}\n')
    found = folder.state()
    assert (found["done"], folder.version) == (11, version + 1)
    [loss] = [curve for curve in found["curves"] if curve["name"] == "loss"]
    assert (loss["x"][-1], loss["y"][-1]) == (11, 0.5)
    # Resuming from step 5 cuts what came later.
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6]))
    assert folder.state()["done"] == 5


def test_what_is_no_run_is_named_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no such run folder"):
        RunFolder(tmp_path / "none")
    make_run(tmp_path / "runs" / "a", algorithm="sft", steps=3)
    with pytest.raises(StorageError, match=r"not a run folder.*runs below it are .*runs/a\."):
        RunFolder(tmp_path / "runs")
    (tmp_path / "runs" / "a" / "plots").mkdir()
    with pytest.raises(StorageError, match=r"not a run folder.*did you mean .*runs/a\?"):
        RunFolder(tmp_path / "runs" / "a" / "plots")


def test_a_file_of_trajectories_is_a_run_of_samples_alone(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("no trajectory\n")
    with pytest.raises(StorageError, match="no run folder and no file of trajectories"):
        RunFolder(path)
    path.write_text('{"task": "a", "turns": []}\n')
    folder = RunFolder(path)
    assert folder.state()["status"]["state"] == "file"
    assert [file.kind for file in folder.samples()] == ["file"]
