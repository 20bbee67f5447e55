"""Steps per second of the HVAC simulator: prints a table and writes benchmarks/results/hvac_steps.json.

    OMP_NUM_THREADS=1 python benchmarks/hvac_steps.py

One process, random actions, resets included; the median of five runs of 20,000 steps.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from sapwood.envs.hvac import HvacEnv

STEPS, RUNS = 20_000, 5
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("hvac_steps", "OfficeSmall", {}),
    ("hvac_steps_uniform", "OfficeSmall", {"control": "uniform", "time_res": 3600.0, "episode_len": 24}),
    ("hvac_steps_occupied", "OfficeSmall", {"occupancy": "office_hours"}),
    ("hvac_steps_118_zones", "OutPatientHealthCare", {}),
)


def steps_per_second(env: HvacEnv) -> float:
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(64)]
    rates = []
    for run in range(RUNS):
        env.reset(seed=run)
        start = time.perf_counter()
        for index in range(STEPS):
            if env.step(actions[index % 64])[3]:
                env.reset()
        rates.append(STEPS / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}, 1 thread"
    rows = []
    print(f"{'name':24} {'shape':44} {'steps/s':>10}")
    for name, building, options in CASES:
        env = HvacEnv(building, **options)
        rate = steps_per_second(env)
        shape = f"{building}, {env.zones} zones, {env.control}"
        print(f"{name:24} {shape:44} {rate:10,.0f}")
        rows.append(
            {"name": name, "ours": round(rate), "peer": None, "ratio": None, "unit": "steps/s", "shape": shape}
            | {"dtype": "float64", "machine": machine}
        )
    path = Path(__file__).parent / "results" / "hvac_steps.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
