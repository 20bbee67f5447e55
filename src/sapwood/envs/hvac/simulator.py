"""The building as a Gymnasium environment, `sapwood/Hvac-v0`: temperatures in, heating and cooling power out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.building import (
    Building,
    load_building,
    person_heat,
    thermal,
    zero_order_hold,
)
from sapwood.envs.hvac.weather import Weather, load_weather
from sapwood.errors import ConfigError

Control = Literal["per_zone", "uniform"]
Occupancy = Literal["none", "office_hours", "always"]
Powered = Literal["conditioned", "all"]

ENERGY_SCALE = 24.0
DAYS = 365
OFFICE_HOURS = (8, 18)
#: Initial zone temperatures that a reset accepts [degC].
START_RANGE = (-40.0, 60.0)


@dataclass(frozen=True)
class Physics:
    """What `HvacEnv` precomputes from its options; shared by all environments with the same ones. Read-only.

    a_d [n, n], b_d [n, n + 4]: one step; outdoor, ground, sun [steps of the year], sun in 0..1; powered [n] 0 or 1;
    people: occupants in all; low, high [n]: bounds that no sequence of actions leaves.
    """

    building: Building
    weather: Weather
    time_res: float
    a_d: NDArray[np.float64]
    b_d: NDArray[np.float64]
    outdoor: NDArray[np.float64]
    ground: NDArray[np.float64]
    sun: NDArray[np.float64]
    powered: NDArray[np.float64]
    people: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def steps_per_day(self) -> int:
        """Steps in 24 hours."""
        return len(self.outdoor) // DAYS


@lru_cache(maxsize=32)
def physics(
    building: str | Building,
    climate: str,
    epw: str | None,
    time_res: float,
    max_power: float,
    powered: Powered,
    shgc: float,
    shgc_weight: float,
    ground_weight: float,
) -> Physics:
    """Matrices and weather for these options (see `HvacEnv`). Raises ConfigError or DataError."""
    if time_res <= 0 or 86400 % time_res:
        raise ConfigError(f"time_res {time_res:g}: give seconds that divide a day, such as 300, 900 or 3600.")
    if powered not in get_args(Powered):
        raise ConfigError(f"powered {powered!r}: choose 'conditioned' or 'all'.")
    if max_power <= 0:
        raise ConfigError(f"max_power {max_power:g}: give a positive number of watts.")
    plan = load_building(building) if isinstance(building, str) else building
    weather = load_weather(climate, epw)
    outdoor, ghi, ground = weather.sampled(time_res)
    on = np.ones(len(plan.zones)) if powered == "all" else plan.conditioned.astype(np.float64)
    sun_scale = max(float(weather.ghi.max()), 1.0)
    network = thermal(
        plan,
        max_power=max_power,
        powered=on,
        sun_scale=sun_scale,
        shgc=shgc,
        shgc_weight=shgc_weight,
        ground_weight=ground_weight,
    )
    if np.linalg.eigvals(network.a).real.max() >= -1e-12:
        raise ConfigError(f"building {plan.name!r}: a zone exchanges no heat with outdoors, even through others.")
    a_d, b_d = zero_order_hold(network.a, network.b, time_res)
    low, high = _bounds(network.a, network.b, outdoor, ground)
    return Physics(
        building=plan,
        weather=weather,
        time_res=time_res,
        a_d=a_d,
        b_d=b_d,
        outdoor=outdoor,
        ground=ground,
        sun=ghi / sun_scale,
        powered=on,
        people=sum(zone.people for zone in plan.zones),
        low=low,
        high=high,
    )


def _bounds(
    a: NDArray[np.float64], b: NDArray[np.float64], outdoor: NDArray[np.float64], ground: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steady states [n] under the extremes of every input.

    The network is monotone (off-diagonals of A and all of B are >= 0), so temperatures that start between the two
    stay between them.
    """
    n = a.shape[0]
    lows = [0.0, min(START_RANGE[0], ground.min()), min(START_RANGE[0], outdoor.min()), *[-1.0] * n, 0.0]
    highs = [
        person_heat(START_RANGE[0]),
        max(START_RANGE[1], ground.max()),
        max(START_RANGE[1], outdoor.max()),
        *[1.0] * n,
        1.0,
    ]
    steady = -np.linalg.inv(a) @ b
    return steady @ np.array(lows, np.float64), steady @ np.array(highs, np.float64)


class HvacEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A day (or less) of running a building's heating and cooling.

    Observation [n + 4], float32: zone temperatures 1..n (degC), outdoor temperature (degC), ground temperature
    (degC), horizontal irradiance (share of the year's largest), heat of the people present (kW).
    Action: power of each zone in -1..1 of `max_power` ([n], + heats, - cools; zones that are not powered ignore
    theirs), or with control="uniform" one number [1] for all powered zones.
    Reward of a step from T to T' under the powers a, with norms of order `pnorm`:

        reward_scale * ( -(1 - beta) * 24 * ||a|| - beta * ||T' - target||  over powered zones )

    Options: building (a name or a `Building`); climate, or epw: path of a weather file; control; time_res (s);
    episode_len (steps); max_power (W a zone); beta; pnorm; target (degC); powered: "conditioned" (zones that the
    building's design heats or cools) or "all"; occupancy: "none", "office_hours" (8 to 18 h, every day) or
    "always", of the model's nominal occupants; shgc, shgc_weight, ground_weight: see `building.thermal`;
    reward_scale.

    reset(options=...): "day" 0..364 (default: drawn from the seed), "hour" 0..23 (default 0) and
    "initial_temperature" (a number or [n], degC, default `target`). A time limit is a truncation: an episode never
    terminates. info: "energy" and "comfort" (the two norms), "temperatures" [n], "day", "step".
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own declaration)

    def __init__(
        self,
        building: str | Building = "OfficeSmall",
        climate: str = "Hot_Dry",
        *,
        epw: str | Path | None = None,
        control: Control = "per_zone",
        time_res: float = 300.0,
        episode_len: int = 288,
        max_power: float = 8000.0,
        beta: float = 0.999,
        pnorm: float = 2.0,
        target: float = 22.0,
        powered: Powered = "conditioned",
        occupancy: Occupancy = "none",
        shgc: float = 0.252,
        shgc_weight: float = 0.12,
        ground_weight: float = 0.5,
        reward_scale: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        _check_options(control, occupancy, episode_len, beta, pnorm)
        path = None if epw is None else str(epw)
        self.physics = physics(
            building, climate, path, float(time_res), max_power, powered, shgc, shgc_weight, ground_weight
        )
        self.render_mode = render_mode
        self.control = control
        self.occupancy = occupancy
        self.episode_len = episode_len
        self.beta, self.pnorm, self.target, self.reward_scale = beta, pnorm, target, reward_scale
        self.zones = len(self.physics.building.zones)
        self._powered = self.physics.powered.astype(bool)
        self._all_powered = bool(self._powered.all())
        width = 1 if control == "uniform" else self.zones
        self.action_space = gym.spaces.Box(-1.0, 1.0, (width,), np.float32)
        self.observation_space = self._observation_space()
        # [A_d | B_d], so that a step is one product with [T, u].
        self._step_matrix = np.concatenate([self.physics.a_d, self.physics.b_d], axis=1)
        self._drive = np.zeros(2 * self.zones + 4)  # [T (n), person heat, ground, outdoor, power (n), sun]
        self._step_index = 0
        self._start = 0
        self._occupied = self._schedule()
        self.day = 0

    def _observation_space(self) -> gym.spaces.Space[NDArray[np.float32]]:
        p = self.physics
        # One unit of room: float32 rounding must not put a temperature outside.
        low = [*(p.low - 1.0), p.outdoor.min() - 1.0, p.ground.min() - 1.0, 0.0, 0.0]
        high = [
            *(p.high + 1.0),
            p.outdoor.max() + 1.0,
            p.ground.max() + 1.0,
            1.0,
            p.people * person_heat(START_RANGE[0]) / 1000.0 + 1.0,
        ]
        bounds = np.array([low, high], np.float32)
        return cast(gym.spaces.Space[NDArray[np.float32]], gym.spaces.Box(bounds[0], bounds[1], dtype=np.float32))

    def _schedule(self) -> list[int]:
        """1 where people are present, for each step of a day."""
        hours = np.arange(self.physics.steps_per_day) * self.physics.time_res / 3600.0
        present = {
            "none": np.zeros_like(hours, dtype=bool),
            "always": np.ones_like(hours, dtype=bool),
            "office_hours": (hours >= OFFICE_HOURS[0]) & (hours < OFFICE_HOURS[1]),
        }[self.occupancy]
        return present.astype(int).tolist()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start at the given or a random day. Raises ConfigError for options out of range."""
        super().reset(seed=seed)
        options = options or {}
        unknown = set(options) - {"day", "hour", "initial_temperature"}
        if unknown:
            raise ConfigError(f"reset: unknown option {sorted(unknown)[0]!r}; known: day, hour, initial_temperature.")
        day = options.get("day")
        self.day = int(self.np_random.integers(DAYS)) if day is None else int(day)
        hour = float(options.get("hour", 0.0))
        if not 0 <= self.day < DAYS or not 0 <= hour < 24:
            raise ConfigError(f"reset: day {self.day}, hour {hour:g}; give day 0..{DAYS - 1} and hour 0..23.")
        start = np.asarray(options.get("initial_temperature", self.target), dtype=np.float64)
        if start.shape not in ((), (1,), (self.zones,)) or not np.all(
            (start >= START_RANGE[0]) & (start <= START_RANGE[1])
        ):
            raise ConfigError(
                f"reset: initial_temperature is a number or {self.zones} numbers in "
                f"{START_RANGE[0]:g}..{START_RANGE[1]:g} degC."
            )
        self._drive[:] = 0.0
        self._drive[: self.zones] = start
        self._step_index = 0
        self._start = int(self.day * self.physics.steps_per_day + hour * 3600.0 // self.physics.time_res)
        return self._observe(), {"temperatures": self.temperatures, "day": self.day, "step": 0}

    @property
    def temperatures(self) -> NDArray[np.float64]:
        """Zone temperatures [n], degC (a copy)."""
        return self._drive[: self.zones].copy()

    @property
    def time(self) -> int:
        """Index of the current step in the year."""
        return (self._start + self._step_index) % len(self.physics.outdoor)

    @property
    def hour(self) -> float:
        """Hour of the day, 0 to 24."""
        return self.time % self.physics.steps_per_day * self.physics.time_res / 3600.0

    @property
    def people_present(self) -> float:
        """People in the building in the current step."""
        occupied = self._occupied[self.time % self.physics.steps_per_day]
        return self.physics.people * occupied

    @property
    def observation(self) -> NDArray[np.float32]:
        """The observation [n + 4] of the state that the building is in; what `reset` or `step` gave last."""
        return self._observe()

    def _observe(self) -> NDArray[np.float32]:
        """The observation at the current time; also sets the inputs that hold over the next step."""
        p, n, time, drive = self.physics, self.zones, self.time, self._drive
        drive[n + 1] = p.ground[time]
        drive[n + 2] = p.outdoor[time]
        drive[2 * n + 3] = p.sun[time]
        observation = np.empty(n + 4, np.float32)
        observation[:n] = drive[:n]
        observation[n] = drive[n + 2]
        observation[n + 1] = drive[n + 1]
        observation[n + 2] = drive[2 * n + 3]
        drive[n] = person_heat(float(drive[:n].mean())) if self._occupied[time % p.steps_per_day] else 0.0
        observation[n + 3] = p.people * drive[n] / 1000.0
        return observation

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One time step. Actions outside -1..1 are clipped."""
        n, drive = self.zones, self._drive
        power = drive[n + 3 : 2 * n + 3]
        if self.control == "uniform":
            np.multiply(self.physics.powered, min(max(float(action[0]), -1.0), 1.0), out=power)
        else:
            np.clip(action, -1.0, 1.0, out=power)
            np.multiply(power, self.physics.powered, out=power)
        temperatures = self._step_matrix @ drive
        energy = self._norm(power)
        drive[:n] = temperatures
        error = temperatures - self.target
        comfort = self._norm(error if self._all_powered else error[self._powered])
        reward = -self.reward_scale * ((1.0 - self.beta) * ENERGY_SCALE * energy + self.beta * comfort)
        self._step_index += 1
        info = {
            "energy": energy,
            "comfort": comfort,
            "temperatures": temperatures,
            "day": self.day,
            "step": self._step_index,
        }
        return self._observe(), reward, False, self._step_index >= self.episode_len, info

    def _norm(self, x: NDArray[np.float64]) -> float:
        if self.pnorm == 2.0:
            return float(np.dot(x, x)) ** 0.5
        return float(np.linalg.norm(x, ord=self.pnorm))

    def response(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The next temperatures as an affine function of the action: (free [n], gain [n, width of the action]).

        T' = free + gain @ action, for actions in -1..1.
        """
        n = self.zones
        matrix = self._step_matrix
        drive = self._drive.copy()
        drive[n + 3 : 2 * n + 3] = 0.0
        gain = matrix[:, n + 3 : 2 * n + 3] * self.physics.powered
        return matrix @ drive, gain.sum(axis=1, keepdims=True) if self.control == "uniform" else gain


def _check_options(control: str, occupancy: str, episode_len: int, beta: float, pnorm: float) -> None:
    checks: Mapping[str, tuple[bool, str]] = {
        "control": (control in get_args(Control), f"{control!r}; choose 'per_zone' or 'uniform'"),
        "occupancy": (occupancy in get_args(Occupancy), f"{occupancy!r}; choose {', '.join(get_args(Occupancy))}"),
        "episode_len": (episode_len >= 1, f"{episode_len}; give at least 1 step"),
        "beta": (0.0 <= beta <= 1.0, f"{beta:g}; give a weight in 0..1"),
        "pnorm": (pnorm >= 1.0, f"{pnorm:g}; give a norm of order 1 or more"),
    }
    for name, (fine, problem) in checks.items():
        if not fine:
            raise ConfigError(f"hvac: {name} is {problem}.")
