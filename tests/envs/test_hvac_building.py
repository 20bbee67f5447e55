"""The thermal network against numbers worked by hand, and its exact step against a fine Euler integration."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sapwood.envs.hvac.building import (
    BUILDINGS,
    Building,
    UValues,
    Zone,
    load_building,
    person_heat,
    thermal,
    wall_conductance,
    zero_order_hold,
)
from sapwood.errors import ConfigError

U = UValues(intwall=2.0, floor=3.0, outwall=0.5, roof=0.2, ceiling=6.0, groundfloor=0.4, window=2.5)
# 4 m x 5 m x 3 m: C = 1000 * 1.225 * 60 = 73,500 J/K
WEST = Zone("west", (0, 4), (0, 5), (0, 3), floor_area=20, wall_net=30, window=4, roof=20, people=2)
EAST = Zone("east", (4, 8), (1, 5), (0, 3), floor_area=16, wall_net=10, roof=16)


def network(*zones: Zone, max_power: float = 1000.0, sun_scale: float = 1000.0):
    building = Building("by hand", zones, U)
    return thermal(building, max_power=max_power, powered=np.ones(len(zones)), sun_scale=sun_scale)


def test_one_zone_by_hand():
    model = network(WEST)
    # outdoors: 30 * 0.5 + 4 * 2.5 + 20 * 0.2 = 15 + 10 + 4 = 29 W/K; ground: 20 * 0.4 * 0.5 = 4 W/K; sum 33
    assert model.a == pytest.approx(np.array([[-33 / 73_500]]))
    # inputs [person heat (2 people), ground, outdoors, power, sun]; sun: 4 m2 * 0.252 * 0.12 * 1000 W/m2 = 120.96 W
    assert model.b * 73_500 == pytest.approx(np.array([[2.0, 4.0, 29.0, 1000.0, 120.96]]))


def test_two_zones_by_hand():
    model = network(WEST, EAST)
    # the shared wall runs over y = 1..5 (4 m, no x overlap) and 3 m of height: 3 * 4 * 2.0 = 24 W/K
    # west: 24 + 29 + 4 = 57 W/K on 73,500 J/K
    # east: C = 1225 * 4 * 4 * 3 = 58,800 J/K; outdoors 10 * 0.5 + 16 * 0.2 = 8.2; ground 16 * 0.4 * 0.5 = 3.2
    expected = np.array([[-57 / 73_500, 24 / 73_500], [24 / 58_800, -(24 + 8.2 + 3.2) / 58_800]])
    assert model.a == pytest.approx(expected)
    assert model.b[1] * 58_800 == pytest.approx([0, 3.2, 8.2, 0, 1000, 0])


def test_zone_order_does_not_matter():
    one, other = network(WEST, EAST), network(EAST, WEST)
    assert one.a == pytest.approx(other.a[::-1, ::-1])


def test_edges_of_zones():
    def wall(x, y, z=(0.0, 3.0)) -> float:
        return wall_conductance(WEST, Zone("b", x, y, z, floor_area=1), U)

    assert wall((4, 8), (7, 9)) == 0.0  # beside, 2 m apart
    assert wall((4, 8), (5, 9)) == 0.0  # they meet in a corner only
    assert wall((2, 8), (4, 9)) == pytest.approx(3 * math.hypot(2, 1) * 2.0)  # crossing boxes: the mitre
    assert wall((4, 8), (0, 5), (3.0, 6.0)) == 0.0  # another floor
    # Y ranges count from both sides: shared edge is y = 4..5, whichever zone comes first
    north = Zone("north", (4, 8), (4, 9), (0, 3), floor_area=20)
    assert wall_conductance(WEST, north, U) == wall_conductance(north, WEST, U) == pytest.approx(3 * 1 * 2.0)


def test_floors_are_coupled_by_overlap_and_only_the_lowest_meets_the_ground():
    above = replace(EAST, name="above", x=(2, 6), y=(0, 5), z=(3, 6), wall_net=0, roof=0)
    model = network(WEST, above)
    # overlap x 2..4, y 0..5 = 10 m2; floor and ceiling in series 3 * 6 / 9 = 2 W/m2K: 20 W/K
    assert model.a[0, 1] * 73_500 == pytest.approx(20.0)
    assert model.a[1, 0] * 73_500 == pytest.approx(20.0)  # C of above: 1225 * 4 * 5 * 3
    assert model.b[1, 1] == 0.0
    assert model.b[0, 1] * 73_500 == pytest.approx(4.0)


def test_floors_left_out_by_a_multiplier_still_connect_and_do_not_skip_a_floor():
    low = Zone("low", (0, 4), (0, 5), (0, 3), floor_area=20)
    middle = Zone("middle", (0, 4), (0, 5), (3, 6), floor_area=20)
    top = Zone("top", (0, 4), (0, 5), (9, 12), floor_area=20, roof=20)
    model = network(low, middle, top)
    coupled = model.a > 0
    assert coupled.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


def test_people_heat_the_zones_where_they_are():
    model = network(WEST, EAST)  # two people in west, none in east
    assert model.b[:, 0] == pytest.approx([2 / 73_500, 0.0])


def test_a_person_gives_off_what_energyplus_says():
    # T = 22, M = 120: 6.461927 + 113.62704 + 0.368261 + 157.065084 - 165.767976 + 18.664969 - 96.0982 + 54.596245
    #                  - 10.421783 = 78.495567
    assert person_heat(22.0, 120.0) == pytest.approx(78.4956, abs=1e-3)
    # T = 0: 6.461927 + 113.62704 + 0.368261 = 120.457228, and no more below
    assert person_heat(0.0) == person_heat(-30.0) == pytest.approx(120.4572, abs=1e-3)
    assert person_heat(45.0) == 0.0


def test_zero_order_hold_of_one_zone_by_hand():
    a_d, b_d = zero_order_hold(np.array([[-0.001]]), np.array([[0.002, 0.0]]), 600.0)
    # exp(-0.6) = 0.548812; gain (1 - 0.548812) / 0.001 * 0.002 = 0.902377
    assert a_d == pytest.approx(np.array([[0.548812]]), abs=1e-6)
    assert b_d == pytest.approx(np.array([[0.902377, 0.0]]), abs=1e-6)


@pytest.mark.parametrize("name", ["OfficeSmall", "Warehouse"])
def test_zero_order_hold_equals_fine_euler_integration(name):
    building = load_building(name)
    n = len(building.zones)
    model = thermal(building, max_power=8000.0, powered=np.ones(n), sun_scale=1000.0)
    inputs = np.array([0.0, 12.0, 35.0, *np.linspace(-0.3, 0.3, n), 0.7])
    start = np.linspace(18.0, 26.0, n)
    exact_a, exact_b = zero_order_hold(model.a, model.b, 3600.0)
    steps = 36_000
    temperature = start.copy()
    for _ in range(steps):
        temperature = temperature + 3600.0 / steps * (model.a @ temperature + model.b @ inputs)
    assert exact_a @ start + exact_b @ inputs == pytest.approx(temperature, abs=2e-3)


def test_isothermal_surroundings_are_a_steady_state():
    # Heat is conserved: with ground, outdoors and zones all at one temperature and no power, nothing moves.
    for name in BUILDINGS:
        building = load_building(name)
        n = len(building.zones)
        model = thermal(building, max_power=8000.0, powered=np.ones(n), sun_scale=1000.0)
        inputs = np.array([0.0, 17.0, 17.0, *[0.0] * n, 0.0])
        assert model.a @ np.full(n, 17.0) + model.b @ inputs == pytest.approx(np.zeros(n), abs=1e-12), name
        capacity = np.array([zone.capacity for zone in building.zones])
        heat = model.a * capacity[:, None]
        assert heat == pytest.approx(heat.T), name
        assert np.linalg.eigvals(model.a).real.max() < 0, name


def test_power_balances_losses_in_the_steady_state():
    model = network(WEST, EAST, max_power=1000.0)
    inputs = np.array([0.0, 10.0, 0.0, 0.5, 0.25, 0.0])
    west, east = -np.linalg.solve(model.a, model.b @ inputs)
    # 500 W + 250 W in = outdoors 29 W/K and 8.2 W/K, ground 4 W/K and 3.2 W/K above 10 degC
    assert 29 * west + 8.2 * east + 4 * (west - 10) + 3.2 * (east - 10) == pytest.approx(750.0)


#: Zones, and those that the design heats or cools, of EnergyPlus' models; floor area in m2.
TABLE = {
    "ApartmentHighRise": (90, 80, 7837),
    "ApartmentMidRise": (27, 24, 2351),
    "Hospital": (55, 55, 19890),
    "HotelLarge": (22, 22, 5834),
    "HotelSmall": (67, 54, 4014),
    "OfficeLarge": (23, 20, 24942),
    "OfficeMedium": (18, 15, 9964),
    "OfficeSmall": (6, 5, 1079),
    "OutPatientHealthCare": (118, 118, 3804),
    "RestaurantFastFood": (3, 2, 465),
    "RestaurantSitDown": (3, 2, 1022),
    "RetailStandalone": (5, 5, 2294),
    "RetailStripmall": (10, 10, 2090),
    "SchoolPrimary": (25, 25, 6871),
    "SchoolSecondary": (46, 46, 19592),
    "Warehouse": (3, 3, 4835),
}


def test_buildings_have_the_known_zones_and_areas():
    assert set(TABLE) == set(BUILDINGS)
    for name, (zones, conditioned, area) in TABLE.items():
        building = load_building(name)
        assert len(building.zones) == zones
        assert building.conditioned.sum() == conditioned
        assert sum(zone.floor_area for zone in building.zones) == pytest.approx(area, abs=1.0)


def test_small_office_is_the_published_one():
    building = load_building("OfficeSmall")
    assert [zone.people for zone in building.zones] == [9.0, 6.8, 4.1, 6.8, 4.1, 0.0]
    assert building.u.outwall == 0.514
    # core to south perimeter: 17.69 m of wall, 3.05 m high
    assert wall_conductance(building.zones[0], building.zones[1], building.u) == pytest.approx(17.69 * 3.05 * 6.299)


def test_unknown_building_names_the_nearest():
    with pytest.raises(ConfigError, match=r"OfficeSmal.*Did you mean 'OfficeSmall'.*Warehouse"):
        load_building("OfficeSmal")
