"""Procedurally generated reasoning tasks (arithmetic, logic, games ...) with the package's own scoring.

    env: {name: reasoning_gym, task: basic_arithmetic, options: {max_terms: 3, max_digits: 2}, few_shot: 2}

An episode is one question and one reply, paid 0..1 by the data set's own `score_answer`. Items are drawn without end;
a question belongs to training or to evaluation by a hash of its text, so the two never share one, and their generator
seeds are even and odd. Scorers of the package that would evaluate a reply as code are given only what is a number
expression or a literal.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sapwood.envs import Env, EnvFamily, Observation, Split, Step
from sapwood.errors import ConfigError, MissingExtra
from sapwood.types import Message, Task

Extraction = Literal["reply", "tags", "last_line", "last_number"]

# Draws in a row that may miss a split before its supply of distinct questions counts as used up.
_PATIENCE = 500
_MAX_ANSWER = 20_000
_MAX_POWER = 32
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+")
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
# int, Fraction and Decimal would write out a number with this exponent digit by digit.
_HUGE_EXPONENT = re.compile(r"(?<!\w)\d+\.?\d*[eE][-+]?\d{4,}")

#: Tasks whose scorer passes a wrong reply to `eval`, and those whose scorer parses any reply with sympy (also `eval`).
_EVALUATED = frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"})
_SYMBOLIC = frozenset(
    {"countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"}
)
_FUNCTIONS = frozenset({"exp", "log", "ln", "sqrt", "sin", "cos", "tan", "sec", "asin", "acos", "atan", "Abs"})


class Mixed(BaseModel):
    """One task of a mixture: drawn with a probability proportional to weight; options: of its generator."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: str
    weight: float = Field(default=1.0, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)


class ReasoningGym(EnvFamily):
    """Tasks of the package reasoning-gym (extra `reasoning-gym`), each a question with a scored reply.

    task and options: a data set's name and its configuration; or mix: several, by weight. system: a system message;
    few_shot: worked examples before every question, the same for all questions of a task. extract: what counts as the
    answer: the whole "reply", the last <answer> "tags", the "last_line" or the "last_number". exact: pay 1 for a full
    score and 0 otherwise, in place of the data set's partial scores. eval_fraction: share of questions held out.
    """

    task: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    mix: tuple[Mixed, ...] = ()
    system: str | None = None
    few_shot: int = Field(default=0, ge=0)
    extract: Extraction = "reply"
    exact: bool = False
    eval_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _known_tasks(self) -> ReasoningGym:
        if (self.task is None) == (not self.mix):
            raise ValueError("give either task (a name) or mix (a list of {task, weight, options})")
        if self.options and self.task is None:
            raise ValueError("options belong to task; with mix, every item has options of its own")
        for part in self._parts():
            _check_options("env.mix" if self.mix else "env.task", part.task, part.options)
        return self

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`count` tasks drawn from the seed; evaluation questions are distinct.

        Raises ConfigError where a task has too few distinct questions, MissingExtra without the package.
        """
        drawn = list(islice(self._stream(split, seed), count))
        if len(drawn) < count:
            raise ConfigError(
                f"env.reasoning_gym: {self.describe()} has only {len(drawn)} distinct {split} questions, but {count} "
                f"are asked for: widen env.options, change env.eval_fraction or lower eval.tasks."
            )
        return drawn

    def make(self, task: Task) -> Env:
        """An environment that asks the task's question and scores the reply."""
        return _Asked(task, self)

    def solution(self, task: Task) -> str | None:
        """The reference reply in the form that `extract` reads, for demonstrations; None where there is none."""
        return None if task.answer is None else _as_reply(task.answer, self.extract)

    def describe(self) -> str:
        """One line for headings."""
        return f"reasoning-gym {'+'.join(part.task for part in self._parts())}"

    def score(self, task: Task, reply: str) -> tuple[float, str]:
        """Score in 0..1 of a reply, and how it was parsed ("regex" or "failed"). Never raises for a reply."""
        answer = _extracted(reply, self.extract)
        if not answer:
            return 0.0, "failed"
        name = task.metadata["task"]
        if not _harmless(name, answer):
            return 0.0, "failed"
        entry = {
            "question": task.metadata["question"],
            "answer": task.answer,
            "metadata": copy.deepcopy(dict(task.metadata["item"])),  # scorers are free to change what they are given
        }
        try:
            score = float(_dataset(name, _frozen(task.metadata["options"])).score_answer(answer, entry))
        except Exception:  # several scorers raise for replies that they don't expect
            return 0.0, "failed"
        score = min(max(score, 0.0), 1.0) if score == score else 0.0
        return (float(score >= 1.0) if self.exact else score), "regex"

    def _parts(self) -> tuple[Mixed, ...]:
        return self.mix or (Mixed(task=self.task or "", options=self.options),)

    def _stream(self, split: Split, seed: int) -> Iterator[Task]:
        """Tasks of the split; ends where none that fits was found for long."""
        parts = self._parts()
        weights = np.array([part.weight for part in parts])
        rng = np.random.default_rng([seed, split == "eval"])
        drawn: set[str | int] = set()
        misses = 0
        while misses < _PATIENCE:
            part = parts[int(rng.choice(len(parts), p=weights / weights.sum()))]
            item_seed = int(rng.integers(2**30)) * 2 + (split == "eval")
            item = _item(part.task, _frozen(part.options), item_seed)
            question = item["question"]
            held_out = _share(question) < self.eval_fraction
            shown = any(question == example for example, _ in self._examples(part))
            key = question if split == "eval" else item_seed
            if held_out != (split == "eval") or shown or key in drawn:
                misses += 1
                continue
            drawn.add(key)
            misses = 0
            yield self._task(part, split, item_seed, item)

    def _task(self, part: Mixed, split: str, seed: int, item: Mapping[str, Any]) -> Task:
        messages = [Message("system", self.system)] if self.system is not None else []
        for question, answer in self._examples(part):
            messages += [Message("user", question), Message("assistant", _as_reply(answer, self.extract))]
        messages.append(Message("user", item["question"]))
        metadata = {
            "task": part.task,
            "options": part.options,
            "question": item["question"],
            "item": item["metadata"],
        }
        return Task(f"{part.task}-{split}-{seed}", tuple(messages), item["answer"], metadata, seed)

    def _examples(self, part: Mixed) -> _Examples:
        if not self.few_shot:
            return ()
        return _examples(part.task, _frozen(part.options), self.few_shot, self.eval_fraction)


_Examples = tuple[tuple[str, str], ...]


class _Asked(Env):
    """One question, one reply."""

    def __init__(self, task: Task, family: ReasoningGym) -> None:
        self._task, self._family = task, family

    def start(self) -> Observation:
        """The question, with its examples."""
        return Observation(self._task.prompt)

    def step(self, reply: str) -> Step:
        """Score the reply and end."""
        score, parsed = self._family.score(self._task, reply)
        return Step(None, score, terminated=True, info={"parsed": parsed})


def _extracted(reply: str, how: Extraction) -> str | None:
    """The answer in a reply, or None where it has none."""
    if how == "tags":
        found = _TAGS.findall(reply)
        return found[-1].strip() if found else None
    if how == "last_line":
        lines = reply.strip().splitlines()
        return lines[-1].strip() if lines else None
    if how == "last_number":
        numbers = _NUMBER.findall(reply)
        return numbers[-1].replace(",", "") if numbers else None
    return reply.strip()


def _as_reply(answer: str, how: Extraction) -> str:
    return f"<answer>{answer}</answer>" if how == "tags" else answer


def _harmless(name: str, answer: str) -> bool:
    """Whether a scorer may see the answer: some evaluate it, and some numbers take for ever."""
    if len(answer) > _MAX_ANSWER or _HUGE_EXPONENT.search(answer):
        return False
    if name in _EVALUATED:
        return re.fullmatch(r"[\w\s]*", answer) is not None or _is_literal(answer)
    return name not in _SYMBOLIC or _is_expression(answer)


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_expression(text: str) -> bool:
    """Whether the text is arithmetic over numbers and names, small enough to compute."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return len(text) <= 1000 and _is_arithmetic(tree, powers=0)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _is_arithmetic(node: ast.expr, powers: int) -> bool:
    if isinstance(node, ast.Constant):
        return _size(node) < 1e12
    if isinstance(node, ast.Name):
        return len(node.id) == 1 or node.id == "pi"
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub | ast.UAdd) and _is_arithmetic(node.operand, powers)
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        return named and not node.keywords and all(_is_arithmetic(a, powers) for a in node.args)
    if not isinstance(node, ast.BinOp):
        return False
    if isinstance(node.op, ast.Pow):
        # A power is the one thing here that a few characters make too large to compute.
        small = powers == 0 and _bound(node.right) <= _MAX_POWER
        return small and _is_arithmetic(node.left, 1) and _is_arithmetic(node.right, 1)
    plain = isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div)
    return plain and _is_arithmetic(node.left, powers) and _is_arithmetic(node.right, powers)


def _size(node: ast.Constant) -> float:
    """Absolute value of a number, infinite for anything else."""
    return abs(node.value) if isinstance(node.value, int | float) else math.inf


def _bound(node: ast.expr) -> float:
    """An upper bound of an exponent's size, names counted as 1."""
    if isinstance(node, ast.Constant):
        return _size(node)
    if isinstance(node, ast.UnaryOp):
        return _bound(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _bound(node.left), _bound(node.right)
        if isinstance(node.op, ast.Add | ast.Sub):
            return left + right
        if isinstance(node.op, ast.Mult):
            return left * right
        return left if isinstance(node.right, ast.Constant) and right >= 1 else math.inf
    return 1.0 if isinstance(node, ast.Name) else math.inf


def _share(question: str) -> float:
    """A number in 0..1 that is a function of the question's text alone."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64


def _library() -> Any:
    try:
        import reasoning_gym.factory as factory
    except ImportError as error:
        raise MissingExtra("reasoning-gym", "reasoning-gym", "env reasoning_gym") from error
    return factory


def _known() -> list[str]:
    return sorted(set(_library().DATASETS) - {"composite"})  # `mix` is what composite does


def _check_options(where: str, name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError with a sentence that begins with the key, by which its line in the recipe is found."""
    if name not in _known():
        raise ValueError(f"{where}: reasoning-gym has no task {name!r}; {_nearest(name, _known())}")
    allowed = [field.name for field in dataclasses.fields(_library().DATASETS[name][1])]
    allowed = [field for field in allowed if field not in ("seed", "size")]
    for key in options:
        if key in ("seed", "size"):
            raise ValueError(f"{where}: {key!r} can't be set for {name!r}: items come from run.seed, without end")
        if key not in allowed:
            raise ValueError(f"{where}: task {name!r} has no option {key!r}; {_nearest(key, allowed)}")
    try:
        _dataset(name, _frozen(options))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: options of {name!r}: {error}") from error


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _frozen(options: Mapping[str, Any]) -> str:
    """Options as a cache key."""
    return json.dumps(dict(options), sort_keys=True)


@lru_cache(64)
def _dataset(name: str, options: str, seed: int = 0) -> Any:
    """A data set of one item; scoring asks any of them, as it depends on the options alone."""
    return _library().create_dataset(name, seed=seed, size=1, **json.loads(options))


@lru_cache(4096)
def _item(name: str, options: str, seed: int) -> Mapping[str, Any]:
    """One item: question, answer (or None), metadata as plain data."""
    try:
        item = _library().create_dataset(name, seed=seed, size=1, **json.loads(options))[0]
        json.dumps(item["metadata"])
        return item
    except Exception as error:
        raise ConfigError(
            f"env.reasoning_gym: task {name!r} can't make an item with options {options}: {error!r}; "
            "change env.options."
        ) from error


@lru_cache(64)
def _examples(name: str, options: str, count: int, eval_fraction: float) -> _Examples:
    """Worked training examples, the first that differ."""
    found: dict[str, str] = {}
    for seed in range(0, 2 * (count + _PATIENCE), 2):
        item = _item(name, options, seed)
        if item["answer"] is None:
            raise ConfigError(f"env.few_shot: task {name!r} gives no reference answers; set env.few_shot=0.")
        if _share(item["question"]) >= eval_fraction:
            found.setdefault(item["question"], item["answer"])
        if len(found) == count:
            return tuple(found.items())
    raise ConfigError(f"env.few_shot: task {name!r} has only {len(found)} distinct training questions; lower it.")


PLUGIN = ReasoningGym
