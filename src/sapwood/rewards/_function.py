"""Any Python function as a reward: "rewards.py:brevity" in a recipe.

What a function is given is in `OFFERED`, by the names of its parameters; metrics by function use the same.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, create_model
from pydantic.errors import PydanticUserError

from sapwood import plugins
from sapwood.errors import ConfigError, DataError
from sapwood.rewards import Reward
from sapwood.types import Group, Trajectory

#: Parameter -> what it is given: lists of N entries, one a trajectory, group after group.
OFFERED: Mapping[str, Callable[[int, Trajectory], Any]] = {
    "prompts": lambda g, t: t.task.prompt[-1].content if t.task.prompt else "",
    "replies": lambda g, t: t.turns[-1].text if t.turns else "",
    "answers": lambda g, t: t.task.answer,
    "metadata": lambda g, t: t.task.metadata,
    "tasks": lambda g, t: t.task,
    "groups": lambda g, t: g,
    "trajectories": lambda g, t: t,
    "rewards": lambda g, t: t.reward,
    "parts": lambda g, t: t.reward_parts,
}
#: What there is before rewards are known.
UNSCORED = tuple(name for name in OFFERED if name not in ("rewards", "parts"))
#: What other libraries call them.
_SYNONYMS = {
    "prompts": ("prompt", "questions", "inputs", "queries"),
    "replies": ("reply", "responses", "response", "completions", "completion", "outputs"),
    "answers": ("answer", "solutions", "solution", "targets", "ground_truth", "ground_truths", "references"),
}


class FunctionReward(Reward):
    """A reward whose parts a function computes. Its name is the function's, and so is the name of a single part."""

    function: ClassVar[Callable[..., Any]]
    given: ClassVar[tuple[str, ...]]

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {the function's name: number} or the dict that it returned for trajectory i of group g.

        Raises DataError where the function raises, or doesn't return one number or dict of numbers a reply.
        """
        function = type(self).function
        trajectories = [t for group in groups for t in group.trajectories]
        if not trajectories:
            return [[] for _ in groups]
        options = {name: getattr(self, name) for name in type(self).model_fields if name not in Reward.model_fields}
        returned = plugins.call(title("reward", function), function, **arguments(type(self).given, groups), **options)
        parts = iter(_checked(function, returned, trajectories))
        return [[next(parts) for _ in group.trajectories] for group in groups]


@cache
def reward_class(function: Callable[..., Any]) -> type[FunctionReward]:
    """The reward class of a function; parameters that aren't in `UNSCORED` become the options of the entry.

    Raises ConfigError for a signature that can't be called so.
    """
    given, fields = signature_of("reward", function, UNSCORED, Reward)
    model = make_model("reward", function, FunctionReward, fields)
    model.function, model.given = staticmethod(function), given
    return model


def arguments(given: Sequence[str], groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The lists of `OFFERED` that are asked for."""
    pairs = [(g, trajectory) for g, group in enumerate(groups) for trajectory in group.trajectories]
    return {name: [OFFERED[name](g, trajectory) for g, trajectory in pairs] for name in given}


def signature_of(
    kind: str, function: Callable[..., Any], offered: Sequence[str], base: type[BaseModel]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Which of `offered` a function takes, and its other parameters as pydantic fields.

    base: the class that the fields will join, whose names they can't take. Raises ConfigError.
    """
    where = title(kind, function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{where}: it is async, and is called plainly; write it with def.")
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: its signature can't be read: {error}.") from error
    given, fields = [], {}
    for parameter in parameters:
        name, required = parameter.name, parameter.default is parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD:
            return tuple(offered), fields
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if name in offered and parameter.kind is not parameter.POSITIONAL_ONLY:
            given.append(name)
            continue
        meant = next((word for word, others in _SYNONYMS.items() if name in others and required), None)
        if meant is not None:
            raise ConfigError(f"{where}: it is given lists by name; call its parameter {name!r} {meant!r}.")
        taken = name in base.model_fields or hasattr(base, name) or name.startswith("_")
        if taken or parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(f"{where}: its parameter {name!r} can't be an option of a {kind}; rename it.")
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = (annotation, ... if required else parameter.default)
    if not given:
        raise ConfigError(f"{where}: it must take at least one of {', '.join(offered)}, by these names.")
    return tuple(given), fields


def make_model(kind: str, function: Callable[..., Any], base: type[Any], fields: dict[str, Any]) -> Any:
    """A subclass of `base` under the function's name, with the fields as options. Raises ConfigError."""
    try:
        return create_model(function.__name__, __base__=base, __module__=function.__module__, **fields)
    except (PydanticUserError, NameError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"{title(kind, function)}: its options can't be read: {said}.") from error


def title(kind: str, function: Callable[..., Any]) -> str:
    """What messages call a function: its kind, name, file and line."""
    return f"{kind} {function.__name__!r} ({plugins.place_of(function)})"


def plain(value: Any) -> Any:
    """Arrays, tensors and numpy numbers as plain Python."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def short(value: Any) -> str:
    """A value as a message shows it."""
    with contextlib.suppress(ValueError):  # an integer of thousands of digits has no text
        written = repr(value)
        return written if len(written) <= 80 else f"{written[:77]}..."
    return f"a {type(value).__name__} too large to write"


def is_number(value: Any) -> bool:
    """Whether a plain value is a finite number, as a float."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _checked(function: Callable[..., Any], returned: Any, trajectories: Sequence[Trajectory]) -> list[dict[str, float]]:
    where = title("reward", function)
    values = plain(returned)
    if not isinstance(values, list | tuple):
        raise DataError(
            f"{where} returned {type(returned).__name__}; return a list with one number, or one dict of numbers, for "
            "each reply."
        )
    if len(values) != len(trajectories):
        raise DataError(
            f"{where} returned {len(values)} of {len(trajectories)} scores; return one for each reply, in order."
        )
    return [
        _parts(f"{where}, reply {i} (task {trajectory.task.id!r})", function.__name__, value)
        for i, (value, trajectory) in enumerate(zip(values, trajectories, strict=True))
    ]


def _parts(where: str, name: str, value: Any) -> dict[str, float]:
    parts = value if isinstance(value, Mapping) else {name: value}
    numbers = {part: plain(given) for part, given in parts.items()}
    if not numbers:
        raise DataError(f"{where}: it returned an empty dict; for a reply that can't be judged, say what it is worth.")
    for part, number in numbers.items():
        if not isinstance(part, str) or not is_number(number):
            said = f" as {part!r}" if isinstance(value, Mapping) else ""
            raise DataError(f"{where}: it returned {short(number)}{said}; every score must be a finite number.")
    return {part: float(number) for part, number in numbers.items()}
