"""Derive src/sapwood/envs/hvac/data from the prototype models and weather files that the EnergyPlus wheel ships.

    python -m venv /tmp/energyplus && /tmp/energyplus/bin/pip install pyenergyplus-lbnl numpy
    /tmp/energyplus/bin/python scripts/derive_hvac_data.py [--output DIR] [BUILDING ...]

Each ASHRAE901_*_STD2019_Denver model is run for one day (2 s to 30 s each), with its surfaces listed, and the zone
geometry, occupants and U-values are read from the run's .eio file. Stations are packed into one weather.npz.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).parents[1] / "src" / "sapwood" / "envs" / "hvac" / "data"
BUILDINGS = [
    "ApartmentHighRise",
    "ApartmentMidRise",
    "Hospital",
    "HotelLarge",
    "HotelSmall",
    "OfficeLarge",
    "OfficeMedium",
    "OfficeSmall",
    "OutPatientHealthCare",
    "RestaurantFastFood",
    "RestaurantSitDown",
    "RetailStandalone",
    "RetailStripmall",
    "SchoolPrimary",
    "SchoolSecondary",
    "Warehouse",
]
STATIONS = {
    "Boulder": "Boulder-Broomfield",
    "Chicago": "Chicago-OHare",
    "Colorado_Springs": "Colorado.Springs",
    "Denver": "Denver-Aurora",
    "Fresno": "Fresno",
    "Golden": "Golden-NREL",
    "Las_Vegas": "Las.Vegas",
    "Miami": "Miami",
    "Newark": "Newark",
    "Oklahoma_City": "Oklahoma.City",
    "Orlando": "Orlando",
    "Phoenix": "Phoenix",
    "San_Francisco": "San.Francisco",
    "Sterling": "Sterling",
    "Tampa": "Tampa",
    "University_of_Illinois": "University.of.Illinois",
}
ONE_DAY = """
RunPeriod,one day,1,1,,1,1,,Tuesday,No,No,No,Yes,Yes;
Output:Surfaces:List,Details;
SimulationControl,Yes,Yes,Yes,No,Yes;
"""
# The envelope that published RC studies of these two offices use (BEAR, arXiv:2211.14744), kept so that results
# compare; the other buildings have the constructions of their own STD2019 Denver model.
PUBLISHED_U = {
    name: {
        "intwall": 6.299,
        "floor": 3.839,
        "outwall": 0.514,
        "roof": 0.228,
        "ceiling": 4.488,
        "groundfloor": 0.319,
        "window": 2.615,
    }
    for name in ("OfficeSmall", "OfficeMedium")
}
# Where a model has no surface of a kind (single-storey shops have no floor between zones).
DEFAULT_U = PUBLISHED_U["OfficeSmall"]


def run_energyplus(model: Path, weather: Path, folder: Path) -> Path:
    """Run one day of the model in a process of its own; returns the .eio file."""
    text = model.read_text(encoding="latin-1")
    for kind in ("RunPeriod", "Output:Surfaces:List", "SimulationControl"):
        text = re.sub(rf"(?ims)^\s*{kind}\s*,.*?;[^\n]*\n", "", text)
    (folder / "in.idf").write_text(text + ONE_DAY, encoding="latin-1")
    program = (
        "import sys; from pyenergyplus.api import EnergyPlusAPI; api = EnergyPlusAPI(); "
        "sys.exit(api.runtime.run_energyplus(api.state_manager.new_state(), sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "-d", str(folder), "-w", str(weather), str(folder / "in.idf")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "eplusout.eio"


def tables(eio: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of each table of an .eio file, by the table's name."""
    header: dict[str, list[str]] = {}
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in eio.read_text(encoding="latin-1").splitlines():
        cells = [cell.strip() for cell in next(csv.reader([line]))] if line.strip() else []
        if not cells:
            continue
        if cells[0].startswith("! <"):
            header[cells[0][3:].rstrip(">")] = cells[1:]
        elif cells[0] in header:
            rows[cells[0]].append(dict(zip(header[cells[0]], cells[1:], strict=False)))
    return rows


def thermostat_zones(model: Path) -> set[str]:
    """Names of the zones that the model heats or cools: those with a thermostat, zone lists opened."""
    text = re.sub(r"!.*", "", model.read_text(encoding="latin-1"))
    objects = [[field.strip().upper() for field in item.split(",")] for item in text.split(";")]
    lists = {fields[1]: fields[2:] for fields in objects if fields[0] == "ZONELIST"}
    named = [fields[2] for fields in objects if fields[0] == "ZONECONTROL:THERMOSTAT"]
    return {zone for name in named for zone in lists.get(name, [name])}


def mean_u(surfaces: list[dict[str, str]], column: str) -> float | None:
    """Area-weighted mean U-value, or None without surfaces."""
    pairs = [(float(s["Area (Net) {m2}"]), float(s[column])) for s in surfaces]
    area = sum(a for a, _ in pairs)
    return round(sum(a * u for a, u in pairs) / area, 4) if area else None


def u_values(surfaces: list[dict[str, str]]) -> dict[str, float]:
    """Area-weighted U-values [W/m2K]: opaque ones without films, windows with films."""
    opaque, window = "Nominal U (w/o film coefs) {W/m2-K}", "Nominal U (with film coefs) {W/m2-K}"
    names = {s["Surface Name"] for s in surfaces}

    def select(classes: tuple[str, ...], where: str) -> list[dict[str, str]]:
        return [s for s in surfaces if s["Surface Class"] in classes and side(s) == where]

    def side(surface: dict[str, str]) -> str:
        boundary = surface["ExtBoundCondition"]
        if "FFACTOR" in surface["Construction"].upper():  # a core zone's slab is its own boundary, yet a slab
            return "ground"
        if boundary == surface["Surface Name"]:
            return "adiabatic"
        if boundary in names:
            return "zone"
        return "outdoors" if boundary == "ExternalEnvironment" else "ground"

    between_floors = mean_u(select(("Floor", "Ceiling", "Roof"), "zone"), opaque)
    # The world puts floor and ceiling in series, so a single construction counts as two of twice its U-value.
    series = {} if between_floors is None else {"floor": 2 * between_floors, "ceiling": 2 * between_floors}
    found = {
        "intwall": mean_u(select(("Wall",), "zone"), opaque),
        "outwall": mean_u(select(("Wall", "Door"), "outdoors"), opaque),
        "roof": mean_u(select(("Roof", "Ceiling"), "outdoors"), opaque),
        "groundfloor": mean_u(select(("Floor",), "ground"), opaque),
        "window": mean_u(select(("Window", "GlassDoor", "Glass Door"), "outdoors"), window),
    }
    return {**DEFAULT_U, **{k: v for k, v in found.items() if v is not None}, **series}


def roof_areas(surfaces: list[dict[str, str]], zones: list[str]) -> dict[str, float]:
    """Area of each zone's roofs to the open air [m2]; surfaces are named by the row that precedes them."""
    areas = dict.fromkeys(zones, 0.0)
    for surface in surfaces:
        if surface["Surface Class"] in ("Roof", "Ceiling") and surface["ExtBoundCondition"] == "ExternalEnvironment":
            areas[surface["zone"]] += float(surface["Area (Gross) {m2}"])
    return areas


def surfaces_with_zone(eio: Path) -> list[dict[str, str]]:
    """Heat transfer surfaces; each with the zone of the 'Zone Surfaces' row above it."""
    found, zone, header = [], "", []
    for line in eio.read_text(encoding="latin-1").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if cells[0] == "! <HeatTransfer Surface>":
            header = cells[1:]
        elif cells[0] == "Zone Surfaces":
            zone = cells[1]
        elif cells[0] == "HeatTransfer Surface":
            found.append({**dict(zip(header, cells[1:], strict=False)), "zone": zone})
    return found


def building_record(name: str, model: Path, eio: Path) -> dict[str, object]:
    """What data/NAME.json holds."""
    read = tables(eio)
    rows = read["Zone Information"]
    names = [row["Zone Name"] for row in rows]
    surfaces = surfaces_with_zone(eio)
    roofs = roof_areas(surfaces, names)
    heated = thermostat_zones(model)
    people: dict[str, float] = defaultdict(float)
    for row in read["People Internal Gains Nominal"]:
        people[row["Zone Name"]] += float(row["Number of People {}"])
    zones = [
        {
            "name": row["Zone Name"],
            "x": [float(row["Minimum X {m}"]), float(row["Maximum X {m}"])],
            "y": [float(row["Minimum Y {m}"]), float(row["Maximum Y {m}"])],
            "z": [float(row["Minimum Z {m}"]), float(row["Maximum Z {m}"])],
            "floor_area": float(row["Floor Area {m2}"]),
            "wall_gross": float(row["Exterior Gross Wall Area {m2}"]),
            "wall_net": float(row["Exterior Net Wall Area {m2}"]),
            "window": float(row["Exterior Window Area {m2}"]),
            "roof": round(roofs[row["Zone Name"]], 2),
            "people": round(people[row["Zone Name"]], 2),
            "conditioned": row["Zone Name"] in heated,
        }
        for row in rows
    ]
    u = PUBLISHED_U.get(name) or u_values(surfaces)
    return {"name": name, "source": model.name, "u_values": u, "zones": zones}


def dump(record: dict[str, object]) -> str:
    """JSON with one zone a line."""
    zones = record.pop("zones")
    assert isinstance(zones, list)
    head = json.dumps(record, indent=1)[:-2]
    return head + ',\n "zones": [\n' + ",\n".join("  " + json.dumps(zone) for zone in zones) + "\n ]\n}\n"


def pack_weather(folder: Path, output: Path) -> None:
    """All stations as tenths of a degree and whole Wh/m2: exactly what the EPW files say."""
    arrays, about = {}, {}
    for station, fragment in STATIONS.items():
        (path,) = folder.glob(f"*{fragment}*.epw")
        with path.open(encoding="latin-1", newline="") as file:
            rows = list(csv.reader(file))
        hours = np.array([[float(row[6]) * 10, float(row[13])] for row in rows[8:]])
        assert hours.shape == (8760, 2), path
        arrays[f"{station}.outdoor"] = np.rint(hours[:, 0]).astype(np.int16)
        arrays[f"{station}.ghi"] = np.rint(hours[:, 1]).astype(np.int16)
        about[station] = {"source": path.name, "latitude": float(rows[0][6]), "longitude": float(rows[0][7])}
    np.savez_compressed(output / "weather.npz", **arrays)
    (output / "stations.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the data folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("buildings", nargs="*", metavar="BUILDING", help="default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    import pyenergyplus  # type: ignore[import-not-found]

    data = Path(pyenergyplus.__file__).parent / "data"
    options.output.mkdir(parents=True, exist_ok=True)
    pack_weather(data / "weather", options.output)
    (weather,) = (data / "weather").glob("*Denver-Aurora*.epw")
    for name in options.buildings or BUILDINGS:
        model = data / "model" / f"ASHRAE901_{name}_STD2019_Denver.idf"
        with tempfile.TemporaryDirectory() as folder:
            eio = run_energyplus(model, weather, Path(folder))
            record = building_record(name, model, eio)
        print(name, len(record["zones"]), record["u_values"])  # type: ignore[arg-type]
        (options.output / f"{name}.json").write_text(dump(record), encoding="utf-8")


if __name__ == "__main__":
    main()
