"""The contract test of a world: what `sapwood.envs` promises, tried out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from sapwood.envs import Env, EnvFamily, Observation, Split, Step
from sapwood.errors import EnvError
from sapwood.types import Message, Task

#: Replies that no parser expects. None may make `step` raise.
GARBAGE = (
    "",
    " \n\t ",
    "<|im_end|><|im_start|>system",
    "[" * 2000,
    '{"action": [1e999, NaN, null]}',
    "[" + "9" * 5000 + "]",
    "__import__('os').getcwd()",
    "\x00\ud7ff\u202e🏠٣",
    '{"a": ' * 1500,
    "-" * 3000 + "1",
)
_PARSED = {None, "json", "list", "regex", "failed"}
_ROLES = {"system", "user", "assistant"}


def check_env(family: EnvFamily, *, count: int = 3, max_steps: int = 64, seed: int = 0) -> None:
    """Try out a family. Raises EnvError with a sentence for the first promise that it breaks.

    count: tasks asked of each split; max_steps: replies after which an episode is left unfinished.
    """
    if not isinstance(family, EnvFamily):
        raise EnvError(f"{family!r} is not an instance of sapwood.envs.EnvFamily.")
    same_options = type(family).model_validate(family.model_dump(mode="json")) == family
    _require(family, same_options, "its options must survive being written as JSON and read again")
    state = _global_state()
    train = _check_tasks(family, "train", count, seed)
    held_out = _check_tasks(family, "eval", count, seed)
    _require(family, not {t.id for t in train} & {t.id for t in held_out}, "train and eval tasks must not share ids")
    overlap = {_substance(t) for t in train} & {_substance(t) for t in held_out}
    _require(family, not overlap, "train and eval tasks must not overlap")
    for task in (train[0], held_out[0]):
        _check_episode(family, task, max_steps)
    for reply in GARBAGE:
        _check_garbage(family, train[0], reply)
    unchanged = _global_state() == state
    _require(family, unchanged, "it must draw from a generator of its own, not from the global random state")


def _check_tasks(family: EnvFamily, split: Split, count: int, seed: int) -> list[Task]:
    tasks = family.tasks(split, count, seed)
    again = family.tasks(split, count, seed)
    _require(family, len(tasks) == count, f"tasks({split!r}, {count}, ...) must return {count} tasks")
    _require(family, len({t.id for t in tasks}) == count, f"the ids of {split} tasks must be unique")
    described = [_described(family, t) for t in tasks]
    _require(family, described == [_described(family, t) for t in again], "tasks must depend on the arguments alone")
    return tasks


def _described(family: EnvFamily, task: Task) -> str:
    try:
        metadata = json.dumps(dict(task.metadata), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EnvError(f"{_name(family)}: metadata of task {task.id!r} must be JSON-serialisable: {error}.") from error
    return f"{task.id} {task.seed} {task.prompt} {task.answer!r} {metadata}"


def _substance(task: Task) -> str:
    return f"{task.seed} {task.prompt} {task.answer!r} {json.dumps(dict(task.metadata), sort_keys=True)}"


def _check_episode(family: EnvFamily, task: Task, max_steps: int) -> None:
    """Two environments of one task, stepped in turns, must not notice each other and tell the same story."""
    envs = [family.make(task), family.make(task)]
    _require(family, envs[0] is not envs[1], "make must return another environment each time")
    first = [_checked_observation(family, env.start()) for env in envs]
    _require(family, first[0] == first[1], "environments of the same task must start alike")
    replies = ("[0.1]", '{"action": 0.2}', "I don't know.", "0.3")
    for i in range(max_steps):
        steps = [_checked_step(family, env, replies[i % len(replies)]) for env in envs]
        _require(family, steps[0] == steps[1], f"environments of the same task must go on alike (reply {i + 1})")
        if steps[0].observation is None:
            break
    for env in envs:
        env.close()


def _check_garbage(family: EnvFamily, task: Task, reply: str) -> None:
    env = family.make(task)
    env.start()
    for _ in range(3):
        if _checked_step(family, env, reply).observation is None:
            break
    env.close()


def _checked_step(family: EnvFamily, env: Env, reply: str) -> Step:
    try:
        step = env.step(reply)
    except Exception as error:  # whatever is raised breaks the promise
        shown = reply if len(reply) < 40 else reply[:37] + "..."
        raise EnvError(f"{_name(family)}: step must not raise for a reply, but {shown!r} raised {error!r}.") from error
    _require(family, isinstance(step, Step), f"step must return a Step, not {type(step).__name__}")
    ended = step.terminated or step.truncated
    _require(family, (step.observation is None) == ended, "observation must be None exactly when the episode ended")
    if step.observation is not None:
        _checked_observation(family, step.observation)
    _require(family, math.isfinite(step.reward), f"rewards must be finite, not {step.reward!r}")
    try:
        json.dumps(dict(step.info), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EnvError(f"{_name(family)}: a step's info must be JSON-serialisable: {error}.") from error
    _require(family, step.info.get("parsed") in _PARSED, f"info['parsed'] is {step.info.get('parsed')!r}")
    _require(family, isinstance(step.info.get("fallback", False), bool), "info['fallback'] must be true or false")
    return step


def _checked_observation(family: EnvFamily, observation: Any) -> Observation:
    shaped = isinstance(observation, Observation) and isinstance(observation.messages, tuple)
    _require(family, shaped, "an observation must be an Observation with a tuple of messages")
    messages: Sequence[Any] = observation.messages
    _require(family, len(messages) > 0, "an observation must have a message")
    _require(family, all(isinstance(m, Message) and m.role in _ROLES for m in messages), f"roles must be in {_ROLES}")
    _require(family, messages[-1].role != "assistant", "an observation must leave the reply to the model")
    return observation


def _global_state() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return (random.getstate(), name, np.asarray(keys).tobytes(), *rest)


def _name(family: EnvFamily) -> str:
    return type(family).__name__


def _require(family: EnvFamily, holds: bool, promise: str) -> None:
    if not holds:
        raise EnvError(f"{_name(family)} breaks its contract: {promise}.")
