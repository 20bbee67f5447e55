"""What an observation and an action of an `Hvac` family are made of, and whether something recorded elsewhere fits.

A file that outlives its family (a trajectory, few-shot examples) carries `world_of(family)`. Powers in such a file are
those of a reply: one number for uniform control, else one a controlled zone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.building import load_building
from sapwood.errors import printable

if TYPE_CHECKING:
    from sapwood.envs.hvac.text import Hvac

#: Options that change what is asked, shown or played, and neither the physics nor the physical reward of a step.
VIEW = frozenset(
    {
        "name", "horizon", "train_horizon", "start", "start_spread", "few_shot", "few_shot_choice", "examples",
        "history", "reasoning", "memory", "reward_scale", "parse_penalty",
    }
)  # fmt: skip

UNIFORM = "all zones"


def world_of(family: Hvac) -> dict[str, Any]:
    """Every option of the family that changes physics or reward, and the names of zones, observation and action.

    {"building", "climate", ..., "zones": [n], "observation": [n + 4], "action": [1 or controlled zones]}
    """
    plan = load_building(family.building)
    zones = [zone.name for zone in plan.zones]
    options = {name: value for name, value in family.model_dump(mode="json").items() if name not in VIEW}
    return {**options, "zones": zones, "observation": observation_names(family), "action": action_names(family)}


def observation_names(family: Hvac) -> list[str]:
    """What each number of an observation is."""
    return family.model().observation_names


def action_names(family: Hvac) -> list[str]:
    """What the numbers of an action are for, in order: all zones at once, or each controlled zone."""
    if family.control == "uniform":
        return [UNIFORM]
    plan = load_building(family.building)
    return [zone.name for zone in plan.zones if zone.conditioned or family.powered == "all"]


def misfit(world: Mapping[str, Any], family: Hvac) -> str:
    """Why what was recorded in `world` can't be used in the family's: the first difference in words, or ""."""
    own = world_of(family)
    for name in ("building", "zones", "observation", "control", "action"):
        theirs, ours = world.get(name), own[name]
        if theirs == ours:
            continue
        if isinstance(ours, list):
            many = len(theirs) if isinstance(theirs, list) else 0
            return f"it has {many} {name} entries ({_few(theirs)}), and this world has {len(ours)} ({_few(ours)})"
        return f"its {name} is {_shown(theirs)}, and this world's is {_shown(ours)}"
    return ""


def differences(world: Mapping[str, Any], family: Hvac) -> dict[str, tuple[Any, Any]]:
    """Options in which a recorded world differs from the family's: name -> (recorded, the family's).

    Where `misfit` finds nothing these change physics or reward, not the meaning of a number.
    """
    own = world_of(family)
    names = [name for name in own if name not in ("zones", "observation", "action")]
    return {name: (world.get(name), own[name]) for name in names if world.get(name) != own[name]}


def powers_of(family: Hvac, action: NDArray[Any]) -> tuple[float, ...]:
    """A simulator's action as the powers of a reply: clipped to -1..1, without the zones that ignore theirs."""
    powers = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
    if family.control != "uniform":
        powers = powers[_controlled(family)]
    return tuple(shortest(powers))


def action_of(family: Hvac, powers: tuple[float, ...]) -> NDArray[np.float32]:
    """The simulator's action for the powers of a reply; the inverse of `powers_of`."""
    if family.control == "uniform":
        return np.array(powers, np.float32)
    controlled = _controlled(family)
    action = np.zeros(len(controlled), np.float32)
    action[controlled] = powers
    return action


def shortest(values: NDArray[Any]) -> list[float]:
    """Numbers with as few digits as float32 needs to read back the same."""
    return [float(str(x)) for x in np.asarray(values, np.float32)]


def _controlled(family: Hvac) -> NDArray[np.bool_]:
    plan = load_building(family.building)
    return np.array([zone.conditioned or family.powered == "all" for zone in plan.zones])


def _few(value: Any) -> str:
    names = [_shown(item) for item in value[:3]] if isinstance(value, list) else [_shown(value)]
    return ", ".join(names) + (", ..." if isinstance(value, list) and len(value) > 3 else "")


def _shown(value: Any) -> str:
    return printable(str(value), 60) if value is not None else "not given"
