"""trackio: local by default (look with `trackio show`), or a Hugging Face Space. Needs sapwood[trackio]."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, field_validator

from sapwood.errors import ConfigError, MissingExtra
from sapwood.trackers import Status, TrackedRun, Tracker, as_code


class Trackio(Tracker):
    """A run of a trackio project, kept where trackio keeps all (TRACKIO_DIR, or its cache), or sent to a Space.

    A resumed run goes on with the newest trackio run of its name, so give runs that share a folder's name a run_name.
    """

    project: str = Field(default="sapwood", description="the project that the run belongs to")
    run_name: str | None = Field(default=None, description="the run folder's name unless given")
    group: str | None = Field(default=None, description="runs of a group are shown together")
    space_id: str | None = Field(default=None, description="a Space to send it to, such as user/space")
    server_url: str | None = Field(
        default=None, description="a trackio server to send it to; its key is TRACKIO_WRITE_TOKEN"
    )

    _run: Any = PrivateAttr(default=None)

    @classmethod
    def login(cls) -> str:
        """Where its secrets belong."""
        return "run `hf auth login`, or set TRACKIO_WRITE_TOKEN for a server."

    @field_validator("project")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w\- .]+", value) or value.startswith("."):
            raise ValueError(f"project {value!r}: letters, digits, - _ . and spaces only.")
        return value

    def check(self) -> None:
        """Whether the package is there and, to send it somewhere, a key."""
        if importlib.util.find_spec("trackio") is None:
            raise MissingExtra("trackio", "trackio", "the tracker 'trackio'")
        if self.server_url is not None and not os.environ.get("TRACKIO_WRITE_TOKEN"):
            raise ConfigError("trackers: trackio's server_url needs a key: set TRACKIO_WRITE_TOKEN, or remove it.")
        if self.space_id is not None:
            from huggingface_hub import get_token

            if get_token() is None:
                raise ConfigError(
                    "trackers: trackio's space_id needs a login: run `hf auth login`, set HF_TOKEN, or remove it."
                )

    def start(self, run: TrackedRun) -> str:
        """Begin a run, or go on with the one of its name."""
        import matplotlib.figure  # noqa: F401  (trackio looks whether it is loaded: not while another thread does so)
        import trackio  # pyright: ignore[reportMissingImports]

        # Hardware isn't measured: it would run in this process, in a thread of its own.
        self._run = trackio.init(
            project=self.project,
            name=self.run_name or run.id or run.name,
            group=self.group,
            space_id=self.space_id,
            server_url=self.server_url,
            config=dict(run.recipe),
            resume="allow" if run.id is not None else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return str(self._run.name)

    def address(self) -> str:
        """Where it is shown."""
        return self.server_url or self.space_id or f"trackio show --project {self.project}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        self._run.log(dict(values), step=step)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """As code blocks, because trackio renders Markdown."""
        import trackio  # pyright: ignore[reportMissingImports]

        self._run.log({name: trackio.Markdown(as_code(text)) for name, text in values.items()}, step=step)

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Of 64 bins."""
        import trackio  # pyright: ignore[reportMissingImports]

        self._run.log({name: trackio.Histogram(array) for name, array in values.items()}, step=step)

    def finish(self, status: Status) -> None:
        """Send what waits."""
        self._run.finish()


PLUGIN = Trackio
