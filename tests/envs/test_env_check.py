import random

import numpy as np
import pytest
from tests.worlds import Guess

from sapwood.envs import Observation, Step
from sapwood.envs.check import GARBAGE, check_env
from sapwood.errors import EnvError
from sapwood.plugins import known, load
from sapwood.types import Message, Task

ITEMS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(30)]
# Options of the built-ins that can't be made without any; the rest are made with their defaults.
OPTIONS = {"prompts": {"items": ITEMS}, "reasoning_gym": {"task": "chain_sum"}}


@pytest.mark.parametrize("name", known("env"))
def test_every_built_in_keeps_the_contract(name):
    check_env(load("env", name)(**OPTIONS.get(name, {})))


def test_a_good_world_passes():
    check_env(Guess())
    check_env(Guess(restart=True, limit=3))


class Overlaps(Guess):
    def tasks(self, split, count, seed):
        return [Task(f"{split}{i}", seed=i, metadata={"answer": 1}) for i in range(count)]


class Repeats(Guess):
    def tasks(self, split, count, seed):
        return [Task(split, seed=i) for i in range(count)]


class Wanders(Guess):
    def tasks(self, split, count, seed):
        return [Task(f"{split}{i}", seed=random.Random().getrandbits(60), metadata={"answer": 1}) for i in range(count)]


class Few(Guess):
    def tasks(self, split, count, seed):
        return super().tasks(split, count - 1, seed)


class Opaque(Guess):
    def tasks(self, split, count, seed):
        return [Task(f"{split}{i}", metadata={"x": {1, 2}}) for i in range(count)]


class Wrapped(Guess):
    """Changes what the good world's step gives."""

    def make(self, task):
        inner, change = super().make(task), self.change
        step = inner.step
        inner.step = lambda reply: change(step(reply), reply)
        return inner

    def change(self, step, reply):
        return step


class Raises(Wrapped):
    def change(self, step, reply):
        if reply == GARBAGE[4]:
            float("not a number")
        return step


class NeverEnds(Wrapped):
    def change(self, step, reply):
        return Step(None, step.reward, info=step.info)


class Global(Wrapped):
    def change(self, step, reply):
        np.random.rand()
        return step


class Rich(Wrapped):
    def change(self, step, reply):
        return Step(step.observation, step.reward, step.terminated, step.truncated, {"x": float("nan")})


class Infinite(Wrapped):
    def change(self, step, reply):
        return Step(step.observation, float("inf"), step.terminated, step.truncated)


class Mumbles(Wrapped):
    def change(self, step, reply):
        return Step(step.observation, 0.0, step.terminated, step.truncated, {"parsed": "sort of"})


class Answers(Wrapped):
    def change(self, step, reply):
        return Step(Observation((Message("assistant", "I'll do it"),)), 0.0)


class Wordless(Wrapped):
    def change(self, step, reply):
        return Step(Observation(()), 0.0)


class Shares(Guess):
    """Environments of a task count together."""

    def make(self, task):
        inner = super().make(task)
        step, seen = inner.step, SEEN.setdefault(task.id, [])

        def counted(reply):
            seen.append(reply)
            told = step(reply)
            return Step(told.observation, float(len(seen)), told.terminated, told.truncated)

        inner.step = counted
        return inner


SEEN: dict[str, list[str]] = {}


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Overlaps, "must not overlap"),
        (Repeats, "ids of train tasks must be unique"),
        (Wanders, "depend on the arguments alone"),
        (Few, "must return 3 tasks"),
        (Opaque, "metadata of task 'train0' must be JSON-serialisable"),
        (Raises, "must not raise for a reply"),
        (NeverEnds, "None exactly when the episode ended"),
        (Global, "global random state"),
        (Rich, "info must be JSON-serialisable"),
        (Infinite, "rewards must be finite"),
        (Mumbles, "'sort of'"),
        (Answers, "leave the reply to the model"),
        (Wordless, "must have a message"),
        (Shares, "go on alike"),
    ],
)
def test_the_check_catches(cls, sentence):
    with pytest.raises(EnvError, match=f"{cls.__name__}.*{sentence}"):
        check_env(cls())


def test_only_families_are_checked():
    with pytest.raises(EnvError, match="not an instance"):
        check_env(Guess)  # type: ignore[arg-type]
