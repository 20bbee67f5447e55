"""trackio's local database, in a process of its own as it is chosen on import. `make test-trackers` has the package."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from sapwood.errors import ConfigError
from sapwood.trackers.trackio import Trackio

pytest.importorskip("trackio")
pytestmark = pytest.mark.trackers

SESSIONS = """
from pathlib import Path
from sapwood.trackers import TrackedRun
from sapwood.trackers._hub import Trackers
from sapwood.trackers.trackio import Trackio

folder = Path(FOLDER)
for resumed_from, status, steps in ((None, "stopped", (1, 2)), (2, "finished", (3,))):
    hub = Trackers([("trackio", Trackio(project="p"))])
    hub.check()
    hub.start(TrackedRun(folder, "mine", {"algorithm": {"name": "grpo"}}, resumed_from), seconds=120)
    for step in steps:
        hub.scalars(step, {"reward": step / 2})
        hub.samples(step, [{"task": "t", "reward": 0.5, "turns": [{"reply": "# <b>", "token_ids": [1]}]}])
    hub.finish(status, seconds=60)
    print(hub.notes())
"""
CONTRACT = """
from pathlib import Path
from sapwood.trackers.check import check_tracker
from sapwood.trackers.trackio import Trackio

check_tracker(Trackio, Path(FOLDER))
"""


def play(code, folder):
    env = {**os.environ, "TRACKIO_DIR": str(folder / "home")}
    text = code.replace("FOLDER", repr(str(folder)))
    return subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, timeout=300)


def test_a_run_is_kept_locally_and_gone_on_with(tmp_path):
    done = play(SESSIONS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['tracker trackio: trackio show --project p']\n" * 2
    database = sqlite3.connect(tmp_path / "home" / "p.db")
    rows = [(run, name, step, json.loads(told)) for run, name, step, told in database.execute(
        "select run_id, run_name, step, metrics from metrics order by id")]  # fmt: skip
    assert len({run for run, *_ in rows}) == 1
    assert {name for _, name, *_ in rows} == {"mine"}
    assert [(step, told["reward"]) for *_, step, told in rows if "reward" in told] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    [text] = {told["samples/first"]["_value"] for *_, told in rows if "samples/first" in told}
    assert text.splitlines()[-1] == "    # <b>"
    histogram = next(told["histograms/rewards"] for *_, told in rows if "histograms/rewards" in told)
    assert sum(histogram["values"]) == 1
    [(config,)] = set(database.execute("select config from configs"))
    assert json.loads(config)["algorithm"] == {"name": "grpo"}


def test_it_keeps_its_contract(tmp_path):
    done = play(CONTRACT, tmp_path)
    assert done.returncode == 0, done.stderr


def test_bad_options_and_missing_logins_are_sentences(monkeypatch):
    with pytest.raises(ValueError, match=r"project '\.\./x': letters, digits"):
        Trackio(project="../x")
    for name in ("TRACKIO_WRITE_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="set TRACKIO_WRITE_TOKEN"):
        Trackio(server_url="https://host").check()
    with pytest.raises(ConfigError, match="run `hf auth login`"):
        Trackio(space_id="me/space").check()
