"""Derive src/sapwood/envs/hvac/data/occupancy.json: when people are in each zone of the 16 buildings.

    .venv/bin/python scripts/derive_hvac_occupancy.py [--output FILE]        (about 10 s)

The schedules are those of the People objects in the ASHRAE901_*_STD2019_Denver models of the package
`pyenergyplus-lbnl`. EnergyPlus itself reads them: a run of one day of the building's envelope lists them, hour by
hour and day by day of the week, in its .eio file. Holidays and daylight saving time are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from sapwood.envs.hvac.building import BUILDINGS, DATA, load_building
from sapwood.envs.hvac.energyplus_model import YEAR, data_folder, episode_model, weather_file
from sapwood.envs.hvac.weather import load_weather

RUN = (
    "import sys; from pyenergyplus.api import EnergyPlusAPI; api = EnergyPlusAPI(); "
    "sys.exit(api.runtime.run_energyplus(api.state_manager.new_state(), sys.argv[1:]))"
)


def rows_of_run(name: str, folder: Path) -> list[list[str]]:
    """Rows of the .eio file of a run that lists every schedule of the building."""
    plan = load_building(name)
    text = episode_model(plan, load_weather("Denver"), 0, 1, 300, [22.0] * len(plan.zones))
    text = re.sub(r"(?m)^OutputControl:Files.*$", "Output:Schedules, Hourly;", text)
    (folder / "in.idf").write_text(text, encoding="latin-1")
    files = ["-d", str(folder), "-w", str(weather_file("Denver", None)), str(folder / "in.idf")]
    subprocess.run([sys.executable, "-c", RUN, *files], check=True, capture_output=True, cwd=folder)
    lines = (folder / "eplusout.eio").read_text(encoding="latin-1").splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines]


def schedules_of_people(name: str) -> dict[str, str]:
    """Zone -> name of its people's schedule, as the model says, both in upper case."""
    path = data_folder() / "model" / f"ASHRAE901_{name}_STD2019_Denver.idf"
    text = re.sub(r"!.*", "", path.read_text(encoding="latin-1"))
    objects = [[field.strip().upper() for field in item.split(",")] for item in text.split(";")]
    lists = {fields[1]: fields[2:] for fields in objects if fields[0] == "ZONELIST"}
    found: dict[str, str] = {}
    for fields in objects:
        if fields[0] == "PEOPLE":
            for zone in lists.get(fields[2], [fields[2]]):
                assert zone not in found, f"{name}: two People objects in {zone}"
                found[zone] = fields[3]
    return found


def record(name: str, folder: Path) -> dict[str, Any]:
    """Profiles of 24 shares; schedules as [last day 0..364, profiles of Sunday .. Saturday]; zones -> schedule."""
    rows = rows_of_run(name, folder)
    days = {r[1].upper(): [float(x) for x in r[5:29]] for r in rows if r[0] == "DaySchedule - Hourly"}
    weeks = {r[1].upper(): [day.upper() for day in r[2:9]] for r in rows if r[0] == "WeekSchedule - Hourly"}
    years = {r[1].upper(): r[3:] for r in rows if r[0] == "Schedule - Hourly"}
    by_zone = schedules_of_people(name)
    zones = {z.name: by_zone[z.name.upper()] for z in load_building(name).zones if z.people > 0}
    profiles: list[list[float]] = []
    schedules = {}
    for schedule in sorted(set(zones.values())):
        entries = years[schedule]
        schedules[schedule] = []
        for until, week in zip(entries[::2], entries[1::2], strict=True):
            last = datetime.strptime(f"{until} {YEAR}", "Through %b %d %Y").timetuple().tm_yday - 1
            for day in weeks[week.upper()]:
                if days[day] not in profiles:
                    profiles.append(days[day])
            schedules[schedule].append([last, [profiles.index(days[day]) for day in weeks[week.upper()]]])
        assert schedules[schedule][-1][0] == 364, (name, schedule)
    return {"profiles": profiles, "schedules": schedules, "zones": zones}


def dump(records: dict[str, dict[str, Any]]) -> str:
    """JSON with one profile, schedule and zone a line."""
    parts = []
    for name, about in records.items():
        profiles = ",\n   ".join(json.dumps(profile) for profile in about["profiles"])
        schedules = ",\n   ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in about["schedules"].items())
        zones = ",\n   ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in about["zones"].items())
        parts.append(
            f' "{name}": {{\n  "profiles": [\n   {profiles}\n  ],\n  "schedules": {{\n   {schedules}\n  }},\n'
            f'  "zones": {{\n   {zones}\n  }}\n }}'
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DATA / "occupancy.json")
    options = parser.parse_args()
    records = {}
    for name in BUILDINGS:
        with tempfile.TemporaryDirectory() as folder:
            records[name] = record(name, Path(folder))
        print(name, len(records[name]["profiles"]), "profiles,", len(records[name]["zones"]), "zones with people")
    options.output.write_text(dump(records), encoding="utf-8")


if __name__ == "__main__":
    main()
