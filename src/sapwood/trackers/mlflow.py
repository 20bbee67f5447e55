"""MLflow: a tracking server, or a database in the run folder. Needs sapwood[mlflow]."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, field_validator

from sapwood.errors import MissingExtra
from sapwood.trackers import Status, TrackedRun, Tracker

#: MLflow's limits on one call.
BATCH, LONGEST_PARAMETER = 500, 6000
BINS = 40
#: Stands beside a run's own database once that has its tables, which takes MLflow seconds.
WHOLE = ".whole"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_ADDRESS = re.compile(r"(https?|file|sqlite|postgresql|mysql|mssql|databricks|uc)(\+\w+)?:|databricks$")


class MLflow(Tracker):
    """A run of an MLflow experiment. User and password of a server: MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN.

    Histograms and texts are artifacts, as MLflow has no such metrics. A resumed run goes on with the same MLflow run.
    """

    tracking_uri: str | None = Field(
        default=None, description="MLFLOW_TRACKING_URI, or else a database in RUN/mlflow, unless given"
    )
    experiment: str = Field(default="sapwood", min_length=1, description="the experiment; made where it isn't there")
    run_name: str | None = Field(default=None, description="the run folder's name unless given")
    tags: dict[str, str] = Field(default={}, description="to find it by")

    _client: Any = PrivateAttr(default=None)
    _run_id: str = PrivateAttr(default="")
    _where: str = PrivateAttr(default="")

    @classmethod
    def login(cls) -> str:
        """Where its secrets belong."""
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."

    @field_validator("tracking_uri")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None and not _ADDRESS.match(value):
            raise ValueError(
                f"tracking_uri {value!r} is no address: http://HOST:PORT, sqlite:///FILE or file:FOLDER are common."
            )
        return value

    def check(self) -> None:
        """Whether the packages are there."""
        local = (self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:").startswith("sqlite:")
        for package in ("mlflow", *(("sqlalchemy", "alembic") if local else ())):
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(package, "mlflow", "the tracker 'mlflow'")

    def start(self, run: TrackedRun) -> str:
        """Begin a run, or go on with that of `run.id`; options of the recipe are its parameters."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        # Of a new database it tells how it makes the tables.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        own = self.tracking_uri is None and not os.environ.get("MLFLOW_TRACKING_URI")
        folder = run.dir.absolute() / "mlflow"
        if own:
            folder.mkdir(exist_ok=True)
            self._where = f"sqlite:///{_database(folder)}"
        else:
            self._where = self.tracking_uri or os.environ["MLFLOW_TRACKING_URI"]
        self._client = MlflowClient(tracking_uri=self._where)
        if run.id is not None and self._exists(run.id):
            self._run_id = run.id
            self._client.update_run(run.id, status="RUNNING")
            return run.id
        made = self._client.create_run(
            self._experiment(folder.as_uri() if own else None), tags=self.tags, run_name=self.run_name or run.name
        )
        self._run_id = made.info.run_id
        if own:
            (folder / WHOLE).touch()
        options = [Param(_name(key), str(value)[:LONGEST_PARAMETER]) for key, value in _leaves(run.recipe)]
        for first in range(0, len(options), 100):
            self._client.log_batch(self._run_id, params=options[first : first + 100])
        return self._run_id

    def _exists(self, run_id: str) -> bool:
        """Whether the server still has the run."""
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        try:
            self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _experiment(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is not None:
            return found.experiment_id
        return self._client.create_experiment(self.experiment, artifact_location=artifacts)

    def address(self) -> str:
        """The server, or how to look at the database."""
        if self._where.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {self._where}"
        return re.sub(r"://[^/@]*@", "://", self._where)  # MLFLOW_TRACKING_URI may hold a password

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        moment = int(time.time() * 1000)
        points = [Metric(_name(name), value, moment, step) for name, value in values.items()]
        for first in range(0, len(points), BATCH):
            self._client.log_batch(self._run_id, metrics=points[first : first + BATCH])

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """A text file each: samples/best/step_000010.txt."""
        for name, text in values.items():
            self._client.log_text(self._run_id, text, f"{_name(name)}/step_{step:06d}.txt")

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """A file of edges and counts each: histograms/rewards/step_000010.json."""
        for name, array in values.items():
            counts, edges = np.histogram(array, bins=BINS)
            told = {"step": step, "edges": edges.tolist(), "counts": counts.tolist()}
            self._client.log_dict(self._run_id, told, f"{_name(name)}/step_{step:06d}.json")

    def finish(self, status: Status) -> None:
        """Mark the run as finished, killed (it can be resumed) or failed."""
        self._client.set_terminated(self._run_id, _STATUS[status])


def _database(folder: Path) -> Path:
    """The run's own database. One whose tables were never finished, as the process ended meanwhile, is made anew."""
    path = folder / "mlflow.db"
    if not (folder / WHOLE).exists():
        for file in folder.glob("mlflow.db*"):
            file.unlink()
    return path


def _name(name: str) -> str:
    """A name with the characters that MLflow takes: pass@8 is pass_8."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]


def _leaves(data: Any, path: str = "") -> list[tuple[str, Any]]:
    """Options by dotted name."""
    if isinstance(data, Mapping) and (data or not path):
        return [leaf for key, value in data.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]
    return [(path, data)]


PLUGIN = MLflow
