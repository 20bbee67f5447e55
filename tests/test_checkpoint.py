"""Checkpoints: whole or not there, written while training goes on; the newest and the best stay."""

from __future__ import annotations

import errno
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from sapwood import checkpoint, cli
from sapwood.checkpoint import Writer
from sapwood.errors import StorageError
from sapwood.models.load import load_policy
from sapwood.run import Run, read_metrics
from sapwood.sections import LoraSection, ModelSection
from tests.learning import save_tiny_model


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_policy(ModelSection(name=str(folder), lora=LoraSection(rank=4)))


def fill(policy, value: float) -> None:
    for parameter in policy.parameters():
        parameter.data.fill_(value)


def saved_value(folder) -> float:
    weights = load_file(folder / "policy" / "adapter_model.safetensors")
    (value,) = {float(v) for tensor in weights.values() for v in tensor.unique()}
    return value


def test_a_snapshot_is_of_its_moment(policy, tmp_path):
    fill(policy, 1.0)
    state = {"step": 1, "moment": torch.ones(3)}
    taken = checkpoint.snapshot(policy, 1, state)
    fill(policy, 2.0)
    state["moment"].fill_(2.0)
    folder = checkpoint.write(taken, tmp_path)
    assert saved_value(folder) == 1.0
    assert checkpoint.load_state(folder)["moment"].tolist() == [1.0, 1.0, 1.0]
    assert checkpoint.read(folder).resumable


def test_training_goes_on_while_the_writer_writes(policy, tmp_path, monkeypatch):
    gate, began = threading.Event(), threading.Event()
    write = checkpoint.write

    def slow(*given):
        began.set()
        assert gate.wait(20)
        return write(*given)

    monkeypatch.setattr(checkpoint, "write", slow)
    with Writer(tmp_path, keep=3) as writer:
        fill(policy, 1.0)
        writer.submit(lambda: checkpoint.snapshot(policy, 1, {"step": 1}))
        assert began.wait(20)
        fill(policy, 2.0)  # the step after
        assert not checkpoint.found(tmp_path)
        gate.set()
        writer.wait()
        assert saved_value(checkpoint.folder_of(tmp_path, 1)) == 1.0


def test_a_failed_write_is_told_at_the_next(policy, tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("no room")

    with Writer(tmp_path, keep=3) as writer:
        monkeypatch.setattr(checkpoint, "write", refuse)
        writer.submit(lambda: checkpoint.snapshot(policy, 1))
        with pytest.raises(StorageError, match="no room"):
            writer.wait()


def test_the_newest_and_the_best_stay(policy, tmp_path):
    # eval/loss by step: 3 has the lowest of all, and is the older of two equals.
    losses = {1: 0.9, 2: 0.5, 3: 0.2, 4: 0.2, 5: 0.4, 6: 0.3}
    with Writer(tmp_path, keep=2, best="eval/loss", higher=False, background=False) as writer:
        for step, loss in losses.items():
            writer.submit(
                lambda step=step, loss=loss: checkpoint.snapshot(policy, step, {"step": step}, {"eval/loss": loss})
            )
    assert [each.step for each in checkpoint.found(tmp_path)] == [3, 5, 6]
    best = checkpoint.best_of(checkpoint.found(tmp_path), "eval/loss", higher=False)
    assert best is not None
    assert best.step == 3


def test_damaged_ones_do_not_push_out_whole_ones(policy, tmp_path):
    for step in (1, 2, 3):
        checkpoint.write(checkpoint.snapshot(policy, step, {"step": step}), tmp_path)
    (checkpoint.folder_of(tmp_path, 3) / "manifest.json").unlink()
    checkpoint.prune(tmp_path, keep=2)
    assert [each.step for each in checkpoint.found(tmp_path) if each.problem is None] == [1, 2]


def test_a_step_is_written_anew_without_a_gap(policy, tmp_path, monkeypatch):
    fill(policy, 1.0)
    folder = checkpoint.write(checkpoint.snapshot(policy, 1), tmp_path)
    fill(policy, 2.0)

    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "fill", fail)
        with pytest.raises(StorageError, match=r"can't write the checkpoint .*input/output error"):
            checkpoint.write(checkpoint.snapshot(policy, 1), tmp_path)
    assert saved_value(folder) == 1.0
    checkpoint.write(checkpoint.snapshot(policy, 1), tmp_path)
    assert saved_value(folder) == 2.0
    assert [path.name for path in folder.parent.iterdir()] == ["step_000001"]


def test_a_full_disk_is_waited_for(policy, tmp_path, monkeypatch):
    fill_folder, waits = checkpoint.fill, []

    def full_at_first(snap, folder):
        fill_folder(snap, folder)
        if len(waits) < 2:
            raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(checkpoint, "fill", full_at_first)
    folder = checkpoint.write(checkpoint.snapshot(policy, 4, {"step": 4}), tmp_path, waits.append)
    assert waits == [folder, folder]
    assert checkpoint.read(folder).resumable
    waits.clear()
    with pytest.raises(StorageError, match="free some space"):
        checkpoint.write(checkpoint.snapshot(policy, 5), tmp_path)


def test_rows_wait_for_a_full_disk_too(tmp_path, monkeypatch):
    from sapwood import run as module

    line, waits = module._write_line, []

    def full_at_first(file, content):
        if len(waits) < 3:
            raise OSError(errno.ENOSPC, "no space left on device")
        line(file, content)

    monkeypatch.setattr(module, "_write_line", full_at_first)
    opened = Run(tmp_path, None)  # type: ignore[arg-type]
    opened.when_full = waits.append
    opened.log_metrics(1, {"loss": 2.0})
    opened.close()
    assert len(waits) == 3
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_what_a_state_may_hold(policy):
    with pytest.raises(StorageError, match="a set can't be kept in a checkpoint"):
        checkpoint.snapshot(policy, 1, {"seen": {1, 2}})


def test_a_state_of_strangers_is_not_unpickled(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "training_state.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(StorageError, match="can't be read as a training state"):
        checkpoint.load_state(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "training_state.pt")
    with pytest.raises(StorageError, match="can't be read as a training state"):
        checkpoint.load_state(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(policy, tmp_path):
    (tmp_path / "recipe.yaml").write_text("checkpoint: {best: eval/return}\nrewards: [{name: 'gone:Reward'}]\n")
    for step, value in ((2, 0.5), (4, 0.9), (6, 0.7)):
        checkpoint.write(checkpoint.snapshot(policy, step, {"step": step}, {"eval/return": value}), tmp_path)
    return tmp_path


def told(capsys, *arguments) -> tuple[int, dict]:
    code = cli.main(["checkpoints", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_lists_and_verifies(run_dir, capsys):
    code, found = told(capsys, run_dir)
    assert code == 0
    assert [(each["step"], each["whole"], each["best"]) for each in found["checkpoints"]] == [
        (2, True, False),
        (4, True, True),
        (6, True, False),
    ]
    weights = run_dir / "checkpoints" / "step_000006" / "policy" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert told(capsys, run_dir, "--fast")[0] == 0
    code, found = told(capsys, run_dir)
    assert code == 1
    assert found["checkpoints"][2]["problem"].startswith("policy/adapter_model.safetensors is damaged")
    assert cli.main(["checkpoints", str(run_dir)]) == 1
    assert "SHA-256" in " ".join(capsys.readouterr().out.split())


def test_the_command_prunes_and_keeps_the_best(run_dir, capsys):
    shutil.copytree(run_dir / "checkpoints" / "step_000002", run_dir / "checkpoints" / ".step_000008.partial")
    code, found = told(capsys, run_dir, "--prune", 1, "--damaged")
    assert code == 0
    assert [each["step"] for each in found["checkpoints"]] == [4, 6]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000004", "step_000006"]


def test_the_command_answers_for_what_is_no_run(tmp_path, run_dir, capsys):
    assert cli.main(["checkpoints", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.endswith("nowhere: not a run folder, it has no recipe.yaml.\n")
    assert cli.main(["checkpoints", str(run_dir), "--best", "eval/returns"]) == 1
    assert "no checkpoint has the metric 'eval/returns'; known are eval/return." in capsys.readouterr().err
    (run_dir / "recipe.yaml").write_text("checkpoint: [")
    assert cli.main(["checkpoints", str(run_dir)]) == 1
    assert "recipe.yaml line 1: not valid YAML" in capsys.readouterr().err
