"""A run that was killed and goes on leaves what an undisturbed one leaves, byte for byte."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from sapwood import checkpoint, resume
from sapwood.config import parse_recipe
from sapwood.environment import version
from sapwood.errors import ConfigError, StorageError
from sapwood.run import Run, read_metrics
from sapwood.train import train
from tests.reliability.kills import Killer, survive
from tests.reliability.runs import RUNS, STEPS, left, recipe, write_data
from tests.reliability.zygote import Zygote

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
SHORT = ("grpo-lora", "grpo-full-watched", "grpo-stateful", "ppo-lora", "sft-full", "dpo-lora", "kto-lora")


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    with Zygote() as zygote:
        yield Killer(zygote, tmp_path_factory.mktemp("killed"), random.Random(11))


@pytest.mark.parametrize("name", SHORT)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(killer, name):
    for _ in range(4):  # a run may be done before it is killed
        before = killer.tally.kills
        killer.kill(name, 2)
        assert name not in killer.tally.differences
        if killer.tally.kills > before:
            return
    raise AssertionError("no run was killed")


def test_the_comparison_sees_another_seed(killer):
    wanted, _ = killer.wanted("sft-full")
    other = killer.folder / "other-seed"
    pid = killer.zygote.start(
        recipe("sft-full", killer.model, killer.data, other, seed=6), killer.folder / "other.log", resume=False
    )
    assert killer.zygote.wait(pid) == 0
    found = left(other)
    assert found.keys() == wanted.keys()
    assert found["metrics.jsonl"] != wanted["metrics.jsonl"]
    assert found[f"step_{STEPS:06d}/policy/model.safetensors"] != wanted[f"step_{STEPS:06d}/policy/model.safetensors"]


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    tally = survive(list(RUNS), 100, tmp_path, seed=random.randrange(1000))
    assert tally.differences == {}
    assert tally.writing >= 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_the_run_goes_on(killer, number, code):
    wanted, seconds = killer.wanted("grpo-lora")
    folder = killer.folder / f"stopped-{code}"
    made = recipe("grpo-lora", killer.model, killer.data, folder) | {"checkpoint": {"keep": 2}}
    log = folder.with_suffix(".log")
    pid = killer.zygote.start(made, log)
    until = time.monotonic() + 10 * seconds + 10
    while not (folder / "samples" / "step_000003.jsonl.gz").exists() and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(pid, number)
    assert killer.zygote.wait(pid) == code, log.read_text()
    told = log.read_text()
    assert f"Go on with: sapwood train --resume {folder}" in told
    assert "Traceback" not in told
    saved = checkpoint.found(folder)
    assert [each.problem for each in saved] == [None]
    assert saved[0].step >= 2
    events = [record["kind"] for record in read_metrics(folder / "events.jsonl")]
    assert events == ["start", "stop"]
    assert killer.zygote.wait(killer.zygote.start(made, log, resume=True)) == 0, log.read_text()
    assert left(folder) == wanted


def test_a_second_ctrl_c_stops_at_once(killer):
    folder = killer.folder / "twice"
    made = recipe("grpo-lora", killer.model, killer.data, folder, steps=500) | {"checkpoint": {"keep": 2}}
    log = folder.with_suffix(".log")
    pid = killer.zygote.start(made, log)
    while not (folder / "samples" / "step_000002.jsonl.gz").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    assert killer.zygote.wait(pid) == 130
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] < 500


# --- which checkpoint --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(killer):
    killer.wanted("sft-full")
    return killer.folder / "sft-full-whole"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_good_one_is_found(run):
    start = resume.find(run)
    assert (start.step, start.folder) == (STEPS, checkpoint.folder_of(run, STEPS))
    assert not start.notes


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest", "missing", "state"])
def test_a_damaged_one_is_skipped_with_a_sentence(run, damage):
    newest = checkpoint.folder_of(run, STEPS)
    weights = newest / "policy" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(bytes(content))
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 1, "files": ')
    elif damage == "missing":
        (newest / "policy" / "config.json").unlink()
    else:
        (newest / "training_state.pt").unlink()
    start = resume.find(run)
    assert start.step == STEPS - 1
    assert len(start.notes) == 1
    assert start.notes[0].startswith(f"checkpoint {newest} is skipped: ")
    expected = {"cut": "bytes in place of", "flip": "SHA-256", "manifest": "manifest.json can't be read"}
    assert expected.get(damage, "is missing") in start.notes[0]


def test_without_a_good_one_the_run_starts_over(run):
    shutil.rmtree(run / "checkpoints")
    start = resume.find(run)
    assert (start.step, start.folder) == (0, None)
    assert "starts from the beginning" in start.notes[-1]


def test_an_older_one_by_path_sets_the_later_aside(run):
    path = checkpoint.folder_of(run, STEPS - 1)
    start = resume.find(run, path)
    assert (start.step, start.aside) == (STEPS - 1, True)
    with Run.resume(Run.open(run).recipe.model_copy(update={"run": _moved(run)}), start.step, aside=True):
        pass
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")][-1] == STEPS - 1
    aside = next((run / "set_aside").iterdir())
    assert [record["step"] for record in read_metrics(aside / "metrics.jsonl")][-1] == STEPS
    assert checkpoint.read(aside / "checkpoints" / path.with_name(f"step_{STEPS:06d}").name).problem is None


def _moved(run: Path):
    return Run.open(run).recipe.run.model_copy(update={"dir": run})


def test_a_path_elsewhere_is_refused(run, tmp_path):
    with pytest.raises(StorageError, match="is no checkpoint of"):
        resume.find(run, tmp_path)
    with pytest.raises(StorageError, match=r"there is no checkpoint .*there are: step_000005, step_000006"):
        resume.find(run, run / "checkpoints" / "step_000009")


def test_what_was_written_after_the_checkpoint_is_cut(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    (run / "samples" / "step_000008.jsonl.gz").write_bytes(b"x")
    with Run.resume(Run.open(run).recipe.model_copy(update={"run": _moved(run)}), STEPS):
        pass
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")][-1] == STEPS
    assert not (run / "samples" / "step_000008.jsonl.gz").exists()


def test_two_processes_can_not_train_one_run(run):
    made = Run.open(run).recipe.model_copy(update={"run": _moved(run)})
    with (
        Run.resume(made, STEPS),
        pytest.raises(StorageError, match=f"process {os.getpid()} is training this run"),
        Run.resume(made, STEPS),
    ):
        pass
    with Run.resume(made, STEPS):
        pass


# --- with which recipe -------------------------------------------------------------------------------------------


def changed(folder: Path, **changes):
    """(recipe before, recipe after) where sections differ as named."""
    data = {
        "run": {"dir": str(folder), "steps": 10},
        "data": {"path": "x.jsonl"},
        "algorithm": "sft",
        "optim": {"schedule": "cosine", "learning_rate": 1e-3},
    }
    names = {*data, *changes} - {"algorithm"}
    after = {name: {**data.get(name, {}), **changes.get(name, {})} for name in names}
    return parse_recipe(data), parse_recipe({**data, **after, "algorithm": changes.get("algorithm", "sft")})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run": {"seed": 3}}, "run.seed was 0 and is 3"),
        ({"model": {"lora": {"rank": 8}}}, "model.lora.rank was 16 and is 8"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype was auto and is bfloat16"),
        ({"data": {"path": "y.jsonl"}}, "was x.jsonl and is y.jsonl"),
        ({"algorithm": "dpo"}, "algorithm.name was sft and is dpo"),
        ({"optim": {"batch_size": 8}}, "optim.batch_size was 4 and is 8"),
        ({"optim": {"name": "adamw_8bit"}}, "optim.name was adamw and is adamw_8bit"),
    ],
)
def test_what_the_state_rests_on_can_not_change(tmp_path, changes, named):
    before, after = changed(tmp_path, **changes)
    with pytest.raises(ConfigError, match="can't be resumed with this recipe") as caught:
        resume.check_recipe(before, after, 5)
    assert named in str(caught.value)
    assert "model.init_from" in str(caught.value)


def test_what_can_change_is_told(tmp_path):
    before, after = changed(
        tmp_path,
        run={"steps": 20},
        optim={"learning_rate": 5e-4, "token_budget": 512},
        model={"gradient_checkpointing": True},
    )
    assert resume.check_recipe(before, after, 10) == [
        "changed: model.gradient_checkpointing was False and is True",
        "changed: optim.learning_rate was 0.001 and is 0.0005",
        "changed: optim.token_budget was 8192 and is 512",
        "changed: run.steps was 10 and is 20",
    ]
    # Cosine over 20 steps at its 11th: half of the peak and a bit, by the schedule's own numbers.
    assert "cosine schedule spans 20 steps in place of 10" in str(resume.schedule_note(before, after, (10, 20), 10))
    with pytest.raises(ConfigError, match=r"run.steps is 20, and .* has made 30 steps"):
        resume.check_recipe(before, after, 30)


def test_more_steps_simply_go_on(run, killer):
    given = recipe("sft-full", killer.model, killer.data, run, steps=STEPS + 2)
    made = parse_recipe(given)
    start = resume.find(run)
    assert resume.check_recipe(parse_recipe({**given, "run": {**given["run"], "steps": STEPS}}), made, STEPS) == [
        f"changed: run.steps was {STEPS} and is {STEPS + 2}"
    ]
    with Run.resume(made, start.step) as opened:
        train(made, opened, start=start)
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(STEPS + 3))
    assert [each.step for each in checkpoint.found(run)] == [STEPS + 1, STEPS + 2]


def test_weights_that_began_elsewhere_are_refused(run, killer, tmp_path):
    other = write_data(tmp_path)
    made = parse_recipe(recipe("sft-full", killer.model, other, run))
    start = resume.find(run)
    state = {**start.state, "first_weights": "0" * 64}
    with Run.resume(made, start.step) as opened, pytest.raises(StorageError, match="the run began with other weights"):
        train(made, opened, start=resume.Start(start.step, folder=start.folder, state=state))


def test_a_terminal_is_asked(killer, tmp_path):
    """On a TTY, an unfinished run is offered to be gone on with."""
    from sapwood.commands.train import _ask

    folder = tmp_path / "run"
    made = parse_recipe(recipe("sft-full", killer.model, killer.data, folder))
    Run.create(made).close()
    answers = {"\n": folder, "y\n": folder, "n\n": None}
    for answer, expected in answers.items():
        master, slave = pty.openpty()
        with open(slave) as read, open(os.dup(slave), "w") as write, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", read)
            patch.setattr("sys.stderr", write)
            os.write(master, answer.encode())
            assert _ask(made, False) == expected
        told = ""
        while "[Y/n]" not in told:  # the terminal's echo of the answer comes first
            told += os.read(master, 4096).decode()
        assert "holds an unfinished run (no finished step, no checkpoint). Go on with it? [Y/n]" in told
        os.close(master)
    assert _ask(made, True) is None


def test_environment_versions_are_compared():
    own = {"sapwood": version("sapwood")}
    assert resume.version_notes({**own, "packages": {"torch": version("torch")}}) == []
    told = resume.version_notes({**own, "packages": {"torch": "0.1"}})
    assert len(told) == 1
    assert "torch 0.1 -> " in told[0]


def test_manifest_lists_every_file(run):
    folder = checkpoint.folder_of(run, STEPS)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == files
    assert {"training_state.pt", "recipe.yaml", "policy/model.safetensors"} <= files
    assert manifest["step"] == STEPS
    assert manifest["metrics"]["eval/loss"] > 0
