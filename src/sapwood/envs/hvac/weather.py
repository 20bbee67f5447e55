"""Weather and ground temperatures of a year, from a shipped station or a user's EPW file.

Names of climates are those of the ASHRAE 169 zones. A name is answered by the station of that zone which the
EnergyPlus wheel ships (data/NOTICE); `scripts/derive_hvac_data.py` packed them into data/weather.npz.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sapwood.errors import ConfigError, DataError, printable

DATA = Path(__file__).parent / "data"
HOURS = 8760
HEADER_LINES = 8
DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
#: Months by which EnergyPlus' F- and C-factor ground temperature trails the mean outdoor temperature.
GROUND_LAG_MONTHS = 3

#: Climate name -> shipped station, by ASHRAE 169 zone.
CLIMATES = {
    "Very_Hot_Humid": "Miami",  # 1A
    "Hot_Humid": "Tampa",  # 2A
    "Hot_Dry": "Phoenix",  # 2B
    "Warm_Humid": "Oklahoma_City",  # 3A
    "Warm_Dry": "Las_Vegas",  # 3B
    "Warm_Marine": "San_Francisco",  # 3C
    "Mixed_Humid": "Newark",  # 4A
    "Cool_Humid": "Chicago",  # 5A
    "Cool_Dry": "Denver",  # 5B
}
#: Climates of the prototype buildings whose station the wheel doesn't ship.
WITHOUT_STATION = {
    "Mixed_Dry": "Albuquerque",
    "Mixed_Marine": "Seattle",
    "Cool_Marine": "Port Angeles",
    "Cold_Humid": "Rochester",
    "Cold_Dry": "Great Falls",
    "Very_Cold": "International Falls",
    "Subarctic": "Fairbanks",
}


@dataclass(frozen=True)
class Weather:
    """A year of weather.

    name: station or file; outdoor [8760] degC; ghi [8760] W/m2 on the horizontal; ground [12] degC by month.
    Entry k stands for k hours after the start of 1 January, local standard time.
    """

    name: str
    outdoor: NDArray[np.float64]
    ghi: NDArray[np.float64]
    ground: NDArray[np.float64]

    def sampled(self, time_res: float) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Outdoor temperature, irradiance and ground temperature every `time_res` seconds of the year.

        Outdoor temperature and irradiance are interpolated linearly between hours (the year closes on itself);
        the ground temperature is constant within a month.
        """
        hours = np.arange(0, HOURS, time_res / 3600.0)
        grid = np.arange(HOURS + 1)
        outdoor = np.interp(hours, grid, np.append(self.outdoor, self.outdoor[0]))
        ghi = np.interp(hours, grid, np.append(self.ghi, self.ghi[0]))
        month = np.repeat(np.arange(12), np.array(DAYS_IN_MONTH) * 24)
        return outdoor, ghi, self.ground[month[hours.astype(np.int64)]]


def lagged_ground_temperature(outdoor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ground temperature [12] by month: the mean outdoor temperature of three months before.

    This is EnergyPlus' default for Site:GroundTemperature:FCfactorMethod; for Denver it gives the twelve values
    written in the ASHRAE 90.1 prototype models (7.1, 3.0, -1.0, 0.8, ...).
    """
    ends = np.cumsum(np.array(DAYS_IN_MONTH) * 24)
    means = np.array([part.mean() for part in np.split(outdoor, ends[:-1])])
    return np.roll(means, GROUND_LAG_MONTHS)


def load_weather(climate: str, epw: str | Path | None = None) -> Weather:
    """The weather of a climate or station name, or of an EPW file if `epw` is given.

    Raises ConfigError for a name without a station, DataError for a file that can't be read as EPW.
    """
    return read_epw(epw) if epw is not None else _station_weather(station_of(climate))


def station_of(climate: str) -> str:
    """The shipped station that a climate name or station name stands for. Raises ConfigError for any other."""
    stations = _stations()
    if climate in CLIMATES:
        return CLIMATES[climate]
    if climate in stations:
        return climate
    names = [*CLIMATES, *sorted(stations)]
    if climate in WITHOUT_STATION:
        raise ConfigError(
            f"climate {climate!r}: no weather of {WITHOUT_STATION[climate]} is shipped; give that station's "
            f"EnergyPlus weather file as epw: PATH, or choose one of {', '.join(names)}."
        )
    near = difflib.get_close_matches(climate, [*names, *WITHOUT_STATION], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown climate {climate!r}.{hint} Known: {', '.join(names)}; any other station by epw: PATH.")


def station_source(climate: str) -> str:
    """File name of the EPW that a climate's or station's weather was read from."""
    return str(_stations()[station_of(climate)]["source"])


@lru_cache(maxsize=1)
def _stations() -> dict[str, dict[str, object]]:
    return json.loads((DATA / "stations.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=32)
def _station_weather(station: str) -> Weather:
    with np.load(DATA / "weather.npz") as packed:
        outdoor = packed[f"{station}.outdoor"].astype(np.float64) / 10.0
        ghi = packed[f"{station}.ghi"].astype(np.float64)
    for array in (outdoor, ghi):
        array.flags.writeable = False
    return Weather(station, outdoor, ghi, lagged_ground_temperature(outdoor))


def read_epw(path: str | Path) -> Weather:
    """Read an EnergyPlus weather file (EPW, hourly, one year).

    Uses the dry-bulb temperature (field 7, degC) and the global horizontal irradiance (field 14, Wh/m2 of the
    hour). 29 February is left out. Ground temperatures are `lagged_ground_temperature`, as for shipped stations.
    Raises DataError naming the file and line of what can't be read.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"epw {path}: can't be read, it is no file; check the path.")
        lines = path.read_text(encoding="latin-1").splitlines()
    except (OSError, ValueError) as error:  # the latter where the name holds a NUL
        said = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"epw {printable(str(path))}: can't be read ({said}); check the path.") from error
    if not lines or not lines[0].upper().startswith("LOCATION,"):
        raise DataError(f"{path}, line 1: an EPW file starts with 'LOCATION,'; this is not one.")
    outdoor: list[float] = []
    ghi: list[float] = []
    expected = _hours_of_year()
    for number, fields in enumerate(_rows(path, lines[HEADER_LINES:]), start=HEADER_LINES + 1):
        if not fields:
            continue
        if len(fields) < 14:
            raise DataError(f"{path}, line {number}: {len(fields)} fields, an EPW hour has 35.")
        if (fields[1].strip(), fields[2].strip()) == ("2", "29"):
            continue
        _check_hour(path, number, fields, next(expected, None))
        outdoor.append(_number(path, number, fields, 6, "dry-bulb temperature", -90.0, 70.0))
        ghi.append(_number(path, number, fields, 13, "global horizontal irradiance", 0.0, 2000.0))
    if len(outdoor) != HOURS:
        raise DataError(
            f"{path}, line {len(lines)}: {len(outdoor)} hourly rows, a year has {HOURS}; "
            "the file is cut short or not hourly."
        )
    temperatures = np.array(outdoor)
    name = ",".join(lines[0].split(",")[1:4])
    return Weather(name, temperatures, np.array(ghi), lagged_ground_temperature(temperatures))


def _hours_of_year() -> Iterator[tuple[int, int, int]]:
    """(month, day, hour 1..24) of the 8760 hours."""
    for month, days in enumerate(DAYS_IN_MONTH, start=1):
        for day in range(1, days + 1):
            for hour in range(1, 25):
                yield month, day, hour


def _check_hour(path: Path, line: int, fields: Sequence[str], expected: tuple[int, int, int] | None) -> None:
    """Hours must follow each other: a lost and a doubled one would shift every hour between them."""
    if expected is None:  # more rows than hours, which their count will tell
        return
    texts = [fields[index].strip() for index in (1, 2, 3)]
    if texts != [str(number) for number in expected] and [t.lstrip("0") for t in texts] != [str(n) for n in expected]:
        found, wanted = printable("/".join(texts), 40), "/".join(str(number) for number in expected)
        raise DataError(
            f"{path}, line {line}: month/day/hour {found} where {wanted} should be: hours are missing, doubled or out "
            "of order; an EPW file has the hours 1 to 24 of every day."
        )


def _rows(path: Path, lines: Sequence[str]) -> Iterator[list[str]]:
    reader = csv.reader(lines)
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}, line {HEADER_LINES + reader.line_num}: can't be read as CSV ({error}).") from error


def _number(path: Path, line: int, fields: Sequence[str], index: int, what: str, low: float, high: float) -> float:
    text = fields[index].strip()
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(
            f"{path}, line {line}, field {index + 1}: {what} is {printable(repr(text), 60)}, not a number."
        ) from error
    if not low <= value <= high:  # also refuses NaN and EPW's missing values 99.9 and 9999
        raise DataError(
            f"{path}, line {line}, field {index + 1}: {what} is {printable(text, 60)}, outside {low:g} to {high:g} "
            "(missing or damaged)."
        )
    return value
