"""The prompts of records as a single-turn world, for algorithms that learn from rollouts."""

from __future__ import annotations

from pydantic import ConfigDict, PrivateAttr

from sapwood.data.dataset import Dataset, Indices
from sapwood.envs import Env, EnvFamily, Observation, Split, Step
from sapwood.errors import ConfigError
from sapwood.types import Task


class DataPrompts(EnvFamily):
    """Asks what the records of a training set and a held-out set ask; pays nothing itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    train: Dataset
    held_out: Dataset
    # The order of the epoch that is being walked.
    _orders: dict[tuple[int, int | None], Indices] = PrivateAttr(default_factory=dict)

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`count` tasks in an order drawn from the seed. Only training prompts repeat, once all of them were used.

        Raises ConfigError where too few prompts are held out.
        """
        if split == "train":
            return self.walk(0, count, seed)
        if count > len(self.held_out):
            raise ConfigError(
                f"data holds out {len(self.held_out)} prompts, but {count} are asked for: lower eval.tasks, raise "
                "data.eval_fraction or give data.eval_sources."
            )
        order = self.held_out.order(0, seed)[:count]
        return [self._task("eval", self.held_out, index, 0) for index in order.tolist()]

    def walk(self, first: int, count: int, seed: int | None = None) -> list[Task]:
        """Training tasks first .. first + count of an endless walk: epoch after epoch, each in its own order."""
        tasks: list[Task] = []
        size = len(self.train)
        while len(tasks) < count:
            epoch, at = divmod(first + len(tasks), size)
            order = self._order(epoch, seed)[at : at + count - len(tasks)]
            tasks += [self._task("train", self.train, index, epoch) for index in order.tolist()]
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

    def _task(self, split: str, data: Dataset, index: int, lap: int) -> Task:
        record = data[index]
        name = f"{split}-{index}" + (f"-lap{lap}" if lap else "")
        metadata = {**record.metadata, "index": index, "source": record.source}
        return Task(name, record.prompt, record.answer, metadata)


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
