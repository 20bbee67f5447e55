"""Targets and prices by hour, people by schedule, and a thermal mass: by hand, in reward, observation and prompt."""

import copy
import math

import numpy as np
import pytest

from sapwood.envs.hvac import Building, Hvac, HvacEnv, UValues, Zone, load_building
from sapwood.envs.hvac.building import thermal
from sapwood.envs.hvac.controllers import GRID, one_step_optimal, proportional
from sapwood.envs.hvac.occupancy import occupancy_profiles
from sapwood.envs.hvac.physics import physics
from sapwood.errors import ConfigError

U = UValues(intwall=2.0, floor=3.0, outwall=0.5, roof=0.2, ceiling=6.0, groundfloor=0.4, window=2.5)
ONE_ZONE = Building("one", (Zone("z", (0, 4), (0, 5), (0, 3), 20, wall_net=30, window=4, roof=20, people=2),), U)
OFF = np.zeros(6, np.float32)
PRICES = [0.1] * 8 + [0.3] * 12 + [0.2] * 4


def seen(env, steps, action=OFF, **start):
    """Observations and rewards of a few steps, the first observation included."""
    observations, rewards = [env.reset(options={"day": 10, **start})[0]], []
    for _ in range(steps):
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return observations, rewards


def test_the_target_is_that_of_the_hour():
    env = HvacEnv(time_res=3600, target=17.0, setback={6: 21.0, 22: 17.5})
    observations, rewards = seen(env, 24)
    assert env.observation_names[6:] == [
        "outdoor temperature", "ground temperature", "irradiance", "people heat", "target",
    ]  # fmt: skip
    # before the first hour `target`, from each hour on its own
    assert [o[10] for o in observations[:24]] == [17.0] * 6 + [21.0] * 16 + [17.5] * 2
    # what is paid for a step is the distance from the target of the hour in which it began
    for before, after, reward in zip(observations, observations[1:], rewards, strict=False):
        assert reward == pytest.approx(-0.999 * np.linalg.norm(after[:5] - before[10]), abs=1e-4)
    # zones start at the target of their hour
    assert env.reset(options={"day": 10, "hour": 7})[0][:6].tolist() == [21.0] * 6
    assert env.reset(options={"day": 10})[0][:6].tolist() == [17.0] * 6
    assert env.observation_space.contains(env.observation)


def test_controllers_follow_the_target_of_the_hour():
    env = HvacEnv(time_res=3600, control="uniform", target=20.0, setback={12: 24.0})
    for hour, wanted in ((11, 20.0), (12, 24.0)):
        env.reset(options={"day": 10, "hour": hour, "initial_temperature": 22.0})
        assert np.sign(proportional(env)[0]) == np.sign(wanted - 22.0)
        free, gain = env.response()
        best = float(one_step_optimal(env)[0])
        assert (free + gain[:, 0] * best)[:5].mean() == pytest.approx(wanted, abs=0.5)


def test_energy_at_a_price():
    env = HvacEnv(time_res=1800, price=PRICES, price_weight=0.5)
    plain = HvacEnv(time_res=1800)
    action = np.array([0.5, -0.25, 0.0, 0.0, 0.0, 1.0], np.float32)
    for hour, price in ((7, 0.1), (8, 0.3), (23, 0.2)):
        observation = env.reset(options={"day": 10, "hour": hour})[0]
        plain.reset(options={"day": 10, "hour": hour})
        assert observation[10] == pytest.approx(price)
        _, reward, _, _, info = env.step(action)
        # 0.75 of 8 kW for half an hour is 3 kWh; the attic is not powered
        assert info["kwh"] == pytest.approx(3.0)
        assert info["cost"] == pytest.approx(3.0 * price)
        assert reward == pytest.approx(plain.step(action)[1] - 0.5 * 3.0 * price)


def test_a_flat_price_is_not_observed_and_none_changes_nothing():
    flat, plain = HvacEnv(price=0.25), HvacEnv()
    assert flat.observation_space == plain.observation_space
    assert "cost" in seen_info(flat)
    assert set(seen_info(plain)) == {"energy", "comfort", "temperatures", "day", "step"}


def seen_info(env):
    env.reset(options={"day": 1})
    return env.step(OFF)[4]


def test_greedy_control_minds_the_price():
    def rewards(price):
        env = HvacEnv(control="uniform", time_res=900, price=price)
        env.reset(options={"day": 10, "hour": 9, "initial_temperature": 20.0})
        best = float(one_step_optimal(env)[0])
        return best, [copy.deepcopy(env).step(np.array([a], np.float32))[1] for a in GRID]

    for price in (0.01, 0.9, 50.0):
        best, grid = rewards(price)
        assert grid[round(best * 100) + 100] == pytest.approx(max(grid), abs=1e-9)
    assert rewards(50.0)[0] == 0.0 < rewards(0.01)[0]
    # per zone: no action near the best one is better
    env = HvacEnv(time_res=900, price=2.0)
    env.reset(options={"day": 10, "hour": 9, "initial_temperature": [17.0, 19.0, 21.0, 21.5, 23.0, 20.0]})
    best = one_step_optimal(env)
    paid = env.fork().step(best.astype(np.float32))[1]
    rng = np.random.default_rng(0)
    near = [env.fork().step((best + rng.normal(0, 0.03, 6)).astype(np.float32))[1] for _ in range(200)]
    assert paid >= max(near) - 1e-3


@pytest.mark.parametrize("name", ["OfficeSmall", "SchoolPrimary"])
def test_schedules_are_those_of_the_models(name):
    profiles, of_hour = occupancy_profiles(load_building(name))
    assert of_hour.shape == (8760,)
    assert profiles.min() == 0.0
    assert profiles.max() <= 1.0
    zones = [zone.name for zone in load_building(name).zones]
    shares = profiles[of_hour].reshape(365, 24, -1)
    if name == "OfficeSmall":
        # BLDG_OCC_SCH_WO_SB of the model, weekdays; nobody on Sunday, 1 January, and Saturday
        north = zones.index("PERIMETER_ZN_3")
        assert shares[1, 6:13, north].tolist() == [0.11, 0.21, 1.0, 1.0, 1.0, 1.0, 0.61]
        assert shares[[0, 6, 7]].max() == 0.0
        assert shares[:, :, zones.index("ATTIC")].max() == 0.0
    else:
        # in summer, from mid June to mid September, other days than in term
        room = zones.index("CORNER_CLASS_1_POD_1_ZN_1_FLR_1")
        assert shares[100, :, room].tolist() != shares[198, :, room].tolist()
        assert shares[100, :, room].tolist() == shares[107, :, room].tolist()


def test_people_by_schedule_heat_their_own_zones():
    env, nobody = HvacEnv(occupancy="schedule", time_res=3600), HvacEnv(time_res=3600)
    for world in (env, nobody):
        world.reset(options={"day": 2, "hour": 12})  # Tuesday noon: 1 in the core, 0.61 in the perimeter by WO_SB
    present = env.people_heat / 78.4956  # W a person at 22 degC
    shares = occupancy_profiles(load_building("OfficeSmall"))
    expected = shares[0][shares[1][2 * 24 + 12]] * [zone.people for zone in load_building("OfficeSmall").zones]
    assert present == pytest.approx(expected, abs=1e-4)
    assert env.people_present == pytest.approx(expected.sum())
    observation = env.observation
    assert observation[9] == pytest.approx(expected.sum() * 78.4956 / 1000, abs=1e-4)
    # the reply of the linear model to these watts alone
    free, _ = env.response()
    rise = env.step(OFF)[4]["temperatures"] - nobody.step(OFF)[4]["temperatures"]
    assert rise == pytest.approx(env.physics.warming @ (expected * 78.4956), abs=1e-4)
    assert env.temperatures == pytest.approx(free)


def test_everybody_by_schedule_is_everybody_always():
    # a schedule of ones must be what `always` does with its one input for all zones
    always, env = HvacEnv(occupancy="always", episode_len=5), HvacEnv(occupancy="schedule", episode_len=5)
    env._shares = np.array([[zone.people for zone in env.physics.building.zones]])
    env._columns = env._shares @ env.physics.warming.T
    env._profile = [0] * 8760
    for one, other in zip(seen(always, 5)[0], seen(env, 5)[0], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_mass_by_hand():
    # ONE_ZONE: air 73,500 J/K, 29 W/K to outdoors, 4 W/K to the ground (test_hvac_building); a mass of 9 times the air
    # at 5 W/Km2 x 20 m2 = 100 W/K
    network = thermal(
        ONE_ZONE, max_power=1000.0, powered=np.ones(1), sun_scale=1000.0, thermal_mass=10.0, mass_coupling=5.0
    )
    air, mass = 73_500.0, 661_500.0
    assert network.a == pytest.approx(np.array([[-129 / air, 100 / air], [100 / mass, -104 / mass]]))
    # people, ground, outdoors, power, sun
    assert network.b[0, [1, 2, 3]] == pytest.approx([0.0, 29 / air, 1000 / air])
    assert network.b[1] == pytest.approx([0.0, 4 / mass, 0.0, 0.0, 0.0])
    # without a coupling of its own: the air's heat capacity, ten times
    lumped = thermal(ONE_ZONE, max_power=1000.0, powered=np.ones(1), sun_scale=1000.0, thermal_mass=10.0)
    assert lumped.a == pytest.approx(np.array([[-33 / (10 * air)]]))


def test_a_loosely_coupled_mass_is_the_air_alone_and_a_tight_one_is_one_body():
    def day(**options):
        env = HvacEnv(time_res=900, episode_len=96, **options)
        return np.array(seen(env, 96, np.full(6, 0.2, np.float32))[0])[:, :5]

    # ground and inner walls hang on the mass, so compare with a building that has neither: only the mass differs
    assert np.abs(day(thermal_mass=20.0, mass_coupling=1000.0) - day(thermal_mass=20.0)).max() < 1.0
    assert np.abs(day(thermal_mass=20.0) - day()).max() > 3.0
    fast, slow = day(thermal_mass=100.0, mass_coupling=8.0), day(thermal_mass=100.0)
    # within a quarter of an hour the air moves by itself, over the day by the mass
    assert fast[1, 0] - 22.0 > 5 * (slow[1, 0] - 22.0)


def test_a_mass_is_part_of_response_and_fork():
    env = HvacEnv(thermal_mass="fitted", time_res=1800)
    assert env.physics.a_d.shape == (12, 12)
    env.reset(options={"day": 40, "initial_temperature": 18.0})
    env.step(np.full(6, 0.5, np.float32))
    twin = env.fork()
    twin.step(np.full(6, -1.0, np.float32))
    free, gain = env.response()
    action = np.full(6, 0.25, np.float32)
    found = env.step(action)[4]["temperatures"]
    assert found == pytest.approx(free + gain @ action)
    # zones and masses settle: held at no power and constant weather they meet, so a year's bounds hold
    assert env.observation_space.contains(env.observation)


def test_the_default_is_the_air_alone():
    assert np.array_equal(HvacEnv().physics.a_d, HvacEnv(thermal_mass=1.0).physics.a_d)
    assert HvacEnv().physics.a_d.shape == (6, 6)


def test_a_fork_leaves_the_original_alone():
    env = HvacEnv(episode_len=10)
    env.reset(seed=3)
    before = env.observation
    twin = copy.deepcopy(env)
    twin.step(np.ones(6, np.float32))
    assert env.observation.tolist() == before.tolist()
    assert twin.temperatures[0] > env.temperatures[0]
    assert twin.np_random is not env.np_random
    assert twin.physics is env.physics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setback": {24: 20.0}}, "setback from hour 24; give whole hours"),
        ({"setback": {6.5: 20.0}}, "setback from hour 6.5"),
        ({"setback": {math.nan: 20.0}}, "setback from hour nan"),
        ({"setback": {6: math.nan}}, "setback target nan from hour 6"),
        ({"setback": {6: 99.0}}, "setback target 99 from hour 6; give -40..60"),
        ({"setback": ((8, 20.0), (6, 21.0))}, "setback hour 6 comes after hour 8"),
        ({"price": [0.1] * 23}, "price has 23 numbers; give one, or 24"),
        ({"price": [0.1] * 23 + [math.nan]}, "price of hour 23 is nan"),
        ({"price": math.inf}, "price of hour 0 is inf"),
        ({"price": 0.1, "price_weight": -1.0}, "price_weight -1"),
        ({"price_weight": 2.0}, "price_weight 2.*not given"),
        ({"thermal_mass": 0.0}, "thermal_mass 0: give a multiple"),
        ({"thermal_mass": math.nan}, "thermal_mass nan"),
        ({"thermal_mass": "heavy"}, "thermal_mass 'heavy'"),
        ({"thermal_mass": "fitted", "mass_coupling": 3.0}, "'fitted' stands for both"),
        ({"mass_coupling": 5.0}, "mass_coupling 5 with thermal_mass 1"),
        ({"thermal_mass": 10.0, "mass_coupling": 0.0}, "mass_coupling 0"),
        ({"building": ONE_ZONE, "occupancy": "schedule"}, "'one' given as zones has no schedule"),
        ({"building": ONE_ZONE, "thermal_mass": "fitted"}, "building 'one' has no fitted value"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, message):
    with pytest.raises(ConfigError, match=message):
        HvacEnv(**options)
    physics.cache_clear()


def test_the_prompt_tells_target_and_price_of_the_hour():
    family = Hvac(target=17, setback={6: 21, 22: 17.5}, price=PRICES, time_res=3600, occupancy="schedule", few_shot=1)
    env = family.make(family.tasks("eval", 1, seed=0)[0])
    system, *_, state = env.start().messages
    assert "Keep them at the target that each state gives: below target heat" in system.content
    assert "the power used, which costs the price that each state gives." in system.content
    assert "people 0, price 0.1 per kWh" in state.content
    assert "Zones 17.0 C, target 17 C; weather aside, target needs 0.00." in state.content
    plain = Hvac(price=0.25, time_res=3600, few_shot=1)
    system, *_, state = plain.make(plain.tasks("eval", 1, seed=0)[0]).start().messages
    assert "Keep them at 22 C: below target heat" in system.content
    assert "the power used, which costs 0.25 per kWh." in system.content
    assert "price" not in state.content
    assert "targets by hour, energy at a price" in family.describe()


def test_tasks_start_at_the_target_of_their_hour():
    family = Hvac(target=17, setback={6: 23}, start="random", start_spread=1.0, time_res=900, horizon=8)
    hours = set()
    for task in family.tasks("train", 40, seed=0):
        hour, initial = task.metadata["hour"], np.mean(task.metadata["initial_temperature"])
        assert abs(initial - (17 if hour < 6 else 23)) < 1.5
        hours.add(hour < 6)
    assert hours == {True, False}


def test_options_survive_json():
    family = Hvac(setback={22: 17, 6: 21}, price=PRICES, thermal_mass="fitted")
    assert family.setback == ((6, 21), (22, 17))
    again = Hvac.model_validate_json(family.model_dump_json())
    assert again == family
    assert hash(again) == hash(family)
    assert again.simulator().physics is family.simulator().physics
