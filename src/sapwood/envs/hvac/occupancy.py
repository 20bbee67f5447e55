"""When people are in a building: the schedules that the prototype models give each zone.

`scripts/derive_hvac_occupancy.py` read them into data/occupancy.json. Day 0 of the year is a Sunday, as in the
models; there are no holidays.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.building import BUILDINGS, DATA, Building, load_building
from sapwood.errors import ConfigError

DAYS = 365


@lru_cache(maxsize=16)
def occupancy_profiles(building: Building) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Shares of each zone's nominal occupants (profiles [k, n]), and the profile of each hour of the year [8760].

    Raises ConfigError for a building that is not one of the named ones.
    """
    if building.name not in BUILDINGS or load_building(building.name) != building:
        raise ConfigError(
            f"occupancy 'schedule': the building {building.name!r} given as zones has no schedule; choose 'none', "
            "'office_hours' or 'always'."
        )
    record = json.loads((DATA / "occupancy.json").read_text(encoding="utf-8"))[building.name]
    profiles = np.array(record["profiles"], np.float64).reshape(-1, 24)
    shares = np.zeros((DAYS, 24, len(building.zones)))
    for index, zone in enumerate(building.zones):
        schedule = record["zones"].get(zone.name)
        if schedule is not None:
            shares[:, :, index] = profiles[_days(record["schedules"][schedule])]
    distinct, of_hour = np.unique(shares.reshape(DAYS * 24, -1), axis=0, return_inverse=True)
    return distinct, of_hour.reshape(-1)


def _days(schedule: list[tuple[int, list[int]]]) -> NDArray[np.int64]:
    """[365] the profile of each day, from [last day, profiles of Sunday .. Saturday]."""
    of_day = np.empty(DAYS, np.int64)
    first = 0
    for last, week in schedule:
        days = np.arange(first, last + 1)
        of_day[days] = np.array(week)[days % 7]
        first = last + 1
    return of_day
