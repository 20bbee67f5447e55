"""The building as a Gymnasium environment, `sapwood/Hvac-v0`: temperatures in, heating and cooling power out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.building import Building, person_heat
from sapwood.envs.hvac.occupancy import occupancy_profiles
from sapwood.envs.hvac.physics import DAYS, START_RANGE, Powered, ThermalMass, physics
from sapwood.errors import ConfigError

Control = Literal["per_zone", "uniform"]
Occupancy = Literal["none", "office_hours", "always", "schedule"]
#: Targets by hour: (hour from which it holds, target in degC), hours rising.
Setback = tuple[tuple[float, float], ...]

#: What follows the zones in an observation.
WEATHER_NAMES = ("outdoor temperature", "ground temperature", "irradiance", "people heat")
ENERGY_SCALE = 24.0
OFFICE_HOURS = (8, 18)


class HvacEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A day (or less) of running a building's heating and cooling.

    Observation [n + 4], float32: zone temperatures 1..n (degC), outdoor temperature (degC), ground temperature
    (degC), horizontal irradiance (share of the year's largest), heat of the people present (kW).
    Action: power of each zone in -1..1 of `max_power` ([n], + heats, - cools; zones that are not powered ignore
    theirs), or with control="uniform" one number [1] for all powered zones.
    Reward of a step from T to T' under the powers a, with norms of order `pnorm`:

        reward_scale * ( -(1 - beta) * 24 * ||a|| - beta * ||T' - target||  over powered zones
                         - price_weight * price * kWh )

    with the target and the price of the hour in which the step begins. Options: building (a name or a `Building`);
    climate, or epw: path of a weather file; control; time_res (s); episode_len (steps); max_power (W a zone); beta;
    pnorm; target (degC); setback: {hour: target, ...}, from each hour on until the next, `target` before the first;
    price: None, a number, or 24 by hour, paid per kWh of heat or cold (sum |a| * max_power * time) in the unit of
    `price_weight`; powered: "conditioned" (zones that the building's design heats or cools) or "all"; occupancy:
    "none", or of the model's nominal occupants "office_hours" (8 to 18 h, every day), "always", or "schedule" (the
    model's own, by zone, hour and day of the week); thermal_mass, mass_coupling, shgc, shgc_weight, ground_weight:
    see `building.thermal`, thermal_mass="fitted" is both masses fitted to EnergyPlus; reward_scale.

    With a setback the observation ends with the target (degC), and with 24 prices with the price (after the target).

    reset(options=...): "day" 0..364 (default: drawn from the seed), "hour" 0..23 (default 0) and
    "initial_temperature" (a number or [n], degC, default: the target of that hour). A time limit is a truncation: an
    episode never terminates. info: "energy" and "comfort" (the two norms), "temperatures" [n], "day", "step", and
    with a price "kwh" and "cost" of the step.
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
        setback: Mapping[float, float] | Setback = (),
        price: float | Sequence[float] | None = None,
        price_weight: float = 1.0,
        powered: Powered = "conditioned",
        occupancy: Occupancy = "none",
        shgc: float = 0.252,
        shgc_weight: float = 0.12,
        ground_weight: float = 0.5,
        thermal_mass: ThermalMass = 1.0,
        mass_coupling: float | None = None,
        reward_scale: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        _check_options(control, occupancy, episode_len, beta, pnorm)
        if not 0.0 <= price_weight < float("inf") or (price is None and price_weight != 1.0):
            raise ConfigError(
                f"hvac: price_weight {price_weight:g}; give the weight (0 or more) of a price, which is "
                f"{'not given' if price is None else 'given'}."
            )
        path = None if epw is None else str(epw)
        self.physics = physics(
            building,
            climate,
            path,
            float(time_res),
            max_power,
            powered,
            shgc,
            shgc_weight,
            ground_weight,
            thermal_mass,
            mass_coupling,
        )
        self.render_mode = render_mode
        self.control = control
        self.occupancy = occupancy
        self.episode_len = episode_len
        self.max_power = max_power
        self.beta, self.pnorm, self.target, self.reward_scale = beta, pnorm, target, reward_scale
        self._targets = self._by_hour(targets_by_hour(target, setback)) if setback else None
        prices = None if price is None else prices_by_hour(price)
        self.price: float | None = None if prices is None else prices[0]
        self._prices = self._by_hour(prices) if prices is not None and len(set(prices)) > 1 else None
        self.price_weight = price_weight
        self._kwh = max_power * time_res / 3.6e6  # of one zone at full power for a step
        self.zones = len(self.physics.building.zones)
        self._powered = self.physics.powered.astype(bool)
        self._all_powered = bool(self._powered.all())
        width = 1 if control == "uniform" else self.zones
        self.action_space = gym.spaces.Box(-1.0, 1.0, (width,), np.float32)
        self.observation_space = self._observation_space()
        self._width = len(self.observation_names)
        # [A_d | B_d], so that a step is one product with [T, u].
        a_d, n = self.physics.a_d, self.zones
        self._step_matrix = np.concatenate([a_d[:, :n], self.physics.b_d, a_d[:, n:]], axis=1)
        # [T (n), person heat, ground, outdoor, power (n), sun, T of the masses (n) where they have one]
        self._drive = np.zeros(self._step_matrix.shape[1])
        self._masses = len(a_d) > n
        self._step_index = 0
        self._start = 0
        self._occupied = self._schedule()
        self._profile, self._shares, self._columns = self._profiles()
        self._people = np.zeros(0)  # K by the people of the schedule in this step
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
        for extra in (self._targets, self._prices):
            if extra is not None:
                low.append(min(extra))
                high.append(max(extra))
        bounds = np.array([low, high], np.float32)
        return cast(gym.spaces.Space[NDArray[np.float32]], gym.spaces.Box(bounds[0], bounds[1], dtype=np.float32))

    def _schedule(self) -> list[int]:
        """1 where people are present, for each step of a day."""
        hours = np.arange(self.physics.steps_per_day) * self.physics.time_res / 3600.0
        present = {
            "none": np.zeros_like(hours, dtype=bool),
            "always": np.ones_like(hours, dtype=bool),
            "schedule": np.ones_like(hours, dtype=bool),
            "office_hours": (hours >= OFFICE_HOURS[0]) & (hours < OFFICE_HOURS[1]),
        }[self.occupancy]
        return present.astype(int).tolist()

    def _by_hour(self, values: Sequence[float]) -> list[float]:
        """24 values as those of each step of a day."""
        p = self.physics
        return [values[int(step * p.time_res // 3600)] for step in range(p.steps_per_day)]

    def _profiles(self) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
        """Of occupancy "schedule": the profile of each hour of the year; of each profile the people by zone [k, n],
        and the warming [k, s] by a step in which each of them gives 1 W. Empty otherwise.
        """
        if self.occupancy != "schedule":
            return [], np.zeros((0, self.zones)), np.zeros((0, self.zones))
        profiles, of_hour = occupancy_profiles(self.physics.building)
        present = profiles * np.array([zone.people for zone in self.physics.building.zones])
        return of_hour.tolist(), present, present @ self.physics.warming.T

    @property
    def observation_names(self) -> list[str]:
        """What each number of an observation is."""
        names = [*(zone.name for zone in self.physics.building.zones), *WEATHER_NAMES]
        if self._targets is not None:
            names.append("target")
        return names if self._prices is None else [*names, "price"]

    def target_at(self, hour: float) -> float:
        """The target [degC] of a step that begins at an hour of the day, 0 to 24."""
        p = self.physics
        return self.target if self._targets is None else self._targets[int(hour * 3600.0 // p.time_res)]

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
        start = np.asarray(options.get("initial_temperature", self.target_at(hour)), dtype=np.float64)
        if start.shape not in ((), (1,), (self.zones,)) or not np.all(
            (start >= START_RANGE[0]) & (start <= START_RANGE[1])
        ):
            raise ConfigError(
                f"reset: initial_temperature is a number or {self.zones} numbers in "
                f"{START_RANGE[0]:g}..{START_RANGE[1]:g} degC."
            )
        self._drive[:] = 0.0
        self._drive[: self.zones] = start
        if self._masses:
            self._drive[2 * self.zones + 4 :] = start
        self._step_index = 0
        self._start = int(self.day * self.physics.steps_per_day + hour * 3600.0 // self.physics.time_res)
        self._begin()
        return self._observe(), {"temperatures": self.temperatures, "day": self.day, "step": 0}

    def _begin(self) -> None:
        """Called by `reset` once day, hour and initial temperatures are set, before the first observation."""

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
        if self._profile:
            return float(self._shares[self._profile_index].sum())
        occupied = self._occupied[self.time % self.physics.steps_per_day]
        return self.physics.people * occupied

    @property
    def observation(self) -> NDArray[np.float32]:
        """The observation [n + 4] of the state that the building is in; what `reset` or `step` gave last."""
        return self._observe()

    @property
    def _profile_index(self) -> int:
        return self._profile[int(self.time * self.physics.time_res // 3600)]

    @property
    def people_heat(self) -> NDArray[np.float64]:
        """Heat of the people in each zone in the current step [n], W."""
        if self._profile:
            return self._shares[self._profile_index] * person_heat(float(self._drive[: self.zones].mean()))
        return np.array([zone.people for zone in self.physics.building.zones]) * self._drive[self.zones]

    @property
    def outdoor(self) -> float:
        """Outdoor temperature of the current step, degC."""
        return float(self._drive[self.zones + 2])

    @property
    def ground(self) -> float:
        """Ground temperature of the current step, degC."""
        return float(self._drive[self.zones + 1])

    @property
    def sun(self) -> float:
        """Irradiance of the current step as a share of the year's largest."""
        return float(self._drive[2 * self.zones + 3])

    @property
    def has_setback(self) -> bool:
        """The target depends on the hour."""
        return self._targets is not None

    @property
    def unit_cost(self) -> float:
        """Loss of a zone at full power for a step at the price of the hour; 0 without a price."""
        return 0.0 if self.price is None else self.price_weight * self.price * self._kwh

    @property
    def has_prices(self) -> bool:
        """The price depends on the hour."""
        return self._prices is not None

    def _observe(self) -> NDArray[np.float32]:
        """The observation at the current time; also sets the inputs that hold over the next step."""
        p, n, time, drive = self.physics, self.zones, self.time, self._drive
        drive[n + 1] = p.ground[time]
        drive[n + 2] = p.outdoor[time]
        drive[2 * n + 3] = p.sun[time]
        observation = np.empty(self._width, np.float32)
        observation[:n] = drive[:n]
        observation[n] = drive[n + 2]
        observation[n + 1] = drive[n + 1]
        observation[n + 2] = drive[2 * n + 3]
        if self._profile:
            self._observe_people(observation)
        else:
            drive[n] = person_heat(float(drive[:n].mean())) if self._occupied[time % p.steps_per_day] else 0.0
            observation[n + 3] = p.people * drive[n] / 1000.0
        if self._width > n + 4:
            self._observe_hour(observation, time % p.steps_per_day)
        return observation

    def _observe_people(self, observation: NDArray[np.float32]) -> None:
        """People by zone: a warming of their own instead of the input that all zones share."""
        n = self.zones
        heat = person_heat(float(self._drive[:n].mean()))
        index = self._profile_index
        self._people = self._columns[index] * heat
        observation[n + 3] = self._shares[index].sum() * heat / 1000.0

    def _observe_hour(self, observation: NDArray[np.float32], step_of_day: int) -> None:
        place = self.zones + 4
        if self._targets is not None:
            observation[place] = self.target = self._targets[step_of_day]
            place += 1
        if self._prices is not None:
            observation[place] = self.price = self._prices[step_of_day]

    def _advance(self) -> NDArray[np.float64]:
        """The temperatures [n] at the end of the step that the inputs describe."""
        temperatures = self._step_matrix @ self._drive
        if self._profile:
            temperatures += self._people
        if self._masses:
            self._drive[2 * self.zones + 4 :] = temperatures[self.zones :]
            return temperatures[: self.zones]
        return temperatures

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One time step. Actions outside -1..1 are clipped."""
        n, drive = self.zones, self._drive
        power = drive[n + 3 : 2 * n + 3]
        if self.control == "uniform":
            np.multiply(self.physics.powered, min(max(float(action[0]), -1.0), 1.0), out=power)
        else:
            np.maximum(action, -1.0, out=power)
            np.minimum(power, 1.0, out=power)
            np.multiply(power, self.physics.powered, out=power)
        temperatures = self._advance()
        energy = self._norm(power)
        drive[:n] = temperatures
        error = temperatures - self.target
        comfort = self._norm(error if self._all_powered else error[self._powered])
        loss = (1.0 - self.beta) * ENERGY_SCALE * energy + self.beta * comfort
        paid = self._paid(power) if self.price is not None else {}
        if paid:
            loss += self.price_weight * paid["cost"]
        reward = -self.reward_scale * loss
        self._step_index += 1
        info = {
            "energy": energy,
            "comfort": comfort,
            "temperatures": temperatures,
            "day": self.day,
            "step": self._step_index,
            **paid,
        }
        return self._observe(), reward, False, self._step_index >= self.episode_len, info

    def _paid(self, power: NDArray[np.float64]) -> dict[str, float]:
        """Energy of a step and what it costs at the price of its hour."""
        assert self.price is not None
        kwh = float(np.abs(power).sum()) * self._kwh
        return {"kwh": kwh, "cost": self.price * kwh}

    def _norm(self, x: NDArray[np.float64]) -> float:
        if self.pnorm == 2.0:
            return float(np.dot(x, x)) ** 0.5
        return float(np.linalg.norm(x, ord=self.pnorm))

    def response(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The next temperatures as an affine function of the action: (free [n], gain [n, width of the action]).

        T' = free + gain @ action, for actions in -1..1.
        """
        n = self.zones
        matrix = self._step_matrix[:n]
        drive = self._drive.copy()
        drive[n + 3 : 2 * n + 3] = 0.0
        gain = matrix[:, n + 3 : 2 * n + 3] * self.physics.powered
        free = matrix @ drive
        if self._profile:
            free += self._people[:n]
        return free, gain.sum(axis=1, keepdims=True) if self.control == "uniform" else gain

    def fork(self) -> HvacEnv:
        """An environment of its own in the same state: what it does next doesn't change this one."""
        twin = copy.copy(self)
        twin._drive = self._drive.copy()
        if self._np_random is not None:
            twin._np_random = copy.deepcopy(self._np_random)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> HvacEnv:
        return self.fork()


def targets_by_hour(target: float, setback: Mapping[float, float] | Setback) -> list[float]:
    """[24] the target of each hour. Raises ConfigError for hours or targets that can't be meant."""
    pairs = sorted(setback.items()) if isinstance(setback, Mapping) else list(setback)
    targets = [target] * 24
    last = -1
    for hour, value in pairs:
        if not 0 <= hour <= 23 or hour != int(hour):
            raise ConfigError(f"hvac: setback from hour {hour:g}; give whole hours in 0..23.")
        if hour <= last:
            raise ConfigError(f"hvac: setback hour {hour:g} comes after hour {last:g}; give each hour once, rising.")
        if not START_RANGE[0] <= value <= START_RANGE[1]:
            raise ConfigError(
                f"hvac: setback target {value:g} from hour {hour:g}; give {START_RANGE[0]:g}..{START_RANGE[1]:g} degC."
            )
        last = int(hour)
        targets[last:] = [float(value)] * (24 - last)
    return targets


def prices_by_hour(price: float | Sequence[float]) -> list[float]:
    """[24] the price of each hour. Raises ConfigError for a list of another length or prices that are no numbers."""
    prices = [float(price)] * 24 if isinstance(price, int | float) else [float(p) for p in price]
    if len(prices) != 24:
        raise ConfigError(f"hvac: price has {len(prices)} numbers; give one, or 24, the first from midnight to 1.")
    for hour, value in enumerate(prices):
        if not abs(value) < float("inf"):
            raise ConfigError(f"hvac: the price of hour {hour} is {value:g}; give a finite number per kWh.")
    return prices


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
