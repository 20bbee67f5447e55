"""Steps per second of the HVAC simulator: prints a table and writes benchmarks/results/hvac_steps.json.

    OMP_NUM_THREADS=1 python benchmarks/hvac_steps.py

One process, random actions, resets included; the median of five runs of 20,000 steps, in seconds of
processor time (the simulator has one thread and waits for nothing), so other work on the machine counts little.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from _harness import Options, Row, machine, publish

from sapwood.envs.hvac import HvacEnv

STEPS, RUNS = 20_000, 5
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("hvac_steps", "OfficeSmall", {}),
    ("hvac_steps_uniform", "OfficeSmall", {"control": "uniform", "time_res": 3600.0, "episode_len": 24}),
    ("hvac_steps_occupied", "OfficeSmall", {"occupancy": "office_hours"}),
    ("hvac_steps_118_zones", "OutPatientHealthCare", {}),
)


def steps_per_second(env: HvacEnv, steps: int) -> float:
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(64)]
    rates = []
    for run in range(RUNS):
        env.reset(seed=run)
        start = time.process_time()
        for index in range(steps):
            if env.step(actions[index % 64])[3]:
                env.reset()
        rates.append(steps / (time.process_time() - start))
    return statistics.median(rates)


def run(options: Options) -> None:
    """Measure every case and publish the rows."""
    rows = []
    for name, building, arguments in CASES:
        env = HvacEnv(building, **arguments)
        rate = steps_per_second(env, 500 if options.tiny else STEPS)
        shape = f"{building}, {env.zones} zones, {env.control}"
        rows.append(Row(name, round(rate), None, None, "steps/s", shape, "float64", machine(1)))
    publish("hvac_steps", rows, options)


if __name__ == "__main__":
    run(Options.of(Options.parser(__doc__.splitlines()[0]).parse_args()))
