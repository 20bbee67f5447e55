"""What the model reads: the job, worked examples, and the state in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.controllers import one_step_optimal
from sapwood.envs.hvac.simulator import HvacEnv
from sapwood.types import Message

#: States that examples are chosen from, spread over the training days.
EXAMPLE_POOL = 96


@dataclass(frozen=True)
class Record:
    """A past step: powers [1 or controlled zones], its physical reward, and whether the reply could be read."""

    powers: tuple[float, ...]
    reward: float
    valid: bool = True


def answer(powers: Sequence[float]) -> str:
    """The reply that says these powers, two decimals each."""
    rounded = [round(float(p), 2) + 0.0 for p in powers]
    return json.dumps({"power": rounded[0] if len(rounded) == 1 else rounded})


def job(env: HvacEnv, *, reasoning: bool) -> str:
    """The system message: job, units, reward and reply format."""
    on = env.physics.powered.astype(bool)
    zones = int(on.sum())
    minutes = env.physics.time_res / 60.0
    if env.control == "uniform":
        choice, form = "one power for all zones", '{"power": x}'
    else:
        choice, form = f"a power for each of the {zones} zones in order", '{"power": [x1, x2, ...]}'
    end = f"Think step by step, then end with {form}" if reasoning else f"Reply with {form} only"
    return (
        f"You control heating and cooling in a building with {zones} zones. Every {minutes:g} minutes choose "
        f"{choice}, from -1 (full cooling) to 1 (full heating). Full power moves the zones about {reach(env):.0f} C. "
        f"Zones drift towards the outside temperature and warm up in the sun. Keep them at {_aim(env)}: below "
        f"target heat (positive), above target cool (negative). The reward is near 0 when the zones are at target "
        f"and falls with the distance and {_spent(env)}. {end}."
    )


def _aim(env: HvacEnv) -> str:
    return "the target that each state gives" if env.has_setback else f"{env.target:g} C"


def _spent(env: HvacEnv) -> str:
    if env.price is None:
        return "the power used"
    price = "the price that each state gives" if env.has_prices else f"{env.price:g} per kWh"
    return f"the power used, which costs {price}"


def reach(env: HvacEnv) -> float:
    """Degrees that full power moves the powered zones in one step, on average."""
    on = env.physics.powered.astype(bool)
    _, gain = env.response()
    return float(gain[on].sum(axis=1).mean())


def _needs(difference: float, full: float) -> str:
    """The change wanted as a share of full power: a small model reads sign and size off more surely than a rule."""
    return f"{round(difference / full, 2) + 0.0:.2f}"


def describe(env: HvacEnv, history: Sequence[Record] = ()) -> str:
    """The state in words, one decimal a temperature, what matters most last.

    Uniform control reads the mean of the powered zones.
    """
    hour, minute = divmod(round(env.hour * 60.0), 60)
    text = f"Time {hour:02d}:{minute:02d}, outside {env.outdoor:.1f} C, ground {env.ground:.1f} C, sun {env.sun:.1f}"
    if env.occupancy != "none":
        text += f", people {env.people_present:.0f}"
    if env.has_prices:
        text += f", price {env.price:g} per kWh"
    if history:
        text += ". Recent powers and rewards: " + ", ".join(_past(record) for record in history)
    temperatures = env.temperatures[env.physics.powered.astype(bool)]
    full = reach(env)
    if env.control == "uniform":
        temperatures = temperatures.mean(keepdims=True)
    zones = ", ".join(f"{t:.1f}" for t in temperatures.tolist())
    needs = ", ".join(_needs(env.target - t, full) for t in temperatures.tolist())
    target = f", target {env.target:g} C" if env.has_setback else ""
    return f"{text}. Zones {zones} C{target}; weather aside, target needs {needs}."


def _past(record: Record) -> str:
    powers = " ".join(f"{p:.2f}" for p in record.powers) if record.valid else "unreadable"
    return f"{powers} ({_amount(record.reward)})"


def _amount(reward: float) -> str:
    """One decimal, and no minus zero."""
    return f"{round(reward, 1) + 0.0:.1f}"


@dataclass(frozen=True)
class Example:
    """A state in words, the one-step-optimal reply and its physical reward.

    start: the simulator's reset options that lead to the state.
    """

    state: str
    reply: str
    reward: float
    start: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A state that could be shown. observation [n + 4]; power: mean best power; drift: how far weather moves that."""

    example: Example
    observation: NDArray[np.float32]
    power: float
    drift: float


def pool(env: HvacEnv, days: Sequence[int], spread: float) -> list[Candidate]:
    """States over days, hours and initial temperatures within `spread` of the target, with one-step-optimal answers;
    a function of the arguments alone."""
    on = env.physics.powered.astype(bool)
    rng = np.random.default_rng(0)
    made: list[Candidate] = []
    for index in range(EXAMPLE_POOL):
        day = int(days[index * len(days) // EXAMPLE_POOL])
        hour = int(rng.integers(24))
        initial = start_temperatures(env, rng, spread, hour)
        start = {"day": day, "hour": hour, "initial_temperature": initial.tolist()}
        observation, _ = env.reset(options=start)
        state = describe(env)
        action = np.round(one_step_optimal(env), 2)
        powers = action if env.control == "uniform" else action[on]
        wanted = (env.target - env.temperatures[on].mean()) / reach(env)
        drift = abs(float(wanted - powers.mean()))
        reward = env.step(action.astype(np.float32))[1]
        example = Example(state, answer(powers.tolist()), reward, start)
        made.append(Candidate(example, observation, float(powers.mean()), drift))
    return made


def examples(env: HvacEnv, days: Sequence[int], count: int, spread: float) -> tuple[Example, ...]:
    """`count` examples on the given days, from strong cooling to strong heating; a function of the arguments alone.

    Of a `pool` the third in which the weather matters least is kept, since an example in which drift outweighs the
    distance from target teaches a small model that there is no rule; of these, in order of their best mean power, the
    middles of `count` equal parts.
    """
    if count == 0:
        return ()
    found = pool(env, days, spread)
    # Full power, which shows neither sign nor size of a rule, is left out unless there is too little else.
    found.sort(key=lambda item: (abs(item.power) > 0.95, item.drift))
    calm = sorted(found[: max(count, len(found) // 3)], key=lambda item: item.power)
    chosen = [calm[(2 * i + 1) * len(calm) // (2 * count)].example for i in range(count)]
    # Neighbours in the prompt should differ, or a small model copies the last one.
    return tuple(chosen[::2] + chosen[1::2])


def start_temperatures(env: HvacEnv, rng: np.random.Generator, spread: float, hour: float = 0.0) -> NDArray[np.float64]:
    """Zone temperatures [n]: a common offset within `spread` of the hour's target, and half a degree between zones."""
    offset = rng.uniform(-spread, spread)
    return np.round(env.target_at(hour) + offset + rng.uniform(-0.5, 0.5, env.zones), 2)


def trunk(system: str, shots: Sequence[Example], *, rewards: bool) -> tuple[Message, ...]:
    """Messages that every prompt of a family begins with: the job, then examples as turns of the conversation.

    rewards: say after each example what it was paid.
    """
    messages = [Message("system", system)]
    for index, shot in enumerate(shots):
        messages.append(Message("user", after(shots[index - 1].reward if index and rewards else None, shot.state)))
        messages.append(Message("assistant", shot.reply))
    return tuple(messages)


def after(reward: float | None, state: str) -> str:
    """A user turn: the reward of the turn before, if there was one, then the state."""
    return state if reward is None else f"Reward {_amount(reward)}. {state}"
