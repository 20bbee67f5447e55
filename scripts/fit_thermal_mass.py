"""Fit `thermal_mass` and `mass_coupling` of the RC model to EnergyPlus: src/sapwood/envs/hvac/data/thermal_mass.json.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/fit_thermal_mass.py [BUILDING ...]     (about 10 minutes for all)

EnergyPlus simulates days of the building from 22 degC in steps of 300 s: left alone, and under powers that change at
random every half hour (within 60 %). The RC model is driven by the same powers and its own weather; the two numbers
minimise the root mean square error of the conditioned zones' temperatures, mean of the two kinds of day. Fitted on
days 15 and 200 in Hot_Dry and Cool_Dry; benchmarks/rc_vs_energyplus.py measures on other days and in other climates.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from sapwood.envs.hvac.building import BUILDINGS, DATA, load_building, thermal, zero_order_hold
from sapwood.envs.hvac.energyplus import EnergyPlusEnv
from sapwood.envs.hvac.simulator import HvacEnv

CLIMATES, DAYS, STEPS, TIME_RES = ("Hot_Dry", "Cool_Dry"), (15, 200), 288, 300
LARGEST = 1000.0


@dataclass(frozen=True)
class Days:
    """Days of a climate: inputs [STEPS, n + 4, days] of the RC model, and EnergyPlus' temperatures [STEPS, n, days]."""

    sun_scale: float
    inputs: np.ndarray
    temperatures: np.ndarray
    free: np.ndarray  # [days] the building was left alone


def simulate(building: str, climate: str) -> Days:
    """Run the days in EnergyPlus."""
    rng = np.random.default_rng(0)
    inputs, temperatures, free = [], [], []
    env = EnergyPlusEnv(building, climate, time_res=TIME_RES, episode_len=STEPS, thermal_mass=1.0)
    p, n = env.physics, env.zones
    for day in DAYS:
        for alone in (True, False):
            env.reset(options={"day": day})
            power = np.zeros(n)
            for step in range(STEPS):
                if not alone and step % 6 == 0:
                    power = rng.uniform(-0.6, 0.6, n) * p.powered
                time = day * p.steps_per_day + step
                inputs.append([0.0, p.ground[time], p.outdoor[time], *power, p.sun[time]])
                temperatures.append(env.step(power.astype(np.float32))[4]["temperatures"])
            free.append(alone)
    env.close()

    def by_step(rows: list) -> np.ndarray:
        return np.array(rows).reshape(len(free), STEPS, -1).transpose(1, 2, 0)

    sun_scale = max(float(p.weather.ghi.max()), 1.0)
    return Days(sun_scale, by_step(inputs), by_step(temperatures), np.array(free))


def error(building: str, days: list[Days], mass: float, coupling: float | None) -> float:
    """Root mean square error [K], mean of free and driven days."""
    plan, powered = load_building(building), HvacEnv(building).physics.powered
    n, on = len(plan.zones), powered.astype(bool)
    squares: dict[bool, list[float]] = {True: [], False: []}
    for part in days:
        network = thermal(
            plan, max_power=8000.0, powered=powered, sun_scale=part.sun_scale, thermal_mass=mass, mass_coupling=coupling
        )
        a_d, b_d = zero_order_hold(network.a, network.b, TIME_RES)
        state = np.full((len(network.a), part.free.size), 22.0)
        total = np.zeros(part.free.size)
        for step in range(STEPS):
            state = a_d @ state + b_d @ part.inputs[step]
            total += ((state[:n] - part.temperatures[step])[on] ** 2).mean(axis=0) / STEPS
        for free, square in zip(part.free, total, strict=True):
            squares[bool(free)].append(float(square))
    return float(np.mean([np.mean(kind) ** 0.5 for kind in squares.values()]))


def fit(building: str) -> dict[str, float]:
    """The record of one building: the two numbers, and the errors with them, without, and with one temperature."""
    days = [simulate(building, climate) for climate in CLIMATES]

    def separate(x: np.ndarray) -> float:
        return error(building, days, min(1.0 + np.exp(x[0]), LARGEST), np.exp(x[1]))

    def together(x: np.ndarray) -> float:
        return error(building, days, min(np.exp(x[0]), LARGEST), None)

    options = {"maxfev": 45, "xatol": 0.02, "fatol": 0.005}
    two = minimize(separate, np.log([80.0, 6.0]), method="Nelder-Mead", options=options)
    one = minimize(together, np.log([16.0]), method="Nelder-Mead", options={**options, "maxfev": 20})
    return {
        "thermal_mass": round(float(min(1.0 + np.exp(two.x[0]), LARGEST)), 1),
        "mass_coupling": round(float(np.exp(two.x[1])), 2),
        "error": round(float(two.fun), 2),
        "error_air_only": round(error(building, days, 1.0, None), 2),
        "one_temperature": round(float(min(np.exp(one.x[0]), LARGEST)), 1),
        "error_one_temperature": round(float(one.fun), 2),
    }


def main() -> None:
    """Fit the buildings named, and write their records beside those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("buildings", nargs="*", metavar="BUILDING", help="default: all")
    path = DATA / "thermal_mass.json"
    for name in parser.parse_args().buildings or BUILDINGS:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        records[name] = fit(name)
        print(name, records[name], flush=True)
        lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(records[k])}" for k in BUILDINGS if k in records)
        path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
