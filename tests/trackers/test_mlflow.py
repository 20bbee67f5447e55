"""MLflow with a database of its own and with a server that is gone. `make test-trackers` has the package."""

from __future__ import annotations

import json
import sqlite3
import time

import numpy as np
import pytest

from sapwood.errors import MissingExtra
from sapwood.trackers import TrackedRun
from sapwood.trackers._hub import Trackers
from sapwood.trackers.check import check_tracker
from sapwood.trackers.mlflow import MLflow

pytest.importorskip("mlflow")
pytest.importorskip("alembic")
pytestmark = pytest.mark.trackers


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def opened(folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow/mlflow.db")


def test_a_run_is_kept_in_the_folder_and_gone_on_with(tmp_path):
    recipe = {"algorithm": {"name": "grpo", "odd name?": 1}, "rewards": [], "run": {"dir": "x" * 7000}}
    run = TrackedRun(tmp_path, "mine", recipe)
    hub = Trackers([("mlflow", MLflow(experiment="e", tags={"who": "me"}))])
    hub.check()
    hub.start(run, seconds=120)
    assert hub.notes() == [f"tracker mlflow: mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow/mlflow.db"]
    for step in (1, 2):
        hub.scalars(step, {"reward": step / 2, "eval/pass@8": 0.25})
    hub.samples(2, [{"task": "t", "reward": 0.5, "turns": [{"reply": "<b>", "token_ids": [1]}]}])
    hub.finish("stopped", seconds=60)
    name = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    client = opened(tmp_path)
    assert client.get_run(name).info.status == "KILLED"
    again = Trackers([("mlflow", MLflow(experiment="e"))])
    again.start(TrackedRun(tmp_path, "mine", recipe, resumed_from=2), seconds=60)
    again.scalars(3, {"reward": 1.5})
    again.finish("finished", seconds=60)
    found = client.get_run(name)
    assert (found.info.run_name, found.info.status, found.data.tags["who"]) == ("mine", "FINISHED", "me")
    assert found.data.params["algorithm.name"] == "grpo"
    assert found.data.params["algorithm.odd name_"] == "1"
    assert len(found.data.params["run.dir"]) == 6000
    assert [(m.step, m.value) for m in client.get_metric_history(name, "reward")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert client.get_metric_history(name, "eval/pass_8")[0].value == 0.25
    [text] = tmp_path.glob("mlflow/*/artifacts/samples/first/step_000002.txt")
    assert text.read_text().endswith("<b>")
    [told] = tmp_path.glob("mlflow/*/artifacts/histograms/rewards/step_000002.json")
    assert sum(json.loads(told.read_text())["counts"]) == 1


def test_it_keeps_its_contract(tmp_path):
    check_tracker(MLflow, tmp_path)


def test_a_run_that_the_server_has_forgotten_begins_anew(tmp_path):
    tracker = MLflow()
    name = tracker.start(TrackedRun(tmp_path, "mine", {}, resumed_from=3, id="0" * 32))
    assert name != "0" * 32
    tracker.histograms(4, {"rewards": np.ones(3)})
    tracker.finish("failed")
    assert opened(tmp_path).get_run(name).info.status == "FAILED"


def test_a_database_that_was_never_finished_is_made_anew(tmp_path):
    (tmp_path / "mlflow").mkdir()
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as torn:
        torn.execute("create table runs (half integer)")
    tracker = MLflow()
    name = tracker.start(TrackedRun(tmp_path, "mine", {}))
    tracker.finish("finished")
    again = MLflow()  # and a finished one is kept
    assert again.start(TrackedRun(tmp_path, "mine", {}, resumed_from=0, id=name)) == name


def test_a_server_that_is_gone_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    hub = Trackers([("mlflow", MLflow(tracking_uri="http://127.0.0.1:9"))], pauses=(0.01,))
    hub.check()
    began = time.monotonic()
    hub.start(TrackedRun(tmp_path, "mine", {}), seconds=30)
    hub.scalars(1, {"reward": 1.0})
    hub.finish("finished", seconds=5)
    first, second = hub.notes()
    assert first.startswith("tracker mlflow: MlflowException: ")
    assert first.endswith("it is tried again, and training goes on.")
    assert second.endswith("it kept failing and is left out from here on; the run folder has every number.")
    assert time.monotonic() - began < 40


def test_bad_options_and_missing_packages_are_sentences(monkeypatch):
    with pytest.raises(ValueError, match="tracking_uri 'runs' is no address: http://HOST:PORT"):
        MLflow(tracking_uri="runs")
    with pytest.raises(ValueError, match=r"the address holds a secret.*MLFLOW_TRACKING_USERNAME"):
        MLflow(tracking_uri="https://me:pass@host")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cr3t@host")
    tracker = MLflow()
    tracker._where = "https://me:s3cr3t@host"
    assert tracker.address() == "https://host"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"sapwood\[mlflow\]"):
        MLflow().check()
