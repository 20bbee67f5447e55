"""A building as a thermal network: one temperature a zone, conductances from geometry, an exact discretisation.

    C_i dT_i/dt = sum_j G_ij (T_j - T_i) + G_i,out (T_out - T_i) + G_i,gnd (T_gnd - T_i) + heat_i

The model, its names and its defaults are those of the RC buildings of BEAR (Zhang et al. 2022, arXiv:2211.14744)
and SustainGym (Yeh et al. 2023), written from their equations. Where those sources differ from their own equations,
this follows the equations:

- the shared edge of two zones uses both zones' Y range;
- people heat the zones where they are, and all of their heat is held over a step. The sources put its linear part,
  +7.14 W/K a person, into the state matrix (SustainGym on every zone's row); with the models' own occupants that
  alone makes 11 of the 16 networks unstable, although people give off less heat the warmer it is;
- winter ground temperatures keep their minus sign, and are derived from the station at hand;
- solar gain does not depend on the time step: the share of irradiance that counts is `shgc_weight` = 0.12 at every
  step, which is what theirs amounts to at their default of 300 s (0.01 / (300 / 3600));
- roof conductance belongs to the zones that have roof surfaces, so the order of zones doesn't matter; conductances
  between zones are symmetric (over the height that both share), so heat is conserved;
- observation bounds are in the order of the observation.

U-values: OfficeSmall and OfficeMedium have the published RC values; the others the area-weighted constructions of
their ASHRAE 90.1-2019 Denver model (opaque without surface films, windows with), by scripts/derive_hvac_data.py.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm

from sapwood.errors import ConfigError

Matrix = NDArray[np.float64]

DATA = Path(__file__).parent / "data"
AIR_HEAT_CAPACITY = 1000.0  # J/kgK
AIR_DENSITY = 1.225  # kg/m3
METABOLIC_RATE = 120.0  # W/person
PERSON_RANGE = (0.0, 45.0)  # degC
TOUCH = 0.011  # m: zone bounds are rounded to a centimetre

BUILDINGS = (
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
)


@dataclass(frozen=True)
class Zone:
    """A zone as its bounding box [m], areas [m2] and nominal occupants.

    wall_net: outdoor wall less its openings; roof: surface to the open air; conditioned: the building's own design
    heats or cools it (an attic or plenum is not).
    """

    name: str
    x: tuple[float, float]
    y: tuple[float, float]
    z: tuple[float, float]
    floor_area: float
    wall_net: float = 0.0
    window: float = 0.0
    roof: float = 0.0
    people: float = 0.0
    conditioned: bool = True

    @property
    def capacity(self) -> float:
        """Heat capacity of the air in the bounding box [J/K]."""
        dx, dy, dz = (high - low for low, high in (self.x, self.y, self.z))
        return AIR_HEAT_CAPACITY * AIR_DENSITY * dx * dy * dz


@dataclass(frozen=True)
class UValues:
    """Heat transfer coefficients [W/m2K]; a floor and the ceiling below it are in series."""

    intwall: float
    floor: float
    outwall: float
    roof: float
    ceiling: float
    groundfloor: float
    window: float

    @property
    def between_floors(self) -> float:
        """Floor and ceiling in series."""
        return self.floor * self.ceiling / (self.floor + self.ceiling)


@dataclass(frozen=True)
class Building:
    """Zones and envelope."""

    name: str
    zones: tuple[Zone, ...]
    u: UValues

    @property
    def conditioned(self) -> NDArray[np.bool_]:
        """[n] True where the building's own design heats or cools the zone."""
        return np.array([zone.conditioned for zone in self.zones])


@lru_cache(maxsize=16)
def load_building(name: str) -> Building:
    """One of the 16 prototype buildings, by name. Raises ConfigError naming the nearest known building."""
    if name not in BUILDINGS:
        near = difflib.get_close_matches(name, BUILDINGS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown building {name!r}.{hint} Known: {', '.join(BUILDINGS)}.")
    record = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    zones = tuple(
        Zone(
            name=zone["name"],
            x=tuple(zone["x"]),
            y=tuple(zone["y"]),
            z=tuple(zone["z"]),
            **{k: zone[k] for k in ("floor_area", "wall_net", "window", "roof", "people", "conditioned")},
        )
        for zone in record["zones"]
    )
    return Building(record["name"], zones, UValues(**record["u_values"]))


def fitted_thermal_mass(name: str) -> tuple[float, float]:
    """The `thermal_mass` and `mass_coupling` with which a named building follows EnergyPlus best.

    `scripts/fit_thermal_mass.py` found them. Raises ConfigError for any other building.
    """
    fitted: dict[str, dict[str, float]] = json.loads((DATA / "thermal_mass.json").read_text(encoding="utf-8"))
    if name not in fitted:
        raise ConfigError(
            f"thermal_mass 'fitted': building {name!r} has no fitted value, which are those of {', '.join(fitted)}; "
            "give a number."
        )
    return fitted[name]["thermal_mass"], fitted[name]["mass_coupling"]


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Length that two intervals share; negative where there is a gap."""
    return min(a[1], b[1]) - max(a[0], b[0])


def wall_conductance(a: Zone, b: Zone, u: UValues) -> float:
    """Conductance between two zones of the same floor [W/K]: shared height x shared edge x U of interior walls.

    The edge is hypot(x overlap, y overlap): the side that two rectangles share, and the mitred corner where their
    bounding boxes cross. Boxes of different floors, or apart, share nothing.
    """
    height = _overlap(a.z, b.z)
    x, y = _overlap(a.x, b.x), _overlap(a.y, b.y)
    if height <= TOUCH or x < -TOUCH or y < -TOUCH:
        return 0.0
    return height * float(np.hypot(max(x, 0.0), max(y, 0.0))) * u.intwall


def floor_conductances(zones: tuple[Zone, ...], u: UValues) -> Matrix:
    """[n, n] conductance between each zone and those on the next floor [W/K]: shared area x floor and ceiling.

    Two zones are neighbours if each is the other's nearest in height, so the floors that a model stands in for by a
    multiplier (a gap in height) don't cut the building in two.
    """
    n = len(zones)
    area, gap = np.zeros((n, n)), np.full((n, n), np.inf)  # [below, above]
    for i, below in enumerate(zones):
        for j, above in enumerate(zones):
            x, y = _overlap(below.x, above.x), _overlap(below.y, above.y)
            if above.z[0] - below.z[1] >= -TOUCH and min(x, y) > TOUCH:
                area[i, j] = x * y
                gap[i, j] = above.z[0] - below.z[1]
    nearest = (gap <= gap.min(axis=1, keepdims=True) + TOUCH) & (gap <= gap.min(axis=0, keepdims=True) + TOUCH)
    g = np.where(nearest, area, 0.0) * u.between_floors
    return g + g.T


@dataclass(frozen=True)
class Thermal:
    """Continuous model dT/dt = A T + B u, with inputs u = [person heat, T_ground, T_out, power_1..n, sun].

    T [s]: the air of the n zones (s = n), and where the model has a mass of its own in each zone also the n masses
    (s = 2n). a [s, s] (1/s); b [s, n + 4]; person heat in W for each of the nominal occupants; power in -1..1; sun in
    0..1 of `sun_scale` W/m2.
    """

    a: Matrix
    b: Matrix


def thermal(
    building: Building,
    *,
    max_power: float,
    powered: NDArray[np.float64] | NDArray[np.bool_],
    sun_scale: float,
    shgc: float = 0.252,
    shgc_weight: float = 0.12,
    ground_weight: float = 0.5,
    thermal_mass: float = 1.0,
    mass_coupling: float | None = None,
) -> Thermal:
    """The thermal network of a building.

    max_power: W a zone at power 1; powered [n]: zones that the actions reach; sun_scale: largest irradiance of the
    year [W/m2]; shgc: solar heat gain coefficient of the windows; shgc_weight: share of the horizontal irradiance
    that counts for them; ground_weight: share of the slab that touches the ground; thermal_mass: heat capacity of
    a zone in those of its air. Without mass_coupling air and mass have one temperature. With it [W/K per m2 of floor]
    the mass (thermal_mass - 1 times the air) has its own: it exchanges heat with the air of its zone, the ground and
    the masses of the zones next to it, and the air with it, outdoors, sun, people and power.
    """
    zones, u, n = building.zones, building.u, len(building.zones)
    capacity = np.array([zone.capacity for zone in zones]) * (thermal_mass if mass_coupling is None else 1.0)
    between = floor_conductances(zones, u)
    for i, a in enumerate(zones):
        for j in range(i):
            between[i, j] = between[j, i] = between[i, j] + wall_conductance(a, zones[j], u)
    outdoors = np.array([z.wall_net * u.outwall + z.window * u.window + z.roof * u.roof for z in zones])
    lowest = min(zone.z[0] for zone in zones)
    slab = np.array([zone.floor_area if zone.z[0] <= lowest + TOUCH else 0.0 for zone in zones])
    ground = slab * u.groundfloor * ground_weight
    people = np.array([zone.people for zone in zones])

    a_matrix = between / capacity[:, None]
    a_matrix[np.diag_indices(n)] = -(between.sum(axis=1) + outdoors + ground) / capacity
    sun = np.array([zone.window for zone in zones]) * shgc * shgc_weight * sun_scale
    power = np.diag(max_power * powered)
    b_matrix = np.column_stack([people, ground, outdoors, power, sun]) / capacity[:, None]
    if mass_coupling is None:
        return Thermal(a_matrix, b_matrix)
    coupling = np.array([max(zone.floor_area, 1.0) for zone in zones]) * mass_coupling
    mass = capacity * (thermal_mass - 1.0)
    a_both, b_both = np.zeros((2 * n, 2 * n)), np.zeros((2 * n, n + 4))
    a_both[:n, :n] = np.diag(-(outdoors + coupling) / capacity)
    a_both[:n, n:] = np.diag(coupling / capacity)
    a_both[n:, :n] = np.diag(coupling / mass)
    a_both[n:, n:] = between / mass[:, None] - np.diag((between.sum(axis=1) + ground + coupling) / mass)
    b_both[:n] = b_matrix
    b_both[:n, 1] = 0.0
    b_both[n:, 1] = ground / mass
    return Thermal(a_both, b_both)


def zero_order_hold(a: Matrix, b: Matrix, time_res: float) -> tuple[Matrix, Matrix]:
    """Exact step of dT/dt = A T + B u over `time_res` seconds with u held: T' = A_d T + B_d u.

    A_d [n, n] = exp(A t) and B_d [n, m] = A^-1 (A_d - I) B are read off one exponential of [[A, B], [0, 0]], which
    needs no inverse (Van Loan 1978, IEEE TAC 23(3)).
    """
    n, m = b.shape
    block = np.zeros((n + m, n + m))
    block[:n, :n], block[:n, n:] = a, b
    step = np.asarray(expm(block * time_res), np.float64)
    return step[:n, :n], step[:n, n:]


def person_heat(temperature: float, metabolic_rate: float = METABOLIC_RATE) -> float:
    """Sensible heat of a person [W] at a zone temperature [degC]; metabolic_rate in W a person.

    EnergyPlus' polynomial (Engineering Reference, Internal Gains: People), used within 0..45 degC, where at the
    default rate it falls from 120 W to nothing.
    """
    m, t = metabolic_rate, min(max(temperature, PERSON_RANGE[0]), PERSON_RANGE[1])
    heat = (
        6.461927
        + 0.946892 * m
        + 2.55737e-5 * m * m
        + 7.139322 * t
        - 0.0627909 * t * m
        + 5.89172e-5 * t * m * m
        - 0.19855 * t * t
        + 9.40018e-4 * t * t * m
        - 1.49532e-6 * t * t * m * m
    )
    return max(heat, 0.0)
