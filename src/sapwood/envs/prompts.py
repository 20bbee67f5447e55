"""Single-turn tasks from a list of prompts and answers: a world that asks once and pays nothing itself.

What a reply is worth is for the rewards to say (exact_match, format, length, a reward model ...).

    env: {name: prompts, path: sums.jsonl}
    env: {name: prompts, items: [{prompt: "1+1=", answer: "2"}, {prompt: "2+2=", answer: "4"}]}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from sapwood.envs import Env, EnvFamily, Observation, Split, Step
from sapwood.errors import ConfigError, DataError, printable
from sapwood.types import Message, Task

_ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_DEEPEST = 50  # levels of lists and objects in a line


class Prompts(EnvFamily):
    """Prompts from a JSONL file (`path`) or from the recipe itself (`items`), each an object with a prompt.

    A prompt is a string, or a list of {role, content} messages. All other fields of an object become the task's
    metadata. Without `eval_path`, `eval_fraction` of the distinct prompts are held out, chosen by their content, so
    that adding lines moves few of the others and repeated prompts never straddle the two splits.
    """

    pays: ClassVar[bool] = False

    path: Path | None = None
    items: tuple[dict[str, Any], ...] = ()
    eval_path: Path | None = None
    eval_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    system: str | None = Field(default=None, description="a system message before every prompt")

    @model_validator(mode="after")
    def _one_source(self) -> Prompts:
        if (self.path is None) == (not self.items):
            raise ValueError("give either path (a JSONL file) or items (a list in the recipe)")
        return self

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`count` tasks in an order drawn from the seed. Only training prompts repeat, once all of them were used.

        Raises ConfigError where a split has too few prompts, DataError for a file or line that can't be read.
        """
        pool = self._split(split)
        if not pool:
            raise ConfigError(
                f"env.prompts has no prompt for {split}: raise eval_fraction, set eval_path or give more prompts."
            )
        if split == "eval" and count > len(pool):
            raise ConfigError(
                f"env.prompts holds out {len(pool)} prompts, but {count} are asked for: lower eval.tasks."
            )
        rng = np.random.default_rng([seed, split == "eval"])
        tasks: list[Task] = []
        while len(tasks) < count:
            lap = len(tasks) // len(pool)
            for index in rng.permutation(len(pool))[: count - len(tasks)].tolist():
                tasks.append(self._task(split, index, pool[index], lap))
        return tasks

    def ordered(self) -> list[Task]:
        """All prompts of `path` or `items` in their own order, held out or not."""
        return [self._task("all", i, item, 0) for i, item in enumerate(self._items())]

    def make(self, task: Task) -> Env:
        """An environment that asks the task's prompt and ends with the reply."""
        return _Ask(task)

    def describe(self) -> str:
        """One line for headings."""
        return f"prompts from {self.path.name}" if self.path is not None else f"{len(self.items)} prompts"

    def _split(self, split: Split) -> tuple[_Item, ...]:
        items = self._items()
        if self.eval_path is not None:
            held_out = self._file(self.eval_path)
            if split == "eval":
                return held_out
            unseen = {item.digest for item in held_out}
            return tuple(item for item in items if item.digest not in unseen)
        digests = sorted({item.digest for item in items})
        wanted = round(len(digests) * self.eval_fraction)
        # Few prompts still leave one to evaluate on, unless nothing was to be held out.
        held = set(digests[: max(wanted, 1) if self.eval_fraction and len(digests) > 1 else wanted])
        return tuple(item for item in items if (item.digest in held) == (split == "eval"))

    def _items(self) -> tuple[_Item, ...]:
        if self.path is not None:
            return self._file(self.path)
        return tuple(self._item(item, f"env.items[{i}]") for i, item in enumerate(self.items))

    def _file(self, path: Path) -> tuple[_Item, ...]:
        return tuple(self._item(item, where) for item, where in _read(path))

    def _item(self, item: Mapping[str, Any], where: str) -> _Item:
        if self.prompt_field not in item:
            fields = ", ".join(item) or "none"
            raise DataError(f"{where}: no field {self.prompt_field!r} (fields: {fields}); set env.prompt_field.")
        rest = {k: v for k, v in item.items() if k not in (self.prompt_field, self.answer_field)}
        messages = _messages(item[self.prompt_field], f"{where}, field {self.prompt_field!r}")
        if self.system is not None:
            messages = (Message("system", self.system), *messages)
        return _Item(messages, item.get(self.answer_field), rest)

    def _task(self, split: str, index: int, item: _Item, lap: int) -> Task:
        name = f"{split}-{index}" + (f"-lap{lap}" if lap else "")
        return Task(name, item.messages, item.answer, item.metadata)


class _Item:
    """One prompt. digest: of its messages, the identity by which splits are kept apart."""

    def __init__(self, messages: tuple[Message, ...], answer: Any, metadata: dict[str, Any]) -> None:
        self.messages, self.answer, self.metadata = messages, answer, metadata
        content = json.dumps([[m.role, m.content] for m in messages])
        self.digest = hashlib.sha256(content.encode()).hexdigest()


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


def _messages(prompt: Any, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str) and prompt:
        return (Message("user", _whole(prompt, where)),)
    if not isinstance(prompt, list) or not prompt:
        given = printable(repr(prompt), 80)
        raise DataError(f"{where}: a prompt must be a non-empty string or a list of messages, not {given}.")
    messages = []
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}, message {i}: must be an object with role and content.")
        if message.get("role") not in _ROLES:
            role = printable(repr(message.get("role")), 80)
            raise DataError(f"{where}, message {i}: role is {role}, not one of {', '.join(_ROLES)}.")
        messages.append(Message(message["role"], _whole(message["content"], f"{where}, message {i}")))
    if messages[-1].role == "assistant":
        raise DataError(f"{where}: the last message is the assistant's; the model's reply comes after the prompt.")
    return tuple(messages)


def _whole(text: str, where: str) -> str:
    if _SURROGATE.search(text):
        raise DataError(f"{where}: holds half of a surrogate pair (a \\ud8.. escape without its other half); mend it.")
    return text


def _read(path: Path) -> tuple[tuple[dict[str, Any], str], ...]:
    """The objects of a JSONL file, each with its place for messages."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{printable(str(path))}: {error.strerror or error}; check env.path.") from error
    except ValueError as error:  # a NUL in the name
        raise DataError(f"{printable(str(path))}: no name of a file ({error}); check env.path.") from error
    if not path.is_file():
        raise DataError(f"{path}: not a file; check env.path.")
    return _read_version(path, stat.st_mtime_ns, stat.st_size)


def _deep(value: Any) -> bool:
    """Whether lists and objects go deeper than can be written and read back wherever it is needed."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [item for part in level if isinstance(part, list | dict) for item in _inside(part)]
        if not level:
            return False
    return True


def _inside(part: list[Any] | dict[str, Any]) -> Any:
    return part.values() if isinstance(part, dict) else part


@lru_cache(8)
def _read_version(path: Path, modified: int, size: int) -> tuple[tuple[dict[str, Any], str], ...]:
    """As `_read`; a file is parsed once for as long as it doesn't change."""
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # splitlines would also cut at U+2028
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise DataError(f"{path}, line {line}: 0x{byte:02x} is not UTF-8; save the file as UTF-8.") from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            raise DataError(f"{where}: not usable JSON ({error}).") from error
        if _deep(item):
            raise DataError(f"{where}: values are nested more than {_DEEPEST} deep.")
        if not isinstance(item, dict):
            raise DataError(f"{where}: must be a JSON object with named fields.")
        items.append((item, where))
    if not items:
        raise DataError(f"{path}: no line holds a prompt.")
    return tuple(items)


PLUGIN = Prompts
