"""Where a step's groups come from: rollouts of tasks, or records of data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sapwood.algorithms import Algorithm
from sapwood.chat import Chat
from sapwood.data.dataset import Dataset
from sapwood.data.groups import Grouper
from sapwood.data.prompts import DataPrompts
from sapwood.data.recordings import RecordingGrouper
from sapwood.engines import Engine, Sampling
from sapwood.envs import EnvFamily
from sapwood.errors import DataError
from sapwood.rewards import Reward
from sapwood.rollout import collect
from sapwood.types import Group, Task

#: Further rollouts that dynamic sampling may ask for in one step.
MAX_RESAMPLES = 3

#: Records of which at least one has to fit the limits on length.
FIRST_RECORDS = 256

# Streams of the run's seed, so that no two uses draw the same numbers.
TASKS, SAMPLING, ORDER, DROPOUT, GLOBAL = range(5)


def derive(seed: int, *path: int) -> int:
    """A seed of its own for every use, in 0 .. 2**32 - 1."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint32)[0])


def steps_of(steps: int | None, epochs: float | None, examples: int | None, per_step: int) -> int:
    """The run's steps; an epoch is a pass over `examples`, its last step fills up from the next one."""
    if steps is not None:
        return steps
    if epochs is None or examples is None:
        raise ValueError("steps, or epochs over a known number of examples")
    # Rounded, because 0.07 x 100 is a little more than 7 in floating point.
    return max(1, math.ceil(round(epochs * examples / per_step, 9)))


class Source(ABC):
    """Gives every step its groups. temperature: what the rows' logits are divided by."""

    temperature: float = 1.0
    _given: int = 0

    def _check_any(self, given: int, asked: int, records: int) -> None:
        """Raises DataError where a whole epoch, or its first FIRST_RECORDS, gave nothing to learn from."""
        self._given += given
        if not self._given and asked >= min(records, FIRST_RECORDS):
            raise DataError(
                f"none of the first {min(asked, records)} records fits data.max_length, data.max_prompt_length and "
                "the model's context: raise them, or choose data.long_prompt and data.long_reply that cut."
            )

    @abstractmethod
    def groups(self, step: int) -> list[Group]:
        """The groups of step 1, 2 ...; the same for the same step, whatever was asked before."""

    def metrics(self) -> dict[str, float]:
        """What to log about the last groups."""
        return {}

    def counts(self) -> Mapping[str, int]:
        """What was cut or left out over the whole run."""
        return {}

    def state(self) -> dict[str, Any]:
        """What can't be told from the step alone, to checkpoint."""
        return {"given": self._given}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._given = int(state["given"])


@dataclass
class Rollouts(Source):
    """Fresh attempts at tasks of an environment. grouper: of prompts of data, whose limits on length it applies."""

    family: EnvFamily
    engine: Engine
    chat: Chat
    sampling: Sampling
    rewards: Sequence[Reward]
    algorithm: Algorithm
    per_step: int
    seed: int
    max_context: int | None = None
    grouper: Grouper | None = None
    temperature: float = field(init=False)

    def __post_init__(self) -> None:
        self.temperature = self.sampling.temperature

    def counts(self) -> Mapping[str, int]:
        """Prompts cut or dropped by the limits on length."""
        return self.grouper.counts if self.grouper is not None else {}

    def state(self) -> dict[str, Any]:
        """Of the environment family and the rewards too."""
        return {
            **super().state(),
            "counts": dict(self.counts()),
            "family": self.family.state(),
            "rewards": [{"kind": type(reward).__name__, "state": reward.state()} for reward in self.rewards],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        super().load_state(state)
        if self.grouper is not None:
            self.grouper.counts.update(state["counts"])
        self.family.load_state(state["family"])
        for reward, kept in zip(self.rewards, state["rewards"], strict=False):
            if kept["kind"] == type(reward).__name__:  # a resumed run may have other rewards
                reward.load_state(kept["state"])

    def groups(self, step: int) -> list[Group]:
        """A step's groups. With resampling, groups that can't teach are replaced, a bounded number of times."""
        groups: list[Group] = []
        for attempt in range(1 + MAX_RESAMPLES):
            fresh = self._collect(step, attempt, self._tasks(step, attempt, self.per_step - len(groups)))
            last = attempt == MAX_RESAMPLES or not self.algorithm.resample
            groups += [group for group in fresh if last or self.algorithm.informative(group)]
            if last or len(groups) == self.per_step:
                break
        if isinstance(self.family, DataPrompts):
            self._check_any(len(groups), step * self.per_step, len(self.family.train))
        return groups

    def _collect(self, step: int, attempt: int, tasks: list[Task]) -> list[Group]:
        if not tasks:  # none of these prompts fits
            return []
        return collect(
            self.family,
            tasks,
            self.algorithm.attempts,
            self.engine,
            self.chat,
            self.sampling,
            derive(self.seed, SAMPLING, step, attempt),
            max_context=self.max_context,
            rewards=self.rewards,
        )

    def _tasks(self, step: int, attempt: int, count: int) -> list[Task]:
        """Prompts of data are walked epoch by epoch, others are drawn; so are those of a further attempt."""
        if isinstance(self.family, DataPrompts) and attempt == 0:
            return self.family.walk((step - 1) * self.per_step, count)
        return self.family.tasks("train", count, derive(self.seed, TASKS, step, attempt))


@dataclass
class Records(Source):
    """Recorded examples, epoch after epoch, each in an order of its own."""

    dataset: Dataset
    grouper: Grouper | RecordingGrouper
    per_step: int
    _order: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, np.int64)), init=False)
    _dropped: int = field(default=0, init=False)

    def groups(self, step: int) -> list[Group]:
        """The records of a step as groups; those that the truncation policy drops are missing."""
        first = (step - 1) * self.per_step
        found = [self._group(position) for position in range(first, first + self.per_step)]
        self._dropped = sum(group is None for group in found)
        groups = [group for group in found if group is not None]
        self._check_any(len(groups), step * self.per_step, len(self.dataset))
        return groups

    def metrics(self) -> dict[str, float]:
        """dropped_records: those of the last step that the limits on length left out."""
        return {"dropped_records": float(self._dropped)}

    def counts(self) -> Mapping[str, int]:
        """Records cut or dropped by the limits on length."""
        return self.grouper.counts

    def state(self) -> dict[str, Any]:
        """Counts; the place in the epoch follows from the step."""
        return {**super().state(), "counts": dict(self.grouper.counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        super().load_state(state)
        self.grouper.counts.update(state["counts"])

    def _group(self, position: int) -> Group | None:
        epoch, at = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            self._order = (epoch, self.dataset.order(epoch))
        index = int(self._order[1][at])
        return self.grouper.group(self.dataset[index], index)


def held_out_groups(dataset: Dataset, grouper: Grouper | RecordingGrouper, limit: int) -> list[Group]:
    """The first `limit` held-out records as groups. Raises DataError where none fits the length limits."""
    found = [grouper.group(dataset[i], i) for i in range(min(len(dataset), limit))]
    groups = [group for group in found if group is not None]
    if found and not groups:
        raise DataError(
            f"none of {len(found)} held-out records fits data.max_length, data.max_prompt_length and the model's "
            "context: raise them, or choose data.long_prompt and data.long_reply that cut."
        )
    return groups
