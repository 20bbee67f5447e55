"""Weights & Biases, online, or offline until `wandb sync`. Needs sapwood[wandb]."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from sapwood.errors import ConfigError, MissingExtra
from sapwood.trackers import Status, TrackedRun, Tracker


class WandB(Tracker):
    """A run on wandb.ai or a server of one's own (WANDB_BASE_URL). The key comes from `wandb login` or WANDB_API_KEY.

    Files go to RUN/wandb. A resumed run goes on with the same wandb run; steps that it repeats are left as they were.
    """

    project: str = Field(default="sapwood", min_length=1, description="the project that the run belongs to")
    entity: str | None = Field(default=None, description="user or team; that of the login unless given")
    run_name: str | None = Field(default=None, description="the run folder's name unless given")
    group: str | None = Field(default=None, description="runs of a group are shown together")
    tags: tuple[str, ...] = Field(default=(), description="to find it by")
    notes: str | None = Field(default=None, description="a few words about the run")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None, description="offline keeps everything in the run folder; WANDB_MODE, or else online, unless given"
    )

    _run: Any = PrivateAttr(default=None)

    @classmethod
    def login(cls) -> str:
        """Where its secrets belong."""
        return "run `wandb login` once, or set WANDB_API_KEY."

    @property
    def chosen_mode(self) -> str:
        """The mode, by the option or the environment."""
        return self.mode or os.environ.get("WANDB_MODE", "").lower() or "online"

    def check(self) -> None:
        """Whether the package is there and, to be online, a key."""
        if importlib.util.find_spec("wandb") is None:
            raise MissingExtra("wandb", "wandb", "the tracker 'wandb'")
        if self.chosen_mode == "online" and not _has_login():
            raise ConfigError(
                "trackers: wandb has no login here: run `wandb login`, set WANDB_API_KEY, or choose mode: offline, "
                "which keeps everything in the run folder until `wandb sync`."
            )

    def start(self, run: TrackedRun) -> str:
        """Begin a run, or go on with that of `run.id`."""
        import wandb  # pyright: ignore[reportMissingImports]

        settings = wandb.Settings(silent=True, console="off", disable_code=True, x_disable_viewer=True)
        name = run.id or secrets.token_hex(4)
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name or run.name,
            group=self.group,
            tags=self.tags or None,
            notes=self.notes,
            id=name,
            resume="allow",
            reinit="create_new",
            dir=str(run.dir),
            mode=self.chosen_mode,  # pyright: ignore[reportArgumentType]
            config=dict(run.recipe),
            settings=settings,
        )
        return name

    def address(self) -> str | None:
        """The run's page, or how to send it there."""
        if self.chosen_mode == "offline":
            return f"offline; send it with `wandb sync {self._run.settings.sync_dir}`"
        return self._run.url

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        self._run.log(dict(values), step=step)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """A table a time, a text a row."""
        import wandb  # pyright: ignore[reportMissingImports]

        tables: dict[str, list[list[Any]]] = {}
        for name, text in values.items():
            folder, _, row = name.rpartition("/")
            tables.setdefault(folder or "texts", []).append([step, row, text])
        made = {name: wandb.Table(columns=["step", "which", "text"], data=rows) for name, rows in tables.items()}
        self._run.log(made, step=step)

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Of 64 bins."""
        import wandb  # pyright: ignore[reportMissingImports]

        self._run.log({name: wandb.Histogram(array) for name, array in values.items()}, step=step)  # pyright: ignore[reportArgumentType]

    def finish(self, status: Status) -> None:
        """Send what waits; a run that failed is marked so."""
        self._run.finish(exit_code=1 if status == "failed" else 0)


def _has_login() -> bool:
    """Whether wandb would find a key by itself: environment, settings file, .netrc."""
    import wandb  # pyright: ignore[reportMissingImports]

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return bool(wandb.login(prompt=False, verify=False))


PLUGIN = WandB
