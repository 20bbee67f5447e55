"""The building as a text world: state in words in, powers as JSON out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from sapwood.envs import Env, EnvFamily, Observation, Split, Step
from sapwood.envs.hvac import controllers
from sapwood.envs.hvac.building import load_building
from sapwood.envs.hvac.energyplus import EnergyPlusEnv
from sapwood.envs.hvac.fewshot import Shots, balanced, check_shots, fixed, load_shots, nearest, pooled
from sapwood.envs.hvac.layout import world_of
from sapwood.envs.hvac.parsing import parse_reply
from sapwood.envs.hvac.physics import DAYS, Powered, ThermalMass
from sapwood.envs.hvac.prompt import (
    Example,
    Record,
    after,
    describe,
    examples,
    job,
    pool,
    start_temperatures,
    trunk,
)
from sapwood.envs.hvac.simulator import Control, HvacEnv, Occupancy, Setback
from sapwood.envs.hvac.weather import read_epw, station_of
from sapwood.errors import ConfigError
from sapwood.types import Message, Task

#: One block of days in seven is held out.
HOLD_OUT_EVERY = 7
LONGEST_EPISODE_DAYS = 14
SPLITS = ("train", "eval")


def _pairs(setback: Any) -> Any:
    """{hour: target} as pairs, by hour."""
    return tuple(sorted(setback.items())) if isinstance(setback, Mapping) else setback


class Hvac(EnvFamily):
    """Running a building's heating and cooling, one reply a time step.

    The simulator is `HvacEnv` (backend rc) or `EnergyPlusEnv` (backend energyplus); building, climate, epw, control,
    time_res, max_power, target, setback, beta, pnorm, price, price_weight, powered, occupancy, thermal_mass and
    mass_coupling are their options. thermal_mass is 1 for rc and "fitted" for energyplus unless given; there it is
    that of the `model` which writes the prompts' numbers and examples. horizon: steps of an episode. start: "day"
    (midnight, zones at target) or "random" (any hour, zones within `start_spread` of the target). train_horizon:
    steps of a training episode, where shorter ones teach better than they evaluate (`horizon` unless given).
    few_shot: worked examples in the prompt; history: past powers and rewards shown with memory="state"; reasoning:
    the reply may think before it answers.

    examples: a file of examples that stage `select` of the pipeline wrote; without it they are states of training days
    with their one-step-optimal answers. few_shot_choice: "fixed" (the same in every prompt), "nearest" (for each
    state those of the most similar states) or "balanced" (one each of `few_shot` clusters, drawn by the task's seed).

    memory: "state" gives the model a prompt of examples and the current state each turn (a restart, so the examples
    are one trunk for all turns, episodes and tasks); "chat" keeps the whole conversation.

    A turn's reward is reward_scale * physical reward, less `parse_penalty` if the reply could not be read (the
    fallback power 0 then acts). `info` holds both, with `parsed`, `fallback`, `powers`, `energy` and `comfort`.
    """

    backend: Literal["rc", "energyplus"] = "rc"
    building: str = "OfficeSmall"
    climate: str = "Hot_Dry"
    epw: str | None = None
    control: Control = "uniform"
    time_res: float = 3600.0
    horizon: int = Field(24, ge=1)
    train_horizon: int | None = Field(None, ge=1)
    max_power: float = Field(8000.0, gt=0)
    target: float = 22.0
    setback: Annotated[Setback, BeforeValidator(_pairs)] = ()
    price: float | tuple[float, ...] | None = None
    price_weight: float = Field(1.0, ge=0)
    beta: float = Field(0.999, ge=0, le=1)
    pnorm: float = Field(2.0, ge=1)
    powered: Powered = "conditioned"
    occupancy: Occupancy = "none"
    thermal_mass: ThermalMass | None = None
    mass_coupling: float | None = None
    start: Literal["day", "random"] = "day"
    start_spread: float = Field(4.0, ge=0, le=15)
    few_shot: int = Field(3, ge=0, le=32)
    examples: str | None = None
    few_shot_choice: Literal["fixed", "nearest", "balanced"] = "fixed"
    history: int = Field(3, ge=0)
    reasoning: bool = False
    memory: Literal["state", "chat"] = "state"
    reward_scale: float = Field(1.0, gt=0)
    parse_penalty: float = Field(1.0, ge=0)

    _file: Shots | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _examples_fit(self) -> Hvac:
        if self.few_shot == 0 and (self.examples is not None or self.few_shot_choice != "fixed"):
            which = "examples are given" if self.examples is not None else f"few_shot_choice is {self.few_shot_choice}"
            raise ConfigError(f"hvac: {which} and few_shot is 0, so no example would be shown; raise few_shot.")
        if self.few_shot_choice == "nearest" and self.memory == "chat":
            raise ConfigError(
                "hvac: few_shot_choice nearest has other examples for each state, and memory chat shows them once; "
                "use memory state, or few_shot_choice fixed or balanced."
            )
        if self.examples is not None:
            self._candidates()
        return self

    @model_validator(mode="after")
    def _names_and_lengths(self) -> Hvac:
        load_building(self.building)
        if self.epw is None:
            station_of(self.climate)
        else:
            read_epw(self.epw)
        if self.horizon * self.time_res > LONGEST_EPISODE_DAYS * 86400:
            raise ConfigError(
                f"hvac: horizon {self.horizon} at time_res {self.time_res:g} s is longer than {LONGEST_EPISODE_DAYS} "
                "days; give fewer steps or a shorter time_res."
            )
        if self.train_horizon is not None and self.train_horizon > self.horizon:
            raise ConfigError(
                f"hvac: train_horizon {self.train_horizon} is longer than horizon {self.horizon}; training days are "
                "chosen for the latter, so raise it."
            )
        self.simulator()
        return self

    def describe(self) -> str:
        """What a table of returns was had in."""
        place = self.epw or self.climate
        physics = " in EnergyPlus" if self.backend == "energyplus" else ""
        extras = ", targets by hour" if self.setback else ""
        extras += ", energy at a price" if self.price is not None else ""
        zones = "one power for all zones" if self.control == "uniform" else "one power a zone"
        begin = "from midnight at target" if self.start == "day" else "from a random hour and temperature"
        return (
            f"HVAC {self.building}{physics}, {place}, {zones}, {self.horizon} steps of {self.time_res / 60:g} min "
            f"{begin}{extras}, days never trained on"
        )

    def simulator(self, steps: int | None = None) -> HvacEnv:
        """A new simulator with these options and episodes of `steps` (`horizon`); its reward is the physical one.

        Close it: one of EnergyPlus holds a process.
        """
        if self.backend == "rc":
            return self.model(steps)
        return EnergyPlusEnv(**self._options(steps), step_timeout=self.step_timeout)

    def model(self, steps: int | None = None) -> HvacEnv:
        """The RC model of the building with these options: the simulator itself with backend rc."""
        return HvacEnv(**self._options(steps))

    def _options(self, steps: int | None) -> dict[str, Any]:
        mass = self.thermal_mass
        if mass is None:
            mass = "fitted" if self.backend == "energyplus" and self.mass_coupling is None else 1.0
        shared = (
            "building",
            "climate",
            "epw",
            "control",
            "time_res",
            "max_power",
            "beta",
            "pnorm",
            "target",
            "setback",
        )
        shared += ("price", "price_weight", "powered", "occupancy", "mass_coupling")
        options = {name: getattr(self, name) for name in shared}
        return {**options, "thermal_mass": mass, "episode_len": steps or self.horizon}

    @property
    def block_days(self) -> int:
        """Days that an episode may touch: it starts and ends within a block of so many days."""
        hours = self.horizon * self.time_res / 3600.0
        whole = -(-int(np.ceil(hours)) // 24)
        return whole if self.start == "day" or hours <= 12 else whole + 1

    def days(self, split: Split) -> tuple[int, ...]:
        """First days (0..364) of the episodes of a split.

        With b = `block_days`, the days 3b .. 4b-1 of every 7b are held out: 52 single days spread over the seasons
        for episodes of a day. A training episode may start on any day whose block touches no held-out day.
        """
        if split not in SPLITS:
            raise ConfigError(f"hvac: split {split!r}; choose 'train' or 'eval'.")
        b = self.block_days
        starts = range(DAYS - b + 1)
        held_out = {d for d in range(DAYS) if d % (HOLD_OUT_EVERY * b) // b == 3}
        if split == "eval":
            return tuple(d for d in starts if d % (HOLD_OUT_EVERY * b) == 3 * b)
        return tuple(d for d in starts if held_out.isdisjoint(range(d, d + b)))

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`count` tasks. Held-out days are evenly spread over the year, training days a permutation by seed."""
        if count < 1:
            raise ConfigError(f"hvac: {count} {split} tasks asked for; give at least 1.")
        days = self.days(split)
        if split == "eval":
            kept = min(count, len(days))
            order = [days[(2 * i + 1) * len(days) // (2 * kept)] for i in range(kept)]
        else:
            order = [days[i] for i in np.random.default_rng([seed, 0]).permutation(len(days))]
        env = self.model()
        return [self._task(env, split, order[i % len(order)], seed, i) for i in range(count)]

    def _task(self, env: HvacEnv, split: Split, day: int, seed: int, index: int) -> Task:
        rng = np.random.default_rng([seed, 1 + SPLITS.index(split), index])
        steps = self.train_horizon or self.horizon if split == "train" else self.horizon
        begin = env.target_at(0.0)
        metadata: dict[str, object] = {"day": day, "hour": 0, "initial_temperature": begin, "steps": steps}
        if self.start == "random":
            spare = self.block_days * 24 - int(np.ceil(self.horizon * self.time_res / 3600.0))
            hour = metadata["hour"] = int(rng.integers(min(spare, 23) + 1))
            metadata["initial_temperature"] = start_temperatures(env, rng, self.start_spread, hour).tolist()
        return Task(id=f"hvac-{split}-{seed}-{index}-day{day}", metadata=metadata, seed=int(rng.integers(2**31)))

    def make(self, task: Task) -> HvacText:
        """A new text environment for the task."""
        return HvacText(self, task)

    def _candidates(self) -> Shots:
        """What examples are chosen from: those of the file, as they were when this family was made, or a pool."""
        if self.examples is None:
            return _pooled(self)  # pyright: ignore[reportArgumentType]  (a frozen model is hashable)
        if self._file is None or self._file.path != self.examples:
            found = load_shots(self.examples)
            check_shots(found, self)
            self._file = found
        return self._file

    def shots_for(self, task: Task, env: HvacEnv) -> tuple[Example, ...]:
        """The examples in the prompt of the state that a task's simulator is in."""
        if self.few_shot_choice == "nearest":
            return nearest(self._candidates(), env.observation, self.few_shot)
        if self.few_shot_choice == "balanced":
            return balanced(self._candidates(), self.few_shot, task.seed)
        return self.shots

    @property
    def prompt_trunk(self) -> tuple[Message, ...]:
        """The messages that every prompt begins with: the job, and the examples where all prompts have the same."""
        return self.trunk(self.shots)

    def trunk(self, shots: tuple[Example, ...]) -> tuple[Message, ...]:
        """The messages before the state: the job and these examples."""
        return trunk(_job(self), shots, rewards=self.history > 0)  # pyright: ignore[reportArgumentType]  (hashable)

    @property
    def shots(self) -> tuple[Example, ...]:
        """The examples that all prompts share; their days are training days."""
        if self.few_shot_choice != "fixed":
            return ()
        if self.examples is not None:
            return fixed(self._candidates(), self.few_shot)
        return _examples(self)  # pyright: ignore[reportArgumentType]  (a frozen model is hashable)

    def reset_simulator(self, env: HvacEnv, task: Task) -> NDArray[np.float32]:
        """Put a simulator at the beginning of a task; returns its first observation [n + 4]."""
        options = {k: task.metadata[k] for k in ("day", "hour", "initial_temperature")}
        return env.reset(seed=task.seed, options=options)[0]

    def baselines(self) -> Mapping[str, Callable[[Task], float]]:
        """Physical return of an episode under random, zero, proportional and one_step_optimal control.

        one_step_optimal knows what the simulator will do, so there is none with EnergyPlus; the proportional
        controller has the gain of the RC `model`.
        """

        def of(controller: Callable[[Task], controllers.Controller]) -> Callable[[Task], float]:
            def run(task: Task) -> float:
                with closing(self.simulator(task.metadata.get("steps"))) as env:
                    self.reset_simulator(env, task)
                    return controllers.episode_return(env, controller(task))

            return run

        known = {
            "random": of(lambda task: controllers.random_controller(task.seed)),
            "zero": of(lambda task: controllers.zero),
            "proportional": of(lambda task: controllers.proportional),
            "one_step_optimal": of(lambda task: controllers.one_step_optimal),
        }
        return {name: run for name, run in known.items() if self.backend == "rc" or name != "one_step_optimal"}


# Cached by the options' values: a property cached on the model would survive `model_copy(update=...)`.
@lru_cache(maxsize=64)
def _examples(family: Hvac) -> tuple[Example, ...]:
    return examples(family.model(), family.days("train"), family.few_shot, family.start_spread)


@lru_cache(maxsize=16)
def _pooled(family: Hvac) -> Shots:
    return pooled(pool(family.model(), family.days("train"), family.start_spread), world_of(family))


@lru_cache(maxsize=64)
def _job(family: Hvac) -> str:
    env = family.model()
    env.reset(options={"day": 0})
    return job(env, reasoning=family.reasoning)


class HvacText(Env):
    """One episode of `Hvac`. observation [n + 4]: the simulator's, as the model is about to see it in words."""

    def __init__(self, family: Hvac, task: Task) -> None:
        self.family = family
        self.env = family.simulator(task.metadata.get("steps"))
        self.observation = family.reset_simulator(self.env, task)
        self._past: list[Record] = []
        self._task = task
        self._shots = family.shots_for(task, self.env)
        self._powered = self.env.physics.powered.astype(bool)
        self._count = 1 if family.control == "uniform" else int(self._powered.sum())

    def start(self) -> Observation:
        """The job, the examples and the first state."""
        return Observation(self._prompt())

    def _prompt(self) -> tuple[Message, ...]:
        """The whole prompt of the current state."""
        if self.family.few_shot_choice == "nearest":
            self._shots = self.family.shots_for(self._task, self.env)
        return (*self.family.trunk(self._shots), self._state_turn())

    def _state_turn(self) -> Message:
        if self.family.memory == "chat":
            previous = self._past[-1].reward if self._past else self._last_example_reward()
            return Message("user", after(previous, describe(self.env)))
        shown = self._past[-self.family.history :] if self.family.history else []
        return Message("user", after(self._last_example_reward(), describe(self.env, shown)))

    def _last_example_reward(self) -> float | None:
        return self._shots[-1].reward if self._shots and self.family.history else None

    def step(self, reply: str) -> Step:
        """Apply the powers of the reply, or 0 where it can't be read."""
        parsed = parse_reply(reply, self._count, last=self.family.reasoning)
        if self.family.control == "uniform":
            action = np.array(parsed.powers, np.float32)
        else:
            action = np.zeros(self.env.zones, np.float32)
            action[self._powered] = parsed.powers
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self._past.append(Record(parsed.powers, reward, not parsed.fallback))
        penalty = self.family.parse_penalty if parsed.fallback else 0.0
        if terminated or truncated:
            observation = None
        elif self.family.memory == "chat":
            observation = Observation((self._state_turn(),))
        else:
            observation = Observation(self._prompt(), restart=True)
        return Step(
            observation,
            self.family.reward_scale * reward - penalty,
            terminated,
            truncated,
            {
                "parsed": parsed.how,
                "fallback": parsed.fallback,
                "powers": list(parsed.powers),
                "physical_reward": reward,
                "parse_penalty": penalty,
                "energy": info["energy"],
                "comfort": info["comfort"],
                "temperatures": [round(t, 3) for t in info["temperatures"].tolist()],
            },
        )

    def close(self) -> None:
        """End the simulator."""
        self.env.close()
