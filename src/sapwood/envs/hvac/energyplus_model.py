"""The EnergyPlus model that an episode runs: a prototype building's envelope, weather and ground, and nothing else.

`pyenergyplus-lbnl` ships the ASHRAE90.1-2019 Denver prototypes. Of these, the geometry, constructions, internal
mass (furniture) and infiltration stay. Their own heating and cooling systems, lights, appliances and people go; each
zone gets two heat sources that the environment sets every step: the power of the action (all of it to the air) and
the people of `occupancy` (30 % as radiation).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date, timedelta
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from sapwood.envs.hvac.building import BUILDINGS, Building, load_building
from sapwood.envs.hvac.energyplus_worker import HOLDING, PEOPLE, POWER
from sapwood.envs.hvac.weather import Weather, station_source
from sapwood.errors import ConfigError, MissingExtra

#: Classes of objects that stay, in upper case; "X:" keeps every class that begins so.
KEPT = (
    "VERSION",
    "BUILDING",
    "GLOBALGEOMETRYRULES",
    "HEATBALANCEALGORITHM",
    "SURFACECONVECTIONALGORITHM:",
    "SHADOWCALCULATION",
    "SITE:LOCATION",
    "SCHEDULETYPELIMITS",
    "SCHEDULE:",
    "MATERIAL",
    "MATERIAL:",
    "WINDOWMATERIAL:",
    "WINDOWPROPERTY:",
    "CONSTRUCTION",
    "CONSTRUCTION:",
    "ZONE",
    "ZONELIST",
    "ZONEGROUP",
    "BUILDINGSURFACE:",
    "FENESTRATIONSURFACE:",
    "SHADING:",
    "INTERNALMASS",
    "ZONEINFILTRATION:",
)
#: Longest zone time step [s]; EnergyPlus takes those that divide an hour.
ZONE_STEPS = (300, 240, 180, 120, 60)
#: A year without 29 February that begins on a Sunday, as the prototypes' does.
YEAR = 2017
RADIANT_SHARE_OF_PEOPLE = 0.3
#: Switches of the object that says which files EnergyPlus writes.
OUTPUT_FILES = 29


def zone_step(time_res: float) -> int:
    """EnergyPlus' time step [s] for steps of `time_res` seconds. Raises ConfigError where there is none."""
    for seconds in ZONE_STEPS:
        if time_res % seconds == 0:
            return seconds
    raise ConfigError(
        f"time_res {time_res:g}: backend energyplus works in whole minutes; give a multiple of 60 s, such as 300."
    )


def data_folder() -> Path:
    """The folder of models and weather files. Raises MissingExtra without the package."""
    spec = find_spec("pyenergyplus")
    if spec is None or spec.origin is None:
        raise MissingExtra("pyenergyplus-lbnl", "energyplus", "backend energyplus")
    return Path(spec.origin).parent / "data"


def weather_file(climate: str, epw: str | Path | None) -> Path:
    """The EPW file of a climate or station name, or `epw`. Raises ConfigError for a name without a station."""
    folder = data_folder() / "weather"
    return Path(epw).absolute() if epw is not None else folder / station_source(climate)


@lru_cache(maxsize=8)
def envelope(building: Building) -> str:
    """The prototype's objects that stay, as IDF text. Raises ConfigError for a building of one's own."""
    if building.name not in BUILDINGS or load_building(building.name) != building:
        raise ConfigError(
            f"backend energyplus has models of the {len(BUILDINGS)} named buildings only, not of the building "
            f"{building.name!r} given as zones; use backend rc."
        )
    path = data_folder() / "model" / f"ASHRAE901_{building.name}_STD2019_Denver.idf"
    text = re.sub(r"!.*", "", path.read_text(encoding="latin-1"))
    objects = [[field.strip() for field in item.split(",")] for item in text.split(";")]
    return "\n".join(f"{', '.join(fields)};" for fields in objects if _stays(fields[0].upper()))


def _stays(kind: str) -> bool:
    return kind in KEPT or any(kind.startswith(prefix) for prefix in KEPT if prefix.endswith(":"))


def episode_model(
    building: Building, weather: Weather, first_day: int, days: int, step: int, start: Sequence[float]
) -> str:
    """IDF text of `days` days from day `first_day` (0..364) on, in zone time steps of `step` seconds.

    start [n]: temperatures at which ideal thermostats hold the zones [degC], until the worker switches them off.
    """
    begin = date(YEAR, 1, 1) + timedelta(days=first_day)
    end = begin + timedelta(days=days - 1)
    ground = ", ".join(f"{t:.3f}" for t in weather.ground)
    zones = "\n".join(_equipment(zone.name, float(t)) for zone, t in zip(building.zones, start, strict=True))
    return f"""{envelope(building)}
Timestep, {3600 // step};
SimulationControl, No, No, No, No, Yes;
RunPeriod, EPISODE, {_day(begin)}, {_day(end)}, , No, No, No, No, No;
Site:GroundTemperature:FCfactorMethod, {ground};
OutputControl:Files{", No" * OUTPUT_FILES};
Schedule:Constant, SAPWOOD ON, , 1;
Schedule:Constant, {HOLDING}, , 1;
Schedule:Constant, SAPWOOD SINGLE, , 4;
{zones}
"""


def _day(day: date) -> str:
    return f"{day.month}, {day.day}, {day.year}"


def _equipment(zone: str, start: float) -> str:
    """The two heat sources of a zone, and the thermostat that holds it before the episode."""
    radiant = RADIANT_SHARE_OF_PEOPLE
    return f"""
OtherEquipment, {zone} {POWER}, None, {zone}, SAPWOOD ON, EquipmentLevel, 0, , , 0, 0, 0;
OtherEquipment, {zone} {PEOPLE}, None, {zone}, SAPWOOD ON, EquipmentLevel, 0, , , 0, {radiant}, 0;
Schedule:Constant, {zone} HELD AT, , {start:.4f};
ThermostatSetpoint:DualSetpoint, {zone} SETPOINT, {zone} HELD AT, {zone} HELD AT;
ZoneControl:Thermostat, {zone} THERMOSTAT, {zone}, SAPWOOD SINGLE, ThermostatSetpoint:DualSetpoint, {zone} SETPOINT;
ZoneHVAC:EquipmentConnections, {zone}, {zone} EQUIPMENT, {zone} INLET, , {zone} AIR, {zone} RETURN;
ZoneHVAC:EquipmentList, {zone} EQUIPMENT, SequentialLoad, ZoneHVAC:IdealLoadsAirSystem, {zone} IDEAL, 1, 1;
ZoneHVAC:IdealLoadsAirSystem, {zone} IDEAL, {HOLDING}, {zone} INLET, , , 99, -60, 0.2, 0.0001;"""
