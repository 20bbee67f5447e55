"""Errors of the RC model against EnergyPlus: prints tables and writes benchmarks/results/rc_vs_energyplus.json.

    OMP_NUM_THREADS=1 python benchmarks/rc_vs_energyplus.py [--building OfficeSmall] [--tiny]

A day in winter and one in summer in each of the nine climates, in steps of 300 s from 22 degC at midnight, everything
else at the defaults of HvacEnv. Errors are RC model less EnergyPlus, over the conditioned zones and the day:

    free        no power
    replayed    the RC model is given the powers with which the proportional controller ran EnergyPlus
    controlled  each is run by the proportional controller, with the gain of its own RC model; energy is the sum of
                |power| over zones and time

Models: "air only" (thermal_mass 1, the default), "one temperature" (the air's heat capacity times the number fitted
for that), "fitted" (thermal_mass: fitted, a mass of its own in every zone). Their numbers were fitted on other days,
in two of the climates, by scripts/fit_thermal_mass.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from _harness import RESULTS, machine

from sapwood.envs.hvac import CLIMATES, HvacEnv
from sapwood.envs.hvac.building import DATA
from sapwood.envs.hvac.controllers import proportional
from sapwood.envs.hvac.energyplus import EnergyPlusEnv

SEASONS = {"winter": 24, "summer": 206}
STEPS, TIME_RES = 288, 300

Power = Callable[[HvacEnv, int], np.ndarray]


def day(env: HvacEnv, first: int, power: Power) -> tuple[np.ndarray, np.ndarray]:
    """Temperatures of the conditioned zones and powers, [STEPS, zones] each."""
    on = env.physics.powered.astype(bool)
    env.reset(options={"day": first})
    temperatures, powers = [], []
    for step in range(STEPS):
        action = power(env, step)
        temperatures.append(env.step(action.astype(np.float32))[4]["temperatures"][on])
        powers.append(action)
    return np.array(temperatures), np.array(powers)


def energy(env: HvacEnv, powers: np.ndarray) -> dict[str, float]:
    """Heat and cold of a day, kWh."""
    kwh = powers * env.max_power * TIME_RES / 3.6e6
    return {"heating_kwh": round(float(kwh[kwh > 0].sum()), 2), "cooling_kwh": round(float(-kwh[kwh < 0].sum()), 2)}


def errors(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean and root mean square error, K."""
    difference = found - truth
    return {"mean_k": round(float(difference.mean()), 3), "rmse_k": round(float((difference**2).mean() ** 0.5), 3)}


def off(env: HvacEnv, step: int) -> np.ndarray:
    return np.zeros(env.zones)


def controlled(env: HvacEnv, step: int) -> np.ndarray:
    return proportional(env)


def case(building: str, climate: str, first: int, models: dict[str, Any]) -> dict[str, Any]:
    """Errors of every model on one day."""
    options: dict[str, Any] = {"time_res": TIME_RES, "episode_len": STEPS}
    truth = EnergyPlusEnv(building, climate, **options)
    free, _ = day(truth, first, off)
    run, powers = day(truth, first, controlled)
    truth.close()
    known = {"energyplus": {"mean_k": round(float(run.mean()), 3), **energy(truth, powers)}}
    for name, mass in models.items():
        env = HvacEnv(building, climate, thermal_mass=mass, **options)
        replayed, _ = day(env, first, lambda env, step: powers[step])
        own, own_powers = day(env, first, controlled)
        known[name] = {
            "free": errors(day(env, first, off)[0], free),
            "replayed": errors(replayed, run),
            "controlled": {**errors(own, run), **energy(env, own_powers)},
        }
    return known


def table(cases: list[dict[str, Any]], models: dict[str, Any]) -> str:
    """Means over the climates, as Markdown."""
    head = (
        "| season | model | free: mean, RMSE (K) | replayed: mean, RMSE (K) | controlled: mean, RMSE (K) "
        "| heating, cooling (kWh) |\n|---|---|---|---|---|---|"
    )
    lines = [head]
    for season in SEASONS:
        chosen = [c["errors"] for c in cases if c["season"] == season]

        def over(*path: str, chosen: list[dict[str, Any]] = chosen) -> float:
            values = []
            for item in chosen:
                for key in path:
                    item = item[key]
                values.append(item)
            mean = np.mean(np.square(values)) ** 0.5 if path[-1] == "rmse_k" else np.mean(values)
            return float(mean)

        heat, cold = over("energyplus", "heating_kwh"), over("energyplus", "cooling_kwh")
        lines.append(f"| {season} | EnergyPlus | | | | {heat:.0f}, {cold:.0f} |")
        for name in models:
            pairs = [
                f"{over(name, kind, 'mean_k'):+.2f}, {over(name, kind, 'rmse_k'):.2f}"
                for kind in ("free", "replayed", "controlled")
            ]
            kwh = f"{over(name, 'controlled', 'heating_kwh'):.0f}, {over(name, 'controlled', 'cooling_kwh'):.0f}"
            lines.append(f"| {season} | {name} | {' | '.join(pairs)} | {kwh} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--building", default="OfficeSmall")
    parser.add_argument("--tiny", action="store_true", help="one climate; writes nothing")
    arguments = parser.parse_args()
    fitted = json.loads((DATA / "thermal_mass.json").read_text(encoding="utf-8"))[arguments.building]
    models = {"air only": 1.0, "one temperature": fitted["one_temperature"], "fitted": "fitted"}
    cases = []
    for climate in list(CLIMATES)[:1] if arguments.tiny else CLIMATES:
        for season, first in SEASONS.items():
            found = case(arguments.building, climate, first, models)
            cases.append({"climate": climate, "season": season, "day": first, "errors": found})
            print(climate, season, {name: found[name]["free"]["rmse_k"] for name in models}, flush=True)
    print(table(cases, models))
    if arguments.tiny:
        return
    name = "rc_vs_energyplus" + ("" if arguments.building == "OfficeSmall" else f"_{arguments.building}")
    record = {"building": arguments.building, "fitted": fitted, "cases": cases, "machine": machine(1)}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
