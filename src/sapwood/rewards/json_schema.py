"""Whether replies hold JSON that fits a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from sapwood.errors import DataError, MissingExtra, printable
from sapwood.rewards import Reward
from sapwood.types import Group, Turn

_FENCE = re.compile(r"```[ \t]*(?:json|JSON)?[ \t]*\n(.*?)```", re.DOTALL)
_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse(name))
# Places in a reply where an object may begin that are tried, from the front.
_TRIES = 1000


class JsonSchema(Reward):
    """The share of an episode's replies that hold JSON valid under a schema (extra `jsonschema`).

    path: a file with a JSON schema; definition: the schema itself. take: where the JSON is: the "whole" reply, the
    "last_object" ({...}) in it that isn't part of another, or the last "fenced" code block (three backticks, with or
    without `json`). NaN and Infinity aren't JSON. References to other documents aren't fetched.
    """

    path: Path | None = None
    definition: dict[str, Any] | None = None
    take: Literal["whole", "last_object", "fenced"] = "whole"

    @model_validator(mode="after")
    def _one_valid_schema(self) -> JsonSchema:
        if (self.path is None) == (self.definition is None):
            raise ValueError("give either path (a file with a JSON schema) or definition (the schema itself)")
        self._validator()
        return self

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"json_schema": share of valid replies in 0..1}; 0 for an episode without a turn.

        Raises DataError where the schema refers to what isn't in it.
        """
        validator = self._validator()
        from referencing.exceptions import Unresolvable  # there once a validator could be made

        try:
            return [[{"json_schema": self._share(validator, t.turns)} for t in g.trajectories] for g in groups]
        except Unresolvable as error:
            raise DataError(f"reward json_schema: {error.ref!r} is not in the schema; put it under $defs.") from error

    def _share(self, validator: Any, turns: Sequence[Turn]) -> float:
        return sum(self._valid(validator, turn.text) for turn in turns) / len(turns) if turns else 0.0

    def _valid(self, validator: Any, text: str) -> bool:
        try:
            return validator.is_valid(_taken(text, self.take))
        except (ValueError, RecursionError):  # not JSON, or nested too deeply to check
            return False

    def _validator(self) -> Any:
        schema = self.definition if self.path is None else _read(self.path)
        return _compiled(json.dumps(schema))


def _taken(text: str, take: str) -> Any:
    """The JSON value in a reply. Raises ValueError where there is none, RecursionError where it nests too deeply."""
    if take == "fenced":
        blocks = _FENCE.findall(text)
        return _DECODER.decode(blocks[-1].strip() if blocks else "")
    if take == "whole":
        return _DECODER.decode(text.strip())
    found, at = [], text.find("{")
    for _ in range(_TRIES):
        if at < 0:
            break
        try:
            value, end = _DECODER.raw_decode(text, at)
            found.append(value)
        except ValueError:
            end = at + 1
        at = text.find("{", end)
    if not found:
        raise ValueError("no JSON object")
    return found[-1]


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{printable(str(path))}: can't be read as a JSON schema: {printable(str(error))}; check the reward's path."
        ) from error


@lru_cache(32)
def _compiled(schema: str) -> Any:
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError as error:
        raise MissingExtra("jsonschema", "jsonschema", "reward json_schema") from error
    value = json.loads(schema)
    try:
        validator = validator_for(value, default=Draft202012Validator)
        validator.check_schema(value)
    except SchemaError as error:
        place = "/".join(str(part) for part in error.path) or "the top"
        raise ValueError(f"not a JSON schema: {error.message} (at {place})") from error
    return validator(value, registry=Registry())


PLUGIN = JsonSchema
