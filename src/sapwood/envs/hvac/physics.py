"""What a building's environments precompute from their options: matrices of a step, weather, bounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.building import (
    Building,
    fitted_thermal_mass,
    load_building,
    person_heat,
    thermal,
    zero_order_hold,
)
from sapwood.envs.hvac.weather import Weather, load_weather
from sapwood.errors import ConfigError

Powered = Literal["conditioned", "all"]
ThermalMass = float | Literal["fitted"]

DAYS = 365
#: Initial zone temperatures that a reset accepts [degC].
START_RANGE = (-40.0, 60.0)


@dataclass(frozen=True)
class Physics:
    """What `HvacEnv` precomputes from its options; shared by all environments with the same ones. Read-only.

    a_d [s, s], b_d [s, n + 4]: one step, where s = n, or 2n with masses of their own; warming [s, n]: K by a step of
    1 W in zone j; outdoor, ground,
    sun [steps of the year], sun in 0..1; powered [n] 0 or 1; people: occupants in all; low, high [n]: bounds that no
    sequence of actions leaves.
    """

    building: Building
    weather: Weather
    time_res: float
    a_d: NDArray[np.float64]
    b_d: NDArray[np.float64]
    warming: NDArray[np.float64]
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
    thermal_mass: ThermalMass = 1.0,
    mass_coupling: float | None = None,
) -> Physics:
    """Matrices and weather for these options (see `HvacEnv`). Raises ConfigError or DataError."""
    if time_res <= 0 or 86400 % time_res:
        raise ConfigError(f"time_res {time_res:g}: give seconds that divide a day, such as 300, 900 or 3600.")
    if powered not in get_args(Powered):
        raise ConfigError(f"powered {powered!r}: choose 'conditioned' or 'all'.")
    if max_power <= 0:
        raise ConfigError(f"max_power {max_power:g}: give a positive number of watts.")
    plan = load_building(building) if isinstance(building, str) else building
    mass, coupling = _mass(plan.name, thermal_mass, mass_coupling)
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
        thermal_mass=mass,
        mass_coupling=coupling,
    )
    if np.linalg.eigvals(network.a).real.max() >= -1e-12:
        raise ConfigError(f"building {plan.name!r}: a zone exchanges no heat with outdoors, even through others.")
    a_d, b_d = zero_order_hold(network.a, network.b, time_res)
    capacity = np.array([zone.capacity for zone in plan.zones]) * (mass if coupling is None else 1.0)
    watt = np.eye(len(network.a), len(capacity)) / capacity
    warming = zero_order_hold(network.a, watt, time_res)[1]
    low, high = _bounds(network.a, network.b, outdoor, ground)
    return Physics(
        building=plan,
        weather=weather,
        time_res=time_res,
        a_d=a_d,
        b_d=b_d,
        warming=warming,
        outdoor=outdoor,
        ground=ground,
        sun=ghi / sun_scale,
        powered=on,
        people=sum(zone.people for zone in plan.zones),
        low=low,
        high=high,
    )


def _mass(building: str, thermal_mass: ThermalMass, mass_coupling: float | None) -> tuple[float, float | None]:
    """The numbers that the two options stand for. Raises ConfigError for numbers that can't be meant."""
    if isinstance(thermal_mass, str):
        if thermal_mass != "fitted" or mass_coupling is not None:
            raise ConfigError(
                f"thermal_mass {thermal_mass!r}, mass_coupling {mass_coupling}: 'fitted' stands for both; else give "
                "a number."
            )
        return fitted_thermal_mass(building)
    if not 0.1 <= thermal_mass <= 1000.0:
        raise ConfigError(
            f"thermal_mass {thermal_mass:g}: give a multiple of the air's heat capacity in 0.1..1000, or 'fitted'."
        )
    if mass_coupling is not None and (thermal_mass <= 1.0 or not 0.0 < mass_coupling <= 1000.0):
        raise ConfigError(
            f"mass_coupling {mass_coupling:g} with thermal_mass {thermal_mass:g}: give W/K per m2 of floor in 0..1000, "
            "and a thermal_mass above 1."
        )
    return thermal_mass, mass_coupling


def _bounds(
    a: NDArray[np.float64], b: NDArray[np.float64], outdoor: NDArray[np.float64], ground: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steady states of the n zones under the extremes of every input.

    The network is monotone (off-diagonals of A and all of B are >= 0), so temperatures that start between the two
    stay between them.
    """
    n = b.shape[1] - 4
    lows = [0.0, min(START_RANGE[0], ground.min()), min(START_RANGE[0], outdoor.min()), *[-1.0] * n, 0.0]
    highs = [
        person_heat(START_RANGE[0]),
        max(START_RANGE[1], ground.max()),
        max(START_RANGE[1], outdoor.max()),
        *[1.0] * n,
        1.0,
    ]
    steady = (-np.linalg.inv(a) @ b)[:n]
    return steady @ np.array(lows, np.float64), steady @ np.array(highs, np.float64)
