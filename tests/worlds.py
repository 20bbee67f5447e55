"""Small worlds for tests, at module level so that a worker process can import them."""

import os
import time

from sapwood.envs import Env, EnvFamily, Observation, Step
from sapwood.types import Message, Task


def says(text, restart=False):
    return Observation((Message("user", text),), restart)


class Guess(EnvFamily):
    """Guess a number in 1..9: -1 for each wrong guess, 10 for the right one. With `restart` history is dropped."""

    restart: bool = False
    limit: int = 0

    def tasks(self, split, count, seed):
        offset = 1000 * (split == "eval")
        numbers = [(seed + i) % 9 + 1 for i in range(count)]
        return [
            Task(f"{split}-{seed}-{i}", answer=n, metadata={"answer": n}, seed=offset + i)
            for i, n in enumerate(numbers)
        ]

    def make(self, task):
        return _Guess(task, self)

    def baselines(self):
        return {
            "one by one": lambda task: 10.0 - (task.metadata["answer"] - 1),
            "first only": lambda task: 10.0 if task.metadata["answer"] == 1 else -1.0,
        }


class _Guess(Env):
    def __init__(self, task, family):
        self.task, self.family, self.count = task, family, 0

    def start(self):
        return says("guess a number", self.family.restart)  # nothing precedes it, so this drops nothing

    def step(self, reply):
        self.count += 1
        digits = "".join(c for c in reply if c in "0123456789")[:6]
        guess = int(digits) if digits else -1
        answer = self.task.metadata["answer"]
        info = {"parsed": "regex" if digits else "failed", "fallback": not digits, "guess": guess}
        if guess == answer:
            return Step(None, 10.0, terminated=True, info=info)
        if self.count == self.family.limit:
            return Step(None, -1.0, truncated=True, info=info)
        return Step(says("too low" if guess < answer else "too high", self.family.restart), -1.0, info=info)


class Faulty(EnvFamily):
    """Misbehaves as the task's id says, at the second reply unless it is at the start."""

    isolate: bool = True
    step_timeout: float = 1.0

    def tasks(self, split, count, seed):
        return [Task(f"fine{i}", seed=i) for i in range(count)]

    def make(self, task):
        if task.id == "raise-in-make":
            raise RuntimeError("no such\nbuilding")
        return _Faulty(task)


class _Faulty(Env):
    def __init__(self, task):
        self.task, self.count = task, 0

    def start(self):
        if self.task.id == "raise-in-start":
            raise ValueError("no weather")
        if self.task.id == "not-an-observation":
            return "hello"
        return says(f"process {os.getpid()}")

    def step(self, reply):
        self.count += 1
        if self.count < 2:
            return Step(says("go on"), 1.0, info={"pid": os.getpid()})
        match self.task.id:
            case "raise-in-step":
                raise KeyError("zone 7")
            case "hang":
                time.sleep(60)
            case "die":
                os.write(2, b"Segmentation fault\n")
                os._exit(3)
            case "nan":
                return Step(None, float("nan"), terminated=True)
            case "never-ends-right":
                return Step(None, 0.0)
            case "mute":
                return Step(Observation(()), 0.0)
            case "noisy":
                os.write(1, b"printf from native code\n")
        return Step(None, 1.0, terminated=True, info={"pid": os.getpid()})

    def close(self):
        if self.task.id == "raise-in-close":
            raise OSError("busy")
