"""Days of SustainGym 0.1.7 against ours: equal once our departures from it, which are few and named, are undone.

Run by `make test-sustaingym`, which builds an environment of its own for SustainGym; skipped without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sapwood.envs.hvac import Building, HvacEnv, UValues, Zone, building, load_building
from sapwood.envs.hvac.physics import physics

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SAPWOOD_SUSTAINGYM_PYTHON", ROOT / ".venv-sustaingym" / "bin" / "python"))
U = UValues(6.299, 3.839, 0.514, 0.228, 4.488, 0.319, 2.615)  # theirs of OfficeSmall

pytestmark = [
    pytest.mark.sustaingym,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-sustaingym: make test-sustaingym"),
]


@pytest.fixture(scope="module")
def theirs():
    script = Path(__file__).with_name("_sustaingym.py")
    run = subprocess.run([PYTHON, script], capture_output=True, check=True, timeout=300)
    return json.loads(run.stdout)


def their_y_overlap(a: Zone, b: Zone) -> float:
    """The upper end by both zones, the lower end by the first alone."""
    return min(a.y[1], b.y[1]) - a.y[0]


def their_wall(a: Zone, b: Zone, u: UValues) -> float:
    first, second = (b, a) if a.name > b.name else (a, b)  # in the order of their list, which is by name here
    right = building._overlap(a.z, b.z) > building.TOUCH
    touching = min(building._overlap(a.x, b.x), building._overlap(a.y, b.y)) > -building.TOUCH
    if not right or not touching:
        return 0.0
    x, y = building._overlap(a.x, b.x), their_y_overlap(first, second)
    return (first.z[1] - first.z[0]) * float(np.hypot(x, y)) * u.intwall


def their_building(record) -> Building:
    """Their zones; the roof, by their rule, above the last zone of each floor."""
    zones = []
    for number, z in enumerate(record["zones"]):
        dx, dy = z["Xmax"] - z["Xmin"], z["Ymax"] - z["Ymin"]
        last = number + 1 == len(record["zones"]) or record["zones"][number + 1]["Zaxis"] != z["Zaxis"]
        zones.append(
            Zone(
                z["name"], (z["Xmin"], z["Xmax"]), (z["Ymin"], z["Ymax"]), (z["Zmin"], z["Zmax"]), z["FloorArea"],
                wall_net=z["ExteriorGrossArea"], window=z["ExteriorWindowArea"], roof=dx * dy if last else 0.0,
            )
        )  # fmt: skip
    return Building("sustaingym", tuple(zones), U)


@pytest.fixture
def undone(theirs, monkeypatch):
    """Our environment with their roof, overlap and ground, and everything powered."""
    monkeypatch.setattr(building, "wall_conductance", their_wall)
    physics.cache_clear()
    env = HvacEnv(their_building(theirs), epw=theirs["epw"], powered="all")
    ground = np.array(theirs["ground"])
    env.physics = dataclasses.replace(env.physics, ground=np.append(ground, np.full(105120 - len(ground), ground[-1])))
    yield env
    physics.cache_clear()


def test_the_step_matrix_is_theirs(theirs, undone):
    assert undone.physics.a_d == pytest.approx(np.array(theirs["a_d"]), abs=1e-12)


def test_the_weather_is_theirs(theirs, undone):
    # ours goes on from the year's last hour to its first, theirs ends with that hour
    count = len(theirs["outdoor"])
    assert count == 105_108
    assert undone.physics.outdoor[:count] == pytest.approx(np.array(theirs["outdoor"]), abs=1e-9)
    assert undone.physics.sun[:count] == pytest.approx(np.array(theirs["sun"]), abs=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_a_day_is_theirs(theirs, undone, which):
    day = theirs["days"][which]
    states, n = np.array(day["states"]), 6
    # their seed k begins at k / 365 of a year that ends at its last hour: 12 steps, an hour, before ours
    start = int(day["day"] / 365 * len(theirs["outdoor"]))
    undone.reset(options={"day": 0, "initial_temperature": 22.0})
    undone._start = start
    seen = [undone._observe()]
    rewards = []
    for action in day["actions"]:
        observation, reward, *_ = undone.step(np.array(action, np.float32))
        seen.append(observation)
        rewards.append(reward)
    ours = np.array(seen)
    # their state is rounded to float32 at every step
    assert ours[:, :n] == pytest.approx(states[:, :n], abs=2e-4)
    assert rewards == pytest.approx(day["rewards"], abs=1e-3)
    # the weather in a state of theirs is that of the step before; ours is that of the step to come
    assert ours[:-1, n : n + 3] == pytest.approx(states[1:, n : n + 3], abs=1e-4)


def test_what_our_departures_change(theirs):
    """Same EPW file, same powers on all six zones: how far our building goes from theirs within the day."""
    env = HvacEnv("OfficeSmall", epw=theirs["epw"], powered="all")
    assert [zone.name for zone in env.physics.building.zones] == [zone["name"] for zone in theirs["zones"]]
    apart = {}
    for day in theirs["days"]:
        env.reset(options={"day": 0, "initial_temperature": 22.0})
        env._start = int(day["day"] / 365 * len(theirs["outdoor"]))
        env._observe()
        seen = [env.step(np.array(action, np.float32))[4]["temperatures"] for action in day["actions"]]
        apart[day["day"]] = np.sqrt(np.mean((np.array(seen) - np.array(day["states"])[1:, :6]) ** 2, axis=0))
    for zones in apart.values():
        print(np.round(zones, 2))
        # the five rooms; the attic has its own
        assert 0.01 < zones[:5].max() < 1.5


def test_their_geometry_and_ours_are_one(theirs):
    """Their table of zones is the one that we derived from the EnergyPlus model, roof aside."""
    for zone, other in zip(load_building("OfficeSmall").zones, their_building(theirs).zones, strict=True):
        assert (zone.x, zone.y, zone.z) == (other.x, other.y, other.z)
        assert (zone.floor_area, zone.wall_net, zone.window) == (other.floor_area, other.wall_net, other.window)
