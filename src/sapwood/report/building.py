"""A building's trajectory file as the list of samples reads it: a trajectory an episode, a turn a step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

#: A name of a file is cut here.
TEXT = 300


def is_building(data: Any) -> bool:
    """Whether parsed JSON is a trajectory file of a building."""
    return (
        isinstance(data, Mapping)
        and isinstance(data.get("episodes"), list)
        and isinstance(data.get("world"), Mapping)
        and "controller" in data
    )


def records(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The episodes as the records of trajectories that the list of samples reads, a turn a step."""
    prompts = data.get("prompts")
    prompts = prompts if isinstance(prompts, Mapping) else {}
    for episode in data["episodes"]:
        steps = [step for step in items(episode.get("steps")) if isinstance(step, Mapping)] if _is(episode) else []
        if not steps:
            continue
        opening = prompts.get(steps[0].get("prompt")) if isinstance(steps[0].get("prompt"), str) else None
        yield {
            "task": told(episode.get("task")),
            "reward": episode.get("return"),
            "messages": opening if isinstance(opening, list) else [],
            "turns": [_turn(step) for step in steps],
        }


def _turn(step: Mapping[str, Any]) -> dict[str, Any]:
    shown = ("step", "action", "energy", "comfort", "parsed", "fallback", "temperature", "value", "observation")
    others = items(step.get("others"))
    info = {name: step[name] for name in shown if name in step}
    if others:
        info["other replies"] = [
            {name: other.get(name) for name in ("reply", "reward", "parsed")} for other in others[:32] if _is(other)
        ]
    return {
        "prompt": step.get("state"),
        "reply": step["reply"] if "reply" in step else json.dumps(step.get("action")),
        "reward": step.get("reward"),
        "restart": True,
        "token_ids": step.get("token_ids"),
        "sampled_logprobs": step.get("sampled_logprobs"),
        "info": info,
    }


def _is(value: Any) -> bool:
    return isinstance(value, Mapping)


def items(value: Any) -> list[Any]:
    """A list as it is, anything else as an empty one."""
    return value if isinstance(value, list) else []


def told(value: Any) -> str:
    """A value as a short text."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:TEXT]
