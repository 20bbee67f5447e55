"""The prompts of records as a single-turn world, for algorithms that learn from rollouts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import ClassVar

from pydantic import ConfigDict, PrivateAttr

from sapwood.data import Record
from sapwood.data.dataset import Dataset, Indices
from sapwood.envs import Env, EnvFamily, Observation, Split, Step
from sapwood.errors import ConfigError
from sapwood.types import Message, Task

#: Split, record and index -> the messages to ask, or None where they don't fit.
Fit = Callable[[str, Record, int], tuple[Message, ...] | None]


class DataPrompts(EnvFamily):
    """Asks what the records of a training set and a held-out set ask; pays nothing itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    pays: ClassVar[bool] = False

    train: Dataset
    held_out: Dataset
    # The order of the epoch that is being walked.
    _orders: dict[tuple[int, int | None], Indices] = PrivateAttr(default_factory=dict)
    _fit: Fit | None = PrivateAttr(default=None)
    _room: int | None = PrivateAttr(default=None)

    def limit(self, fit: Fit, room: int | None = None) -> None:
        """Ask what `fit` makes of a record: its messages, or None to leave it out. room: tokens, for a message."""
        self._fit, self._room = fit, room

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`count` tasks in an order drawn from the seed. Only training prompts repeat, once all of them were used.

        Fewer where prompts don't fit. Raises ConfigError where too few prompts are held out, or none of them fits.
        """
        if split == "train":
            return self.walk(0, count, seed)
        if count > len(self.held_out):
            raise ConfigError(
                f"data holds out {len(self.held_out)} prompts, but {count} are asked for: lower eval.tasks, raise "
                "data.eval_fraction or give data.eval_sources."
            )
        order = self.held_out.order(0, seed).tolist()
        found = (self._task("eval", self.held_out, index, 0) for index in order)
        tasks = list(islice((task for task in found if task is not None), count))
        if count and not tasks:
            raise ConfigError(
                f"none of {len(order)} held-out prompts is within {self._room} tokens, which is "
                "data.max_prompt_length, or what engine.max_new_tokens leaves of data.max_length or the model's "
                "context; change one of them."
            )
        return tasks

    def walk(self, first: int, count: int, seed: int | None = None) -> list[Task]:
        """Training tasks first .. first + count of an endless walk: epoch after epoch, each in its own order.

        Those that don't fit are missing.
        """
        tasks: list[Task] = []
        size, at, end = len(self.train), first, first + count
        while at < end:
            epoch, start = divmod(at, size)
            order = self._order(epoch, seed)[start : start + end - at]
            found = (self._task("train", self.train, index, epoch) for index in order.tolist())
            tasks += [task for task in found if task is not None]
            at += len(order)
        return tasks

    def make(self, task: Task) -> Env:
        """An environment that asks the task's prompt and ends with the reply."""
        return _Ask(task)

    def describe(self) -> str:
        """One line for headings."""
        names = [source.path for source in self.train.report.sources]
        return f"prompts from {', '.join(dict.fromkeys(names))}"

    def _order(self, epoch: int, seed: int | None) -> Indices:
        key = (epoch, seed)
        if key not in self._orders:
            self._orders.clear()
            self._orders[key] = self.train.order(epoch, seed)
        return self._orders[key]

    def _task(self, split: str, data: Dataset, index: int, lap: int) -> Task | None:
        record = data[index]
        prompt = record.prompt if self._fit is None else self._fit(split, record, index)
        if prompt is None:
            return None
        name = f"{split}-{index}" + (f"-lap{lap}" if lap else "")
        metadata = {**record.metadata, "index": index, "source": record.source}
        return Task(name, prompt, record.answer, metadata)


class _Ask(Env):
    """Asks once."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def start(self) -> Observation:
        """The task's prompt."""
        return Observation(self._task.prompt)

    def step(self, reply: str) -> Step:
        """End, whatever the reply."""
        return Step(None, 0.0, terminated=True)
