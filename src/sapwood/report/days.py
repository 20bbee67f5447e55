"""A building's trajectory file as the page shows it: each day's return, rewards, temperatures and powers.

Read as everything here is, tolerantly: what doesn't fit is left out and told. `sapwood.pipeline.trajectories` is the
format's own reader, which refuses a file with a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapwood.report.building import TEXT, items, told
from sapwood.report.reading import Problems, finite, shorter, whole
from sapwood.report.samples import spread

#: Steps of a file that the page can draw; days beyond keep their return.
STEPS = 40_000
#: Days of a file that are listed at all.
DAYS = 5000
_DIGITS = 5
#: Options of a world that say most about it.
_WORDS = ("building", "climate", "control", "backend", "occupancy")


def days(data: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """What the page draws of a file.

    {"controller", "world", "options": [[name, text]], "zones", "episodes": [{"task", "day", "hour", "total", "steps",
    "energy", "comfort", "replies", "parsed", "fallback", "drawn": {...} | None}], "by_step": {"x", "y"}}.
    drawn: columns of a day, one number a step: step, reward, inside, low, high, outside, power.
    """
    world = data["world"]
    names = world.get("observation")
    zones = len(world["zones"]) if isinstance(world.get("zones"), list) else 0
    layout = (zones, _place(names, "outdoor temperature", zones))
    made: list[dict[str, Any]] = []
    columns: list[dict[str, Any]] = []
    for number, episode in enumerate(data["episodes"][:DAYS], 1):
        if not isinstance(episode, Mapping):
            problems.add(f"episode {number}: not an object; left out.")
            continue
        steps = [step for step in items(episode.get("steps")) if isinstance(step, Mapping)]
        if not steps:
            problems.add(f"episode {number}: has no steps; left out.")
            continue
        columns.append(_columns(steps, layout))
        made.append(_episode(episode, steps, columns[-1]))
    if len(data["episodes"]) > DAYS:
        problems.add(f"{len(data['episodes']) - DAYS:,} episodes beyond the first {DAYS:,} are left out.")
    left = STEPS
    for place in spread(len(made)):
        if made[place]["steps"] <= left:
            made[place]["drawn"] = columns[place]
            left -= made[place]["steps"]
    hidden = sum(episode["drawn"] is None for episode in made)
    if hidden:
        problems.add(f"{hidden:,} of {len(made):,} days have too many steps to be drawn here; their returns are shown.")
    options = [[str(name)[:TEXT], told(value)] for name, value in list(world.items())[:100] if name not in _LISTS]
    return {
        "controller": told(data.get("controller")),
        "model": told(data["model"].get("name")) if isinstance(data.get("model"), Mapping) else "",
        "world": ", ".join(told(world[name]) for name in _WORDS if world.get(name) not in (None, "none")),
        "options": options,
        "zones": zones,
        "episodes": made,
        "by_step": _by_step(columns),
    }


_LISTS = ("zones", "observation", "action")


def _episode(
    episode: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]
) -> dict[str, Any]:
    replies = [step for step in steps if "reply" in step]
    known = [value for value in columns["reward"] if value is not None]
    total = finite(episode.get("return"))
    return {
        "task": told(episode.get("task")),
        "day": whole(episode.get("day")),
        "hour": whole(episode.get("hour")),
        "total": shorter(sum(known) if total is None else total),
        "steps": len(steps),
        "energy": _mean([finite(step.get("energy")) for step in steps]),
        "comfort": _mean([finite(step.get("comfort")) for step in steps]),
        "replies": len(replies),
        "parsed": sum(step.get("parsed") not in (None, False, "failed") for step in replies),
        "fallback": sum(bool(step.get("fallback")) for step in replies),
        "drawn": None,
    }


def _columns(steps: Sequence[Mapping[str, Any]], layout: tuple[int, int]) -> dict[str, Any]:
    """What is drawn of a day, one number or None a step."""
    zones, outdoors = layout
    found: dict[str, list[Any]] = {name: [] for name in ("step", "reward", "inside", "low", "high", "outside", "power")}
    for number, step in enumerate(steps):
        at = whole(step.get("step"))
        observed = [finite(value) for value in items(step.get("observation"))]
        inside = [value for value in observed[:zones] if value is not None]
        powers = [value for value in map(finite, items(step.get("action"))) if value is not None]
        found["step"].append(number if at is None else at)
        found["reward"].append(shorter(finite(step.get("reward")), _DIGITS))
        found["inside"].append(_mean(inside))
        found["low"].append(shorter(min(inside), _DIGITS) if inside else None)
        found["high"].append(shorter(max(inside), _DIGITS) if inside else None)
        found["outside"].append(shorter(observed[outdoors], _DIGITS) if 0 <= outdoors < len(observed) else None)
        found["power"].append(_mean(powers))
    return found


def _by_step(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Mean reward of each step of an episode, over the days that have it."""
    sums: dict[int, tuple[float, int]] = {}
    for day in columns:
        for step, reward in zip(day["step"], day["reward"], strict=True):
            if reward is not None:
                total, count = sums.get(step, (0.0, 0))
                sums[step] = total + reward, count + 1
    steps = sorted(sums)[:2000]
    return {"x": steps, "y": [shorter(sums[step][0] / sums[step][1], _DIGITS) for step in steps]}


def _place(names: Any, name: str, otherwise: int) -> int:
    return names.index(name) if isinstance(names, list) and name in names else otherwise


def _mean(values: Sequence[float | None]) -> float | int | None:
    known = [value for value in values if value is not None]
    return shorter(sum(known) / len(known), _DIGITS) if known else None
