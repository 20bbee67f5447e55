"""Trajectory files: episodes in a building step by step, of any controller, as all stages write and read them.

    {"format": 1, "controller": "ppo" | "llm" | ..., "model": {...} | null, "seed": int,
     "world": {options, "zones": [n], "observation": [n + 4], "action": [a]},
     "prompts": {id: [{"role", "content"}, ...]},
     "episodes": [
    {"task", "day", "hour", "seed", "return", "steps": [{"step", "observation", "action", "reward", ...}]},
    ...
    ]}

JSON in UTF-8 with one episode a line, so that files can be compared line by line. `read` checks everything that a
stage relies on, so a damaged or foreign file is told by file, episode, step and field; `write` replaces a file when
the new one is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.controllers import Controller
from sapwood.envs.hvac.files import load_json, replace
from sapwood.envs.hvac.layout import differences, misfit, powers_of, shortest, world_of
from sapwood.envs.hvac.parsing import How
from sapwood.envs.hvac.prompt import describe
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import DataError, printable
from sapwood.types import Message, Task

FORMAT = 1
#: Numbers beyond this are no temperature, power, reward or log-probability.
LARGEST = 1e9
PARSED = get_args(How)

#: Critic's values [S] of observations [S, n + 4].
Value = Callable[[NDArray[np.float32]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply to a state, and what it did there.

    action: the powers that acted (fallback powers where it could not be read); reward, energy, comfort: of the
    physics; token_ids [T], sampled_logprobs [T], kept_logmass [T]: empty where they were not kept.
    """

    reply: str
    action: tuple[float, ...]
    reward: float
    parsed: How
    fallback: bool
    energy: float | None = None
    comfort: float | None = None
    token_ids: tuple[int, ...] = ()
    sampled_logprobs: tuple[float, ...] = ()
    kept_logmass: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """One step: the observation [n + 4] before it, the powers chosen, and the physical reward.

    state: the state in words; of a language model the whole text of the state's message. Of a language model also:
    prompt (the id of the messages before the state) and what a `Reply` has; others: further replies in the same
    state, tried on a copy of the simulator. value: a critic's value of the observation.
    """

    step: int
    observation: tuple[float, ...]
    action: tuple[float, ...]
    reward: float
    energy: float
    comfort: float
    value: float | None = None
    prompt: str | None = None
    state: str | None = None
    reply: str | None = None
    parsed: How | None = None
    fallback: bool = False
    temperature: float | None = None
    token_ids: tuple[int, ...] = ()
    sampled_logprobs: tuple[float, ...] = ()
    kept_logmass: tuple[float, ...] = ()
    others: tuple[Reply, ...] = ()


@dataclass(frozen=True, slots=True)
class Episode:
    """The decisions of one task. total: its undiscounted physical return ("return" in the file)."""

    task: str
    day: int
    hour: int
    seed: int
    total: float
    steps: tuple[Decision, ...]


@dataclass(frozen=True)
class TrajectoryFile:
    """Episodes of one controller in one world (`world_of`). prompts: messages by `prompt_id`.

    source: the file that it was read from, for messages; not a part of the content.
    """

    controller: str
    seed: int
    world: Mapping[str, Any]
    episodes: tuple[Episode, ...]
    model: Mapping[str, Any] | None = None
    prompts: Mapping[str, tuple[Message, ...]] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    @property
    def steps(self) -> Iterator[tuple[Episode, Decision]]:
        """All decisions with their episodes, in order."""
        return ((episode, decision) for episode in self.episodes for decision in episode.steps)

    @property
    def count(self) -> int:
        """Steps of all episodes."""
        return sum(len(episode.steps) for episode in self.episodes)


def prompt_id(messages: Sequence[Message]) -> str:
    """The name of messages in a file: the first 12 hexadecimal digits of their SHA-256."""
    text = json.dumps([[m.role, m.content] for m in messages], separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def check_world(file: TrajectoryFile, family: Hvac) -> dict[str, tuple[Any, Any]]:
    """Refuse a file whose building, action or observation layout is not the family's (DataError).

    Returns the other options in which they differ, name -> (the file's, the family's), for the caller to weigh.
    """
    why = misfit(file.world, family)
    if why:
        stage = "rollout" if file.controller == "llm" else "ppo"
        raise DataError(
            f"{file.source or 'the trajectory file'}: recorded in another world: {why}; use the env section that it "
            f"was recorded with, or make one that fits with `sapwood pipeline RECIPE --stage {stage}`."
        )
    return differences(file.world, family)


def play(family: Hvac, task: Task, controller: Controller, value: Value | None = None) -> Episode:
    """Record a controller without a language model on a task; value: of each observation, where there is a critic."""
    env = family.simulator(task.metadata.get("steps"))
    observation = family.reset_simulator(env, task)
    seen: list[NDArray[np.float32]] = []
    states: list[str] = []
    made: list[tuple[tuple[float, ...], float, float, float]] = []
    done = False
    try:
        while not done:
            action = np.asarray(controller(env), np.float32)
            seen.append(observation)
            states.append(describe(env))
            observation, reward, terminated, truncated, info = env.step(action)
            made.append((powers_of(family, action), float(reward), float(info["energy"]), float(info["comfort"])))
            done = terminated or truncated
    finally:
        env.close()
    values = None if value is None else [float(v) for v in value(np.array(seen))]
    steps = tuple(
        Decision(i, tuple(shortest(seen[i])), *numbers, state=states[i], value=None if values is None else values[i])
        for i, numbers in enumerate(made)
    )
    total = sum(step.reward for step in steps)
    return Episode(task.id, int(task.metadata["day"]), int(task.metadata["hour"]), task.seed, total, steps)


def recorded(
    family: Hvac, name: str, seed: int, episodes: Sequence[Episode], model: Mapping[str, Any] | None = None
) -> TrajectoryFile:
    """A `TrajectoryFile` of episodes that a controller without prompts played in the family's world."""
    return TrajectoryFile(name, seed, world_of(family), tuple(episodes), model)


# --- writing -----------------------------------------------------------------------------------------------------


def write(path: Path | str, file: TrajectoryFile) -> Path:
    """Write a file; one that was there is replaced when the new one is whole. Raises StorageError or DataError."""
    path = Path(path)
    try:
        replace(path, _chunks(file))
    except ValueError as error:
        raise DataError(f"{path}: not written: a number of it is not finite ({error}).") from error
    return path


def _chunks(file: TrajectoryFile) -> Iterator[bytes]:
    head = {
        "format": FORMAT,
        "controller": file.controller,
        "model": file.model,
        "seed": file.seed,
        "world": dict(file.world),
        "prompts": {
            key: [{"role": m.role, "content": m.content} for m in messages] for key, messages in file.prompts.items()
        },
    }
    yield b"{\n"
    for name, content in head.items():
        yield _json(name) + b": " + _json(content) + b",\n"
    yield b'"episodes": ['
    for number, episode in enumerate(file.episodes):
        yield (b",\n" if number else b"\n") + _json(_episode_record(episode))
    yield b"\n]\n}\n"


def _json(value: Any) -> bytes:
    # Half of a surrogate pair, which UTF-8 lacks, is escaped as JSON does it.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def _episode_record(episode: Episode) -> dict[str, Any]:
    return {
        "task": episode.task,
        "day": episode.day,
        "hour": episode.hour,
        "seed": episode.seed,
        "return": episode.total,
        "steps": [_step_record(step) for step in episode.steps],
    }


def _step_record(step: Decision) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": step.step,
        "observation": step.observation,
        "action": step.action,
        "reward": step.reward,
        "energy": step.energy,
        "comfort": step.comfort,
    }
    if step.state is not None:
        record["state"] = step.state
    if step.reply is not None:
        record |= {
            "prompt": step.prompt,
            "reply": step.reply,
            "parsed": step.parsed,
            "fallback": step.fallback,
            **_tokens(step),
        }
    if step.temperature is not None:
        record["temperature"] = step.temperature
    if step.others:
        record["others"] = [_reply_record(other) for other in step.others]
    if step.value is not None:
        record["value"] = step.value
    return record


def _reply_record(reply: Reply) -> dict[str, Any]:
    known = {"energy": reply.energy, "comfort": reply.comfort}
    return {
        "reply": reply.reply,
        "action": reply.action,
        "reward": reply.reward,
        **{name: value for name, value in known.items() if value is not None},
        "parsed": reply.parsed,
        "fallback": reply.fallback,
        **_tokens(reply),
    }


def _tokens(reply: Decision | Reply) -> dict[str, Any]:
    columns = {
        "token_ids": reply.token_ids,
        "sampled_logprobs": reply.sampled_logprobs,
        "kept_logmass": reply.kept_logmass,
    }
    return {name: column for name, column in columns.items() if column}


# --- reading -----------------------------------------------------------------------------------------------------


def read(path: Path | str) -> TrajectoryFile:
    """Read and check a file. Raises DataError that names the file, the episode, the step and the field."""
    path = Path(path)
    found = load_json(path, "trajectory file")
    try:
        return _Reader(found).file(str(path))
    except _Bad as error:
        raise DataError(f"{path}: {error}.") from None


class _Bad(Exception):
    """What is wrong, and in which field."""


def _bad(name: str, value: Any, wanted: str) -> NoReturn:
    raise _Bad(f"{name} is {_shown(value)}, not {wanted}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return repr(printable(value, 40)) if isinstance(value, str) else printable(str(value), 40)


_HEAD = ("format", "controller", "model", "seed", "world", "prompts", "episodes")
_EPISODE = ("task", "day", "hour", "seed", "return", "steps")
_TOKENS = ("token_ids", "sampled_logprobs", "kept_logmass")
_REPLY = ("reply", "action", "reward", "energy", "comfort", "parsed", "fallback", *_TOKENS)
_STEP = (*_REPLY, "step", "observation", "prompt", "state", "temperature", "others", "value")
_STEP_NAMES, _REPLY_NAMES = frozenset(_STEP), frozenset(_REPLY)


class _Reader:
    """Turns the parsed JSON of a file to dataclasses; raises _Bad."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.width = 0
        self.powers = 0
        self.prompts: dict[str, tuple[Message, ...]] = {}

    def file(self, source: str) -> TrajectoryFile:
        found = self.found
        if found.get("format") != FORMAT or isinstance(found.get("format"), bool):
            if "format" not in found:
                raise _Bad('not a trajectory file of Sapwood: it has no "format"')
            _bad("format", found["format"], f"{FORMAT}, the one that this version of Sapwood reads")
        _known(found, _HEAD)
        controller = _string(found, "controller")
        model = found.get("model")
        if model is not None and not isinstance(model, dict):
            _bad("model", model, "an object or null")
        seed = _whole(found, "seed")
        world = self._world(found.get("world"))
        self.prompts = self._prompts(found.get("prompts", {}))
        episodes = found.get("episodes")
        if not isinstance(episodes, list) or not episodes:
            _bad("episodes", episodes, "a list of at least one episode")
        episodes.reverse()  # taken from its end, so that what was read is freed
        made: list[Episode] = []
        while episodes:
            made.append(self._episode(len(made), episodes.pop()))
        return TrajectoryFile(controller, seed, world, tuple(made), model, self.prompts, source)

    def _world(self, world: Any) -> dict[str, Any]:
        if not isinstance(world, dict):
            _bad("world", world, "an object")
        for name in ("zones", "observation", "action"):
            names = world.get(name)
            if not isinstance(names, list) or not names or not all(isinstance(item, str) for item in names):
                _bad(f"world.{name}", names, "a list of names")
        self.width, self.powers = len(world["observation"]), len(world["action"])
        return world

    def _prompts(self, prompts: Any) -> dict[str, tuple[Message, ...]]:
        if not isinstance(prompts, dict):
            _bad("prompts", prompts, "an object")
        made = {}
        for key, messages in prompts.items():
            name = f"prompts[{printable(key, 20)}]"
            if not isinstance(messages, list) or not all(map(_is_message, messages)):
                _bad(name, messages, 'a list of {"role", "content"}')
            made[key] = tuple(Message(m["role"], m["content"]) for m in messages)
            if prompt_id(made[key]) != key:
                raise _Bad(f"{name}: its messages are not those that it was named after; the file was changed")
        return made

    def _episode(self, number: int, found: Any) -> Episode:
        place = f"episode {number + 1}"
        try:
            if not isinstance(found, dict):
                _bad("it", found, "an object")
            task = _string(found, "task")
            place += f" ({printable(task, 60)})"
            _known(found, _EPISODE)
            day, hour = _whole(found, "day", 0, 364), _whole(found, "hour", 0, 23)
            seed, total = _whole(found, "seed"), _number(found, "return")
            steps = found.get("steps")
            if not isinstance(steps, list) or not steps:
                _bad("steps", steps, "a list of at least one step")
        except _Bad as error:
            raise _Bad(f"{place}: {error}") from None
        made: list[Decision] = []
        for index, item in enumerate(steps):
            try:
                step = self._step(item)
                if made and step.step <= made[-1].step:
                    _bad("step", step.step, f"after step {made[-1].step} of the record before it")
            except _Bad as error:
                raise _Bad(f"{place}, step {_step_of(item, index)}: {error}") from None
            made.append(step)
        return Episode(task, day, hour, seed, total, tuple(made))

    def _step(self, found: Any) -> Decision:
        if not isinstance(found, dict):
            _bad("it", found, "an object")
        if not found.keys() <= _STEP_NAMES:
            _known(found, _STEP)
        numbers = {
            "step": _whole(found, "step", 0),
            "observation": _numbers(found, "observation", self.width),
            "action": _numbers(found, "action", self.powers),
            "reward": _number(found, "reward"),
            "energy": _number(found, "energy"),
            "comfort": _number(found, "comfort"),
            "value": _number(found, "value") if found.get("value") is not None else None,
        }
        if "reply" not in found:
            for name in ("prompt", "parsed", "fallback", "temperature", "others", *_TOKENS):
                if name in found:
                    raise _Bad(f"{name} is there without a reply")
            return Decision(**numbers, state=_string(found, "state") if "state" in found else None)
        prompt = _string(found, "prompt")
        if prompt not in self.prompts:
            _bad("prompt", prompt, "an id of prompts")
        others = found.get("others", [])
        if not isinstance(others, list):
            _bad("others", others, "a list")
        temperature = _number(found, "temperature") if found.get("temperature") is not None else None
        if temperature is not None and temperature < 0:
            _bad("temperature", temperature, "0 or more")
        return Decision(
            **numbers,
            prompt=prompt,
            state=_string(found, "state"),
            temperature=temperature,
            others=tuple(self._other(i, other) for i, other in enumerate(others)),
            **_said(found),
        )

    def _other(self, number: int, found: Any) -> Reply:
        try:
            if not isinstance(found, dict):
                _bad("it", found, "an object")
            if not found.keys() <= _REPLY_NAMES:
                _known(found, _REPLY)
            optional = {name: _number(found, name) for name in ("energy", "comfort") if found.get(name) is not None}
            return Reply(
                action=_numbers(found, "action", self.powers),
                reward=_number(found, "reward"),
                **optional,
                **_said(found),
            )
        except _Bad as error:
            raise _Bad(f"other reply {number + 1}: {error}") from None


def _said(found: dict[str, Any]) -> dict[str, Any]:
    """What a step and a further reply share: the text, how it was read, and its tokens."""
    parsed, fallback = found.get("parsed"), found.get("fallback")
    if parsed not in PARSED:
        _bad("parsed", parsed, f"one of {', '.join(PARSED)}")
    if not isinstance(fallback, bool):
        _bad("fallback", fallback, "true or false")
    said = {"reply": _string(found, "reply"), "parsed": parsed, "fallback": fallback}
    ids = found.get("token_ids")
    if ids is None:
        return said | _without_ids(found)
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        _bad("token_ids", ids, "a list of token ids")
    columns = {name: _numbers(found, name, len(ids)) for name in _TOKENS[1:] if found.get(name) is not None}
    for name, column in columns.items():
        if column and max(column) > 1e-4:  # room for rounding: a log of a probability is at most 0
            _bad(name, max(column), "at most 0, as a log-probability is")
    return said | {"token_ids": tuple(ids)} | columns


def _without_ids(found: dict[str, Any]) -> dict[str, Any]:
    for name in _TOKENS[1:]:
        if found.get(name):
            raise _Bad(f"{name} is there without token_ids")
    return {}


def _step_of(found: Any, index: int) -> Any:
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int and 0 <= step < LARGEST else index


def _known(found: Mapping[str, Any], names: Sequence[str]) -> None:
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise _Bad(f"{printable(unknown[0], 40)!r} is no field of it; known: {', '.join(names)}")


def _is_message(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and found.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in found.values())
    )


def _string(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str):
        _bad(name, value, "a text")
    return value


def _whole(found: Mapping[str, Any], name: str, low: int = -(2**63), high: int = 2**63) -> int:
    value = found.get(name)
    if type(value) is not int or not low <= value <= high:
        limits = f" of {low} or more" if low == 0 and high == 2**63 else f" in {low}..{high}" if low == 0 else ""
        _bad(name, value, f"a whole number{limits}")
    return value


def _number(found: Mapping[str, Any], name: str) -> float:
    value = found.get(name)
    # A comparison with NaN is false, so it is refused too.
    if (type(value) is not float and type(value) is not int) or not -LARGEST <= value <= LARGEST:
        _bad(name, value, f"a number within {LARGEST:g}")
    return float(value)


def _numbers(found: Mapping[str, Any], name: str, length: int) -> tuple[float, ...]:
    values = found.get(name)
    if not isinstance(values, list) or len(values) != length:
        _bad(name, values, f"a list of {length} numbers")
    for value in values:
        if (type(value) is not float and type(value) is not int) or not -LARGEST <= value <= LARGEST:
            _bad(name, value, f"made of numbers within {LARGEST:g}")
    return tuple(map(float, values))
