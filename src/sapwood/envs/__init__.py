"""The contract of a text world, and the check that every world passes.

A *family* is a frozen pydantic model whose fields are its options. It lists tasks and makes environments; an
environment is single use: made for one task, started once, stepped until it ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from sapwood.types import Message, Task

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Observation:
    """What the model reads next.

    messages: appended to the conversation, or, if `restart`, the whole conversation from here on (what was said
    before is dropped, and the turn branches off in the token tree where its tokens diverge).
    """

    messages: tuple[Message, ...]
    restart: bool = False


@dataclass(frozen=True)
class Step:
    """What a reply led to. observation is None exactly when the episode has ended.

    terminated: the task ended; truncated: a time limit of the world ended it. info: JSON-serialisable; by
    convention `parsed` ("json", "list", "regex", "failed") and `fallback` (bool) where a reply is parsed.
    """

    observation: Observation | None
    reward: float
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Env(ABC):
    """A single-use world for one task."""

    @abstractmethod
    def start(self) -> Observation:
        """The first observation. Called once."""

    @abstractmethod
    def step(self, reply: str) -> Step:
        """Act on the model's reply. Never raises for what a reply says: a bad reply is parsed as failed."""

    def close(self) -> None:  # noqa: B027  (optional hook)
        """Free what the environment holds."""


class EnvFamily(BaseModel, ABC):
    """Makes tasks and environments; its fields are the options of the recipe's `env` section."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: Whether its steps pay. A world that only asks leaves it to the recipe's rewards to say what a reply is worth.
    pays: ClassVar[bool] = True
    #: True where native code may hang or crash: rollouts then run each environment in a process of its own.
    isolate: bool = False
    #: Seconds that one start or step may take in an isolated process.
    step_timeout: float = 60.0

    @abstractmethod
    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`count` tasks, a function of the arguments alone; train and eval never overlap."""

    @abstractmethod
    def make(self, task: Task) -> Env:
        """A new environment for the task."""

    def baselines(self) -> Mapping[str, Any]:
        """Named controllers without a language model: name -> callable(task) -> episode return, for evaluation."""
        return {}

    def state(self) -> dict[str, Any]:
        """What outlives an episode (visit counts, an archive), to checkpoint: plain data and tensors.

        A family without such a state is a function of its tasks, and gives {}.
        """
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
