"""The Gymnasium environment: checkers, rewards by hand, bounds, determinism, refusals."""

import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

from sapwood.envs.hvac import BUILDINGS, Building, HvacEnv, UValues, Zone
from sapwood.envs.hvac.building import thermal, zero_order_hold
from sapwood.envs.hvac.controllers import one_step_optimal, proportional
from sapwood.errors import ConfigError

U = UValues(intwall=2.0, floor=3.0, outwall=0.5, roof=0.2, ceiling=6.0, groundfloor=0.4, window=2.5)
ONE_ZONE = Building("one", (Zone("z", (0, 4), (0, 5), (0, 3), 20, wall_net=30, window=4, roof=20, people=2),), U)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"control": "uniform", "time_res": 3600, "episode_len": 24},
        {"occupancy": "office_hours", "powered": "all", "pnorm": 1.0},
    ],
)
def test_passes_the_checkers_of_gymnasium_and_stable_baselines(options):
    from stable_baselines3.common.env_checker import check_env as stable_baselines_check

    env = gym.make("sapwood/Hvac-v0", **options).unwrapped
    with warnings.catch_warnings():
        # Both advise normalised spaces; degrees are what the text world and a reader need.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(normalize|Not able to test alternative render).*")
        gymnasium_check(env)
        stable_baselines_check(env)


def test_defaults_are_the_published_ones():
    env = HvacEnv()
    assert (env.beta, env.pnorm, env.target, env.physics.time_res, env.episode_len) == (0.999, 2.0, 22.0, 300.0, 288)
    assert env.observation_space.shape == (10,)  # 6 zones + 4
    assert env.action_space.shape == (6,)


def test_one_step_by_hand():
    env = HvacEnv(ONE_ZONE, "Hot_Dry", time_res=600, max_power=1000.0)
    observation, _ = env.reset(options={"day": 10, "hour": 12, "initial_temperature": 20.0})
    # the network of test_hvac_building: 33 W/K in all, C = 73,500 J/K; exp(-33 * 600 / 73500) = exp(-0.2693878)
    decay = math.exp(-0.2693878)
    outdoor, ground, sun = (float(observation[i]) for i in (1, 2, 3))
    sun_heat = 4 * 0.252 * 0.12 * env.physics.weather.ghi.max() * sun
    steady = (29 * outdoor + 4 * ground + 500 + sun_heat) / 33
    expected = steady + (20 - steady) * decay
    observation, reward, terminated, truncated, info = env.step(np.array([0.5], np.float32))
    assert observation[0] == pytest.approx(expected, abs=1e-4)
    assert reward == pytest.approx(-0.001 * 24 * 0.5 - 0.999 * abs(expected - 22.0), abs=1e-4)
    assert (terminated, truncated) == (False, False)
    assert info["energy"] == 0.5
    assert info["comfort"] == pytest.approx(abs(expected - 22.0), abs=1e-4)
    assert info["temperatures"] == pytest.approx([expected], abs=1e-4)


def test_reward_norms_cover_powered_zones_only():
    env = HvacEnv("OfficeSmall", time_res=900)
    env.reset(options={"day": 200, "hour": 12})
    action = np.array([0.3, -0.4, 0.0, 0.0, 0.0, 1.0], np.float32)  # the last zone, the attic, is not powered
    _, reward, _, _, info = env.step(action)
    assert info["energy"] == pytest.approx(0.5)  # hypot(0.3, 0.4)
    comfort = np.linalg.norm(info["temperatures"][:5] - 22.0)
    assert reward == pytest.approx(-0.024 * 0.5 - 0.999 * comfort, abs=1e-6)
    # norm of order 1, twice the scale, no weight on energy
    env = HvacEnv("OfficeSmall", time_res=900, pnorm=1.0, beta=1.0, reward_scale=2.0)
    env.reset(options={"day": 200, "hour": 12})
    _, reward, _, _, info = env.step(action)
    assert reward == pytest.approx(-2.0 * np.abs(info["temperatures"][:5] - 22.0).sum())


def test_uniform_control_is_per_zone_control_with_equal_powers():
    uniform, per_zone = HvacEnv(control="uniform"), HvacEnv()
    for env in (uniform, per_zone):
        env.reset(options={"day": 40})
    one = uniform.step(np.array([-0.25], np.float32))
    many = per_zone.step(np.full(6, -0.25, np.float32))
    assert one[0] == pytest.approx(many[0])
    assert one[1] == pytest.approx(many[1])


def test_powered_all_reaches_the_attic():
    attic = {}
    for powered in ("conditioned", "all"):
        env = HvacEnv(powered=powered)
        env.reset(options={"day": 0})
        attic[powered] = env.step(np.ones(6, np.float32))[0][5]
    # 8 kW for 300 s on 1225 * 28.89 * 19.66 * 3.28 J/K is 1.05 K less what leaks away meanwhile
    assert 0.8 < attic["all"] - attic["conditioned"] < 1.06


def test_observation_order_matches_bounds_and_weather():
    env = HvacEnv(occupancy="always")
    observation, _ = env.reset(options={"day": 180, "hour": 14})
    p, t = env.physics, env.time
    assert t == 180 * 288 + 14 * 12
    assert observation[6:9] == pytest.approx([p.outdoor[t], p.ground[t], p.sun[t]], rel=1e-6)
    assert observation[9] == pytest.approx(30.8 * 78.4956 / 1000, abs=1e-3)  # 30.8 people at 22 degC
    space = env.observation_space
    assert isinstance(space, gym.spaces.Box)
    assert (space.low[8], space.high[8]) == (0.0, 1.0)
    assert space.high[6] == pytest.approx(p.outdoor.max() + 1)
    assert space.high[7] == pytest.approx(p.ground.max() + 1)


@pytest.mark.parametrize("power", [-1.0, 1.0])
def test_bounds_hold_under_full_power_from_the_worst_start(power):
    env = HvacEnv(time_res=3600, episode_len=400, powered="all", occupancy="always")
    env.reset(options={"day": 190, "initial_temperature": 60.0 * power if power > 0 else -40.0})
    for _ in range(400):
        observation, *_ = env.step(np.full(6, power, np.float32))
        assert env.observation_space.contains(observation)


def test_occupants_keep_office_hours():
    env = HvacEnv(occupancy="office_hours", time_res=3600, episode_len=24)
    env.reset(options={"day": 3})
    present = []
    for _ in range(24):
        present.append(env.people_present)
        env.step(np.zeros(6, np.float32))
    assert present == pytest.approx([0.0] * 8 + [30.8] * 10 + [0.0] * 6)
    warm, cold = HvacEnv(occupancy="always"), HvacEnv()
    for world in (warm, cold):
        world.reset(options={"day": 3})
    # the core has 9 people of 78.5 W: 706 W on 559,131 J/K for 300 s is 0.38 K less leaks
    rise = warm.step(np.zeros(6, np.float32))[0][0] - cold.step(np.zeros(6, np.float32))[0][0]
    assert 0.2 < rise < 0.39


def test_a_day_ends_by_truncation_and_wraps_over_new_year():
    env = HvacEnv(episode_len=3, time_res=3600)
    env.reset(options={"day": 364, "hour": 22})
    ends = [env.step(np.zeros(6, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert env.time == 1


def test_same_seed_same_episode():
    def run(seed: int) -> list[float]:
        env = HvacEnv(episode_len=10)
        env.reset(seed=seed)
        rng = np.random.default_rng(7)
        return [env.day, *(env.step(rng.uniform(-1, 1, 6).astype(np.float32))[1] for _ in range(10))]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_observations_are_not_overwritten():
    env = HvacEnv()
    first, _ = env.reset(options={"day": 100})
    kept = first.copy()
    env.step(np.ones(6, np.float32))
    assert first == pytest.approx(kept)


def test_actions_are_clipped_and_response_predicts_the_step():
    env = HvacEnv(control="uniform", time_res=1800)
    env.reset(options={"day": 60, "hour": 15})
    free, gain = env.response()
    observation, *_ = env.step(np.array([5.0], np.float32))
    assert observation[:6] == pytest.approx(free + gain[:, 0], abs=1e-3)


def test_one_step_optimal_beats_its_neighbours():
    def reward(action: float) -> float:
        env = HvacEnv(control="uniform", time_res=900)
        env.reset(options={"day": 10, "initial_temperature": 20.0})
        return env.step(np.array([action], np.float32))[1]

    env = HvacEnv(control="uniform", time_res=900)
    env.reset(options={"day": 10, "initial_temperature": 20.0})
    best = float(one_step_optimal(env)[0])
    assert 0.05 < best < 0.95  # cold zones: heat
    assert reward(best) > max(reward(best - 0.01), reward(best + 0.01), reward(0.0))


@pytest.mark.parametrize("time_res", [300, 3600])
@pytest.mark.parametrize("control", ["uniform", "per_zone"])
def test_proportional_control_settles_at_every_time_step(time_res, control):
    # A swing of 20 K in hourly control was the fault of a fixed gain: deviations may not grow.
    env = HvacEnv("OfficeSmall", "Cool_Dry", control=control, time_res=time_res, episode_len=48)
    env.reset(options={"day": 5, "initial_temperature": 27.0})
    comfort = [env.step(proportional(env).astype(np.float32))[4]["comfort"] for _ in range(48)]
    zero = HvacEnv("OfficeSmall", "Cool_Dry", time_res=time_res, episode_len=48)
    zero.reset(options={"day": 5, "initial_temperature": 27.0})
    off = [zero.step(np.zeros(6, np.float32))[4]["comfort"] for _ in range(48)]
    assert sum(comfort) < 0.6 * sum(off)
    assert max(comfort[24:]) < max(off[24:])


@pytest.mark.parametrize("name", BUILDINGS)
def test_every_building_runs(name):
    env = HvacEnv(name, "Cool_Dry", time_res=3600, episode_len=2)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    for _ in range(2):
        observation, reward, *_ = env.step(np.zeros(env.zones, np.float32))
        assert env.observation_space.contains(observation)
        assert math.isfinite(reward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"building": "OficeSmall"}, "Did you mean 'OfficeSmall'"),
        ({"climate": "Mixed_Dry"}, "Albuquerque"),
        ({"control": "zone"}, "control.*'per_zone' or 'uniform'"),
        ({"occupancy": "weekend"}, "occupancy.*office_hours"),
        ({"powered": "some"}, "powered.*'conditioned' or 'all'"),
        ({"time_res": 7.5e4}, "time_res.*divide a day"),
        ({"time_res": 0}, "time_res"),
        ({"episode_len": 0}, "episode_len"),
        ({"beta": 1.5}, "beta"),
        ({"pnorm": 0.5}, "pnorm"),
        ({"max_power": 0.0}, "max_power"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, message):
    with pytest.raises(ConfigError, match=message):
        HvacEnv(**options)


@pytest.mark.parametrize(
    "options", [{"day": 365}, {"day": -1}, {"hour": 24}, {"initial_temperature": [1.0, 2.0]}, {"dya": 3},
                {"initial_temperature": float("nan")}, {"initial_temperature": 80.0}]
)  # fmt: skip
def test_bad_reset_options_are_refused(options):
    with pytest.raises(ConfigError, match="reset: "):
        HvacEnv().reset(options=options)


def test_a_zone_cut_off_from_everything_is_refused():
    lonely = Building("lonely", (Zone("z", (0, 4), (0, 5), (0, 3), floor_area=0.0),), U)
    with pytest.raises(ConfigError, match="exchanges no heat"):
        HvacEnv(lonely)


def test_step_matrices_are_the_exact_discretisation():
    env = HvacEnv("Warehouse", time_res=900)
    sun_scale = env.physics.weather.ghi.max()
    model = thermal(env.physics.building, max_power=8000.0, powered=np.ones(3), sun_scale=sun_scale)
    a_d, b_d = zero_order_hold(model.a, model.b, 900.0)
    assert env.physics.a_d == pytest.approx(a_d)
    assert env.physics.b_d == pytest.approx(b_d)
