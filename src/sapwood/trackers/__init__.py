"""The contract of a tracker: where a run's numbers, distributions and texts are shown beside its own folder.

A tracker is one file here that sets `PLUGIN`, or "package.module:Class" of anyone's, and is named under `trackers`.
It may fail: what it raises never reaches training, because every tracker works in a thread of its own, behind a queue
(`sapwood.trackers._hub`). Only what a user can mend is told before anything is loaded, by `check`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

#: How a session of a run ended: after its last step, by the user or a signal (it can be resumed), or by an error.
Status = Literal["finished", "stopped", "failed"]

_SECRET_WORDS = frozenset({"password", "passwd", "secret", "token", "apikey", "credential", "credentials"})
_SECRET_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]*@|[?&]\w*(token|key|password|secret)=", re.IGNORECASE)


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker follows.

    dir: its folder; name: that folder's; recipe: what recipe.yaml holds, as plain data; resumed_from: in a session that
    goes on, the last step whose numbers stay (-1: none); id: what `start` returned in an earlier session.
    """

    dir: Path
    name: str
    recipe: Mapping[str, Any]
    resumed_from: int | None = None
    id: str | None = None


class Tracker(BaseModel, ABC):
    """Shows a run somewhere; its fields are the options of its entry under `trackers`.

    After `start`, all methods are called from one thread, in order; steps never fall within a session, and a step has
    several calls. Whatever they raise is told once, tried again, and then given up. Values are finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, options: Any) -> Any:
        for key, value in options.items() if isinstance(options, Mapping) else ():
            if _is_secret(str(key)):
                raise ValueError(f"{key}: a secret doesn't belong in a recipe, which is kept and shown; {cls.login()}")
            if isinstance(value, str) and _SECRET_IN_ADDRESS.search(value):
                raise ValueError(f"{key}: the address holds a secret, and a recipe is kept and shown; {cls.login()}")
        return options

    @classmethod
    def login(cls) -> str:
        """Where its secrets belong, in words that end a sentence."""
        return "give it by an environment variable."

    def check(self) -> None:
        """Raise a SapwoodError for what a user can mend: a missing package or login. Quick, and without a network."""

    @abstractmethod
    def start(self, run: TrackedRun) -> str | None:
        """Begin, or go on. Returns what names the run there, to be given back when it is resumed."""

    def address(self) -> str | None:
        """Where to look, once started."""
        return None

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, such as "loss", "eval/return", "timing/tokens_per_second"."""

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Texts by name: sample replies, which come from a model and may hold anything. Shown as they are."""

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Distributions by name; one-dimensional arrays that aren't empty."""

    def finish(self, status: Status) -> None:
        """End the session; nothing is called after it."""


def as_code(text: str) -> str:
    """Markdown that shows a text as it is, whatever it holds: a code block, which no line of it can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _is_secret(key: str) -> bool:
    words = key.lower().split("_")
    return bool(_SECRET_WORDS.intersection(words)) or words[-2:] in (["api", "key"], ["access", "key"])
