"""Weights & Biases, offline and disabled: its own file is read back. `make test-trackers` has the package."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from sapwood.errors import ConfigError
from sapwood.trackers import TrackedRun
from sapwood.trackers._hub import Trackers
from sapwood.trackers.check import check_tracker
from sapwood.trackers.wandb import WandB

pytest.importorskip("wandb")
pytestmark = pytest.mark.trackers


@pytest.fixture(autouse=True)
def _nobody(monkeypatch, tmp_path):
    """A user without a login or settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))


def records(path):
    """The records of a .wandb file: a LevelDB log of protocol buffers, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


def sessions(folder):
    """Of every offline session: run id, config, rows, exit code."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        session = {"rows": []}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                session |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                session["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                items = record.history.item
                session["rows"].append(
                    {"/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in items}
                )
            elif kind == "exit":
                session["exit"] = record.exit.exit_code
        found.append(session)
    return found


def test_an_offline_run_is_kept_in_the_folder_and_gone_on_with(tmp_path):
    run = TrackedRun(tmp_path / "mine", "mine", {"algorithm": {"name": "grpo"}, "run": {"seed": 3}})
    run.dir.mkdir()
    hub = Trackers([("wandb", WandB(mode="offline", project="p", tags=("a",)))])
    hub.check()
    hub.start(run, seconds=120)
    [note] = hub.notes()
    assert note.startswith(f"tracker wandb: offline; send it with `wandb sync {run.dir}/wandb/offline-run-")
    for step in (1, 2):
        hub.samples(step, [{"task": "t", "reward": 0.5, "turns": [{"reply": "<b>", "token_ids": [1]}]}])
        hub.scalars(step, {"reward": step / 2, "eval/pass@8": 0.5})
        hub.scalars(step, {"tokens_per_second": 9.0}, prefix="timing/")
    hub.finish("stopped", seconds=120)
    again = Trackers([("wandb", WandB(mode="offline", project="p"))])
    again.start(TrackedRun(run.dir, "mine", run.recipe, resumed_from=2), seconds=120)
    again.scalars(3, {"reward": 1.5})
    again.finish("failed", seconds=120)
    deadline = time.monotonic() + 60
    while not all("exit" in session for session in sessions(run.dir)) and time.monotonic() < deadline:
        time.sleep(0.1)  # its own process writes, and may do so after `finish`
    first, second = sessions(run.dir)
    assert first["id"] == second["id"] == json.loads((run.dir / "trackers.json").read_text())["wandb"]
    assert (first["project"], first["name"], first["exit"], second["exit"]) == ("p", "mine", 0, 1)
    assert first["config"]["algorithm"] == {"name": "grpo"}
    rows = [
        {k: row[k] for k in ("_step", "reward", "eval/pass@8", "timing/tokens_per_second")} for row in first["rows"]
    ]
    assert rows == [
        {"_step": "1", "reward": "0.5", "eval/pass@8": "0.5", "timing/tokens_per_second": "9"},
        {"_step": "2", "reward": "1", "eval/pass@8": "0.5", "timing/tokens_per_second": "9"},
    ]
    assert json.loads(first["rows"][0]["histograms/rewards/values"]).count(1) == 1
    assert [row["reward"] for row in second["rows"]] == ["1.5"]
    tables = [json.loads(path.read_text()) for path in run.dir.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert {table["data"][0][1] for table in tables} == {"first"}
    assert "<b>" in tables[0]["data"][0][2]


def test_it_keeps_its_contract(tmp_path):
    check_tracker(WandB(mode="offline"), tmp_path)


def test_without_a_login_it_says_so_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"run `wandb login`, set WANDB_API_KEY, or choose mode: offline"):
        WandB().check()
    with pytest.raises(ValueError, match="run `wandb login` once, or set WANDB_API_KEY"):
        WandB.model_validate({"api_key": "x"})


def test_the_environment_chooses_where_the_recipe_does_not(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    WandB().check()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandB().check()
    assert WandB().chosen_mode == "offline"
    assert WandB(mode="disabled").chosen_mode == "disabled"


def test_a_disabled_one_does_nothing(tmp_path):
    tracker = WandB(mode="disabled")
    tracker.start(TrackedRun(tmp_path, "run", {}))
    tracker.scalars(1, {"reward": 1.0})
    tracker.histograms(1, {"rewards": np.ones(3)})
    tracker.finish("finished")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_gone_does_not_stop_training(tmp_path):
    """Online, with a key, and nobody at the address: told once, and the process ends in time."""
    code = f"""
import time
from pathlib import Path
from sapwood.trackers import TrackedRun
from sapwood.trackers._hub import Trackers
from sapwood.trackers.wandb import WandB
if __name__ == "__main__":
    hub = Trackers([("wandb", WandB())])
    hub.check()
    began = time.monotonic()
    hub.start(TrackedRun(Path({str(tmp_path)!r}), "run", {{}}), seconds=1)
    for step in range(100):
        hub.scalars(step, {{"reward": 1.0}})
    hub.finish("finished", seconds=1)
    assert time.monotonic() - began < 30  # two waits of a second, and what a busy machine adds
    print(hub.notes())
"""
    env = {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tracker wandb: " in done.stdout
