"""The run folder: what is in it, that equal runs write equal bytes, and what a full disk leaves."""

from __future__ import annotations

import contextlib
import errno
import gzip
import importlib.util
import io
import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood import run as run_module
from sapwood.config import Recipe, load_recipe, parse_recipe
from sapwood.errors import ConfigError, MissingExtra, StorageError, TrainingStopped
from sapwood.run import Run, free_name, read_metrics, writing
from sapwood.types import Group, Row, StopReason, Task, Trajectory, Turn
from tests.tracking import Recorder


def recipe(folder: Path, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "run": {"dir": str(folder), "steps": 5, "seed": 7},
            "env": {"name": "prompts", "items": [{"prompt": "hi", "answer": "1"}]},
            "algorithm": "grpo",
            "engine": "scripted",
            **sections,
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with Run.create(recipe(tmp_path / "run")) as made:
        yield made


def turn(prompt: list[int], reply: list[int], reward: float) -> Turn:
    return Turn(
        prompt_ids=np.array(prompt),
        token_ids=np.array(reply),
        sampled_logprobs=np.full(len(reply), -0.5, np.float32),
        kept_logmass=np.zeros(len(reply), np.float32),
        stop_reason=StopReason.EOS,
        text="yes",
        reward=reward,
        info={"parsed": "json", "temperature": math.nan},
    )


def group() -> tuple[Group, list[Row]]:
    """Two attempts, the first of two turns; and the row of the first, whose prompt tokens aren't scored."""
    task = Task("t1")
    first = Trajectory(task, [turn([1, 2], [3, 4], 1.0), turn([5], [6], 0.0)], reward=1.0, reward_parts={"env": 1.0})
    second = Trajectory(task, [turn([1, 2], [9], 0.0)], error="broke")
    row = Row(
        token_ids=np.array([1, 2, 3, 4, 5, 6]),
        loss_mask=np.array([False, False, True, True, False, True]),
        turn=np.array([0, 0, 1], np.int32),
        advantages=np.array([0.5, 0.25, -1.0], np.float32),
    )
    return Group(task, [first, second]), [row]


# ---- what a run leaves -----------------------------------------------------------------------------------------


def test_create_writes_recipe_environment_and_log(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "deep" / "run")
    with Run.create(wanted) as made:
        logging.getLogger("sapwood").info("hello from a test")
    assert load_recipe(made.dir) == wanted
    facts = json.loads((made.dir / "environment.json").read_text())
    assert facts["seed"] == 7
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 2**28
    [log] = (made.dir / "logs").glob("training_*.log")
    assert "hello from a test" in log.read_text()


def test_a_run_is_never_overwritten(run: Run) -> None:
    before = (run.dir / "recipe.yaml").read_text()
    with pytest.raises(StorageError) as caught:
        Run.create(recipe(run.dir, optim={"eps": 1e-3}))
    assert str(caught.value) == (
        f"{run.dir}: already exists and a run is never overwritten; choose another folder, e.g. run.dir={run.dir}-2, "
        "or go on with it by --resume."
    )
    assert (run.dir / "recipe.yaml").read_text() == before


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Run.create(recipe(tmp_path / "empty")).close()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="already exists"):
        Run.create(recipe(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_free_name_counts_on(tmp_path: Path) -> None:
    assert free_name(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert free_name(tmp_path / "a") == tmp_path / "a-3"


def test_open_reads_a_run_and_refuses_another_folder(run: Run, tmp_path: Path) -> None:
    assert Run.open(run.dir).recipe == Run.open(str(run.dir)).recipe == run.recipe
    with pytest.raises(StorageError, match="not a run folder"):
        Run.open(tmp_path)


# ---- trackers --------------------------------------------------------------------------------------------------


def test_a_tracker_whose_package_is_missing_is_refused_before_the_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path / "run", trackers=[{"name": "wandb", "mode": "offline"}])
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(MissingExtra, match=r"pip install 'sapwood\[wandb\]'"):
        Run.create(wanted)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_refuses_to_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such project"):
        Run.create(recipe(tmp_path / "run", trackers=["tests.tracking:Refuses"]))
    assert not (tmp_path / "run").exists()


def test_trackers_see_what_is_logged_and_how_the_run_ended(tmp_path: Path) -> None:
    one, rows = group()
    with Run.create(recipe(tmp_path / "run", trackers=["tests.tracking:Recorder"])) as made:
        made.log_metrics(1, {"reward": np.float32(0.25), "gap": math.nan})
        made.log_timing(1, {"tokens_per_second": 8.0})
        made.save_samples(1, [one], rows)
        made.save_samples(1, [one], rows, name="eval")
    begun, *calls, ended = Recorder.calls
    assert begun[0] == "start"
    assert (begun[1].dir, begun[1].name, begun[1].resumed_from, begun[1].id) == (made.dir, "run", None, None)
    assert begun[1].recipe["algorithm"]["name"] == "grpo"
    assert [call[:2] for call in calls] == [
        ("scalars", 1), ("scalars", 1), ("texts", 1), ("histograms", 1), ("texts", 1), ("histograms", 1),
    ]  # fmt: skip
    assert [call[2] for call in calls[:2]] == [{"reward": 0.25}, {"timing/tokens_per_second": 8.0}]
    assert [sorted(call[2])[0] for call in calls[2:]] == [
        "samples/first", "histograms/advantages", "eval/samples/first", "eval/histograms/advantages",
    ]  # fmt: skip
    assert ended == ("finish", "finished")
    assert made.notes() == []


@pytest.mark.parametrize(
    ("events", "raised", "expected"),
    [
        (["start", "checkpoint", "finish"], None, "finished"),
        (["start", "stop"], None, "stopped"),
        (["start"], None, "stopped"),  # at once, by a second Ctrl-C
        (["start", "stop"], TrainingStopped("x"), "stopped"),
        (["start"], TrainingStopped("x"), "failed"),
        ([], None, "finished"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, events: list[str], raised: Exception | None, expected: str) -> None:
    with contextlib.suppress(TrainingStopped), Run.create(recipe(tmp_path, trackers=["tests.tracking:Recorder"])) as it:
        for kind in events:
            it.event(kind, "told", 1)
        if raised is not None:
            raise raised
    assert Recorder.calls[-1] == ("finish", expected)


def test_a_resumed_run_is_the_same_one_for_its_trackers(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "run", trackers=["tests.tracking:Recorder", "tests.tracking:Recorder"])
    with Run.create(asked) as made:
        made.log_metrics(1, {"reward": 0.25})
    assert json.loads((made.dir / "trackers.json").read_text()) == {
        "tests.tracking:Recorder": "the-run-1",
        "tests.tracking:Recorder-2": "the-run-2",
    }
    for step, pending, resumed_from in ((3, False, 3), (3, True, 2), (0, False, -1)):
        with Run.resume(asked, step, pending=pending):
            pass
        begun = [call[1] for call in Recorder.calls if call[0] == "start"][-2:]
        assert {run.id for run in begun} == {"the-run-1", "the-run-2"}
        assert {run.resumed_from for run in begun} == {resumed_from}


# ---- metrics ---------------------------------------------------------------------------------------------------


def test_metrics_are_sorted_lines_without_wall_clock(run: Run) -> None:
    run.log_metrics(1, {"reward": np.float32(0.5), "entropy": 1.25, "updates": 2, "on": True})
    run.log_timing(1, {"seconds": 3.5})
    text = (run.dir / "metrics.jsonl").read_text()
    assert text == '{"entropy": 1.25, "on": true, "reward": 0.5, "step": 1, "updates": 2}\n'
    assert read_metrics(run.dir / "timing.jsonl") == [{"step": 1, "seconds": 3.5}]


def test_metrics_are_on_disk_before_the_run_is_closed(run: Run) -> None:
    run.log_metrics(1, {"reward": 1.0})
    assert len(read_metrics(run.dir / "metrics.jsonl")) == 1
    run.log_metrics(2, {"reward": 2.0})
    assert [record["step"] for record in read_metrics(run.dir / "metrics.jsonl")] == [1, 2]


def test_numbers_that_are_not_finite_are_null_on_disk_and_nan_when_read(run: Run) -> None:
    run.log_metrics(1, {"a": math.nan, "b": np.float32(math.inf), "c": np.array([1.0, math.nan])})
    line = (run.dir / "metrics.jsonl").read_text()
    assert json.loads(line) == {"a": None, "b": None, "c": [1.0, None], "step": 1}
    [record] = read_metrics(run.dir / "metrics.jsonl")
    assert math.isnan(record["a"])


def test_tensors_are_numbers(run: Run) -> None:
    import torch

    run.log_metrics(1, {"loss": torch.tensor(0.5, requires_grad=True).detach()})
    assert read_metrics(run.dir / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_a_torn_last_line_is_left_out_and_a_broken_one_before_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(path) == read_metrics(str(path)) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl line 2: not a JSON record"):
        read_metrics(path)
    with pytest.raises(StorageError, match="can't be read"):
        read_metrics(tmp_path / "none.jsonl")


# ---- samples ---------------------------------------------------------------------------------------------------


def test_samples_hold_every_rollout_with_advantages_by_turn(run: Run) -> None:
    one, rows = group()
    decoded: list[int] = []

    def decode(ids: Any) -> str:
        decoded.append(len(ids))
        return "".join(chr(96 + int(i)) for i in ids)

    path = run.save_samples(10, [one], rows, decode)
    assert path == run.dir / "samples" / "step_000010.jsonl.gz"
    first, second = (json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
    assert (first["step"], first["group"], first["member"], first["task"]) == (10, 0, 0, "t1")
    assert first["reward_parts"] == {"env": 1.0}
    assert [t["advantages"] for t in first["turns"]] == [[0.5, 0.25], [-1.0]]
    assert [t["prompt"] for t in first["turns"]] == ["ab", "e"]
    assert first["turns"][0]["token_ids"] == [3, 4]
    assert first["turns"][0]["sampled_logprobs"] == [-0.5, -0.5]
    assert first["turns"][0]["info"]["temperature"] is None  # NaN is no JSON
    assert second["error"] == "broke"
    assert second["turns"][0]["advantages"] is None
    assert first["turns"][0]["tokens"] == ["c", "d"]
    assert decoded.count(2) == 2  # the prompt that both share is decoded once, and so is their reply as tokens


def test_equal_samples_are_equal_bytes(run: Run, tmp_path: Path) -> None:
    one, rows = group()
    path = run.save_samples(1, [one], rows)
    first = path.read_bytes()
    path.unlink()
    assert run.save_samples(1, [one], rows).read_bytes() == first
    assert first[4:8] == b"\0\0\0\0"  # the time field of a gzip header (RFC 1952)


# ---- a full disk -----------------------------------------------------------------------------------------------


class _FullDisk(io.FileIO):
    """Takes `room` bytes more, then answers as a full disk does."""

    room = 0

    def write(self, data: Any, /) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(bytes(data)[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_is_a_sentence_and_what_was_written_stays(run: Run) -> None:
    run.log_metrics(1, {"reward": 1.0})
    run._files["metrics.jsonl"].close()
    full = _FullDisk(run.dir / "metrics.jsonl", "a")
    full.room = 5  # a line is cut in the middle
    run._files["metrics.jsonl"] = full
    with pytest.raises(
        StorageError, match=r"metrics\.jsonl: the disk is full \(\d+ MiB left\); free some space"
    ) as told:
        run.log_metrics(2, {"reward": 2.0})
    assert "stays readable" in str(told.value)
    assert (run.dir / "metrics.jsonl").read_text() == '{"reward": 1.0, "step": 1}\n'
    full.room = 1000
    run.log_metrics(2, {"reward": 2.0})  # once there is room again, the run goes on
    assert [record["step"] for record in read_metrics(run.dir / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_leaves_no_half_of_a_samples_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one, rows = group()
    good = run.save_samples(1, [one], rows)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_module.os, "replace", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        run.save_samples(2, [one], rows)
    assert list((run.dir / "samples").iterdir()) == [good]


def test_other_errors_of_the_disk_are_sentences_too(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no permission to write; choose another run\.dir"), writing(tmp_path):
        raise PermissionError(errno.EACCES, "denied")
    with pytest.raises(StorageError, match=r"can't be written: Is a directory"), writing(tmp_path):
        open(tmp_path, "w").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't be written"):
        Run.create(recipe(tmp_path / "file" / "run"))


# ---- the rest --------------------------------------------------------------------------------------------------


def test_abandon_removes_only_a_run_that_measured_nothing(run: Run, tmp_path: Path) -> None:
    run.log_metrics(1, {"reward": 1.0})
    assert not run.abandon()
    assert run.dir.is_dir()
    other = Run.create(recipe(tmp_path / "other"))
    assert other.abandon()
    assert not (tmp_path / "other").exists()


def test_saved_says_what_there_is(run: Run) -> None:
    assert run.saved() == f"saved in {run.dir}: no finished step, no checkpoint."
    run.log_metrics(3, {})
    run.path("checkpoints", "step_000003", "policy")
    assert run.saved() == f"saved in {run.dir}: metrics up to step 3, checkpoint {run.dir}/checkpoints/step_000003."


def test_plot_draws_what_was_recorded(run: Run) -> None:
    assert run.plot() is None
    run.log_metrics(0, {"eval/return": -3.0, "eval/low": -4.0, "eval/high": -2.0})
    for step in range(1, 4):
        run.log_metrics(step, {"reward": -3.0 + step, "policy_loss": 0.1, "kl": math.nan if step == 2 else 0.1})
    path = run.plot()
    assert path == run.dir / "plots" / "training.png"
    drawn = sorted(file.name for file in path.parent.iterdir())
    assert drawn == ["policy_metrics_with_entropy.png", "training.png", "training_metrics_detailed.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in path.parent.iterdir())


def test_pictures_on_the_way_are_drawn_aside_and_not_all_the_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log_metrics(1, {"reward": 1.0})
    clock = iter([100.0, 100.0, 101.0, 120.9, 121.1, 121.1, 122.0])
    monkeypatch.setattr(run_module.time, "monotonic", lambda: next(clock))
    drawn = []
    monkeypatch.setattr(run, "plot", lambda: drawn.append(threading.current_thread().name))
    for expected in (1, 1, 2):  # at 100; not at 120.9, as the second that it took is a twentieth of 20; at 121.1
        run.plot_soon()
        assert run._plotting is not None
        run._plotting.join()
        assert drawn == ["plots"] * expected


def test_a_picture_that_cannot_be_written_does_not_end_the_run(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.log_metrics(1, {"reward": 1.0})
    (run.dir / "plots").write_text("in the way")
    run.plot_soon()
    assert run._plotting is not None
    run._plotting.join()
    assert "plots/training.png: can't be written" in caplog.text
