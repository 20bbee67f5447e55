"""A world of your own in one file: guess a number in a few turns, hotter or colder.

A family lists tasks and makes environments; an environment starts once and steps on replies. That is all that
Sapwood needs: the file goes into a recipe by its path.

    sapwood train examples/custom_env.yaml          # the recipe beside this file
    python examples/custom_env.py                   # check the world against the contract, and play one episode
"""

from __future__ import annotations

import re

import numpy as np

from sapwood.envs import Env, EnvFamily, Observation, Split, Step
from sapwood.types import Message, Task


class Guess(EnvFamily):
    """Find a whole number from 1 to `highest` in `turns` guesses; each is paid by how near it is."""

    highest: int = 50
    turns: int = 4

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Every fifth number is held out for evaluation; the rest is for training. Drawn from the seed."""
        numbers = [n for n in range(1, self.highest + 1) if (n % 5 == 0) == (split == "eval")]
        drawn = np.random.default_rng(seed).choice(numbers, count)
        return [Task(f"guess-{split}-{seed}-{i}", answer=int(number)) for i, number in enumerate(drawn)]

    def make(self, task: Task) -> Env:
        """A new game."""
        return _Game(self, int(task.answer))


class _Game(Env):
    def __init__(self, family: Guess, answer: int) -> None:
        self.family, self.answer, self.left = family, answer, family.turns

    def start(self) -> Observation:
        rules = f"Guess my number from 1 to {self.family.highest}. Reply with a number only."
        return Observation((Message("user", rules),))

    def step(self, reply: str) -> Step:
        self.left -= 1
        found = re.search(r"\d{1,6}", reply[:1000])
        info = {"parsed": "regex" if found else "failed", "fallback": not found}
        if not found:
            return self._next("That is not a number.", -1.0, info)
        guess = int(found[0])
        if guess == self.answer:
            return Step(None, 1.0, terminated=True, info=info)
        hint = "Higher." if guess < self.answer else "Lower."
        return self._next(hint, -min(1.0, abs(guess - self.answer) / self.family.highest), info)

    def _next(self, text: str, reward: float, info: dict[str, object]) -> Step:
        if self.left == 0:
            return Step(None, reward, truncated=True, info=info)
        return Step(Observation((Message("user", text),)), reward, info=info)


if __name__ == "__main__":
    from sapwood.envs.check import check_env

    check_env(Guess())
    game = Guess().make(Guess().tasks("train", 1, seed=0)[0])
    print("you:", game.start().messages[0].content)
    for reply in ("25", "no idea", "12", "37"):
        step = game.step(reply)
        print(
            f"model: {reply}\nyou: {step.observation.messages[0].content if step.observation else 'the end'}"
            f"   (reward {step.reward:+.2f})"
        )
        if step.observation is None:
            break
