"""EnergyPlus as the building, for real: layout, reward, determinism, crashes, and what is left behind."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

from sapwood.envs.hvac import Building, EnergyPlusEnv, Hvac, HvacEnv, UValues, Zone, energyplus_model
from sapwood.envs.hvac.controllers import episode_return, proportional, zero
from sapwood.errors import ConfigError, EnvError, MissingExtra

pytest.importorskip("pyenergyplus")

OFF = np.zeros(6, np.float32)


@pytest.fixture
def env():
    made = EnergyPlusEnv(episode_len=12)
    yield made
    made.close()


def temperatures(env: EnergyPlusEnv, actions, **start) -> np.ndarray:
    env.reset(options={"day": 200, **start})
    return np.array([env.step(np.asarray(action, np.float32))[4]["temperatures"] for action in actions])


def process_of(env: EnergyPlusEnv) -> int:
    assert env._session is not None
    return env._session._worker._process.pid


def folder_of(env: EnergyPlusEnv) -> Path:
    assert env._session is not None
    return Path(env._session._folder.name)


def running(pid: int) -> bool:
    """The process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_passes_the_checkers_of_gymnasium_and_stable_baselines():
    from stable_baselines3.common.env_checker import check_env as stable_baselines_check

    env = EnergyPlusEnv("RestaurantFastFood", control="uniform", time_res=3600, episode_len=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(normalize|Not able to test alternative render).*")
        gymnasium_check(env)
        stable_baselines_check(env)
    env.close()


def test_same_layout_and_reward_as_the_rc_model(env):
    rc = HvacEnv(episode_len=12)
    assert env.observation_space.shape == rc.observation_space.shape
    assert env.action_space == rc.action_space
    assert env.observation_names == rc.observation_names
    observation, info = env.reset(options={"day": 200, "hour": 14})
    assert env.observation_space.contains(observation)
    # 15 July 2 pm in Phoenix: hot, sunny, and the ground of the model's own table
    assert 35 < observation[6] < 45
    assert observation[7] == pytest.approx(rc.physics.ground[200 * 288], abs=1e-4)
    assert 0.7 < observation[8] < 1.0
    action = np.array([0.3, -0.4, 0.0, 0.0, 0.0, 1.0], np.float32)  # the attic is not powered
    observation, reward, terminated, truncated, info = env.step(action)
    assert (terminated, truncated) == (False, False)
    assert observation[:6] == pytest.approx(info["temperatures"], abs=1e-4)
    assert info["energy"] == pytest.approx(0.5)  # hypot(0.3, 0.4)
    comfort = np.linalg.norm(info["temperatures"][:5] - 22.0)
    assert reward == pytest.approx(-0.024 * 0.5 - 0.999 * comfort, abs=1e-6)


@pytest.mark.parametrize("start", [18.0, [20.0, 21.0, 22.0, 23.0, 24.0, 25.0]])
@pytest.mark.parametrize("hour", [0, 13])
def test_zones_begin_at_the_initial_temperature(env, start, hour):
    observation, info = env.reset(options={"day": 20, "hour": hour, "initial_temperature": start})
    assert observation[:6] == pytest.approx(np.broadcast_to(start, 6), abs=0.01)
    assert (env.day, env.hour, info["step"]) == (20, hour, 0)


def test_power_heats_its_zone_by_what_its_air_takes_up(env):
    off = temperatures(env, [OFF])[0]
    on = temperatures(env, [[1.0, 0, 0, 0, 0, 0]])[0]
    # 8 kW for 300 s on the air of 17.69 x 8.46 x 3.05 m, 1225 J/Km3 at most, is 4.3 K; walls take some of it
    assert 2.0 < on[0] - off[0] < 4.4
    assert on[1:] == pytest.approx(off[1:], abs=0.05)


def test_people_warm_the_zones_that_they_are_in():
    rows = {}
    for occupancy in ("none", "always"):
        env = EnergyPlusEnv(occupancy=occupancy, time_res=3600, episode_len=2)
        rows[occupancy] = temperatures(env, [OFF, OFF])[-1]
        env.close()
    warmer = rows["always"] - rows["none"]
    assert (warmer[:5] > 0.3).all()  # 4 to 9 people of 70 to 78 W
    assert abs(warmer[5]) < 0.2  # nobody is in the attic


def test_two_at_once_are_as_one_alone(env):
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 6))
    alone = temperatures(env, actions)
    other = EnergyPlusEnv(episode_len=12)
    env.reset(options={"day": 200})
    other.reset(options={"day": 20})
    together = []
    for action in actions:
        together.append(env.step(action.astype(np.float32))[4]["temperatures"])
        other.step(action.astype(np.float32))
    other.close()
    assert np.array(together).tolist() == alone.tolist()


def test_a_fork_goes_on_alike_and_apart(env):
    env.reset(options={"day": 100, "hour": 9})
    env.step(np.full(6, 0.3, np.float32))
    twin = env.fork()
    assert process_of(twin) != process_of(env)
    assert twin.observation.tolist() == env.observation.tolist()
    twin.step(np.full(6, -1.0, np.float32))
    again = env.fork()
    same = [e.step(np.full(6, 0.1, np.float32)) for e in (env, again)]
    assert same[0][0].tolist() == same[1][0].tolist()
    assert same[0][1] == same[1][1]
    for made in (twin, again):
        made.close()


def test_an_episode_crosses_new_year():
    env = EnergyPlusEnv(time_res=3600, episode_len=30)
    env.reset(options={"day": 364, "hour": 20})
    ends = [env.step(OFF)[2:4] for _ in range(30)]
    env.close()
    assert ends == [(False, False)] * 29 + [(False, True)]
    assert env.time == (364 * 24 + 20 + 30) % 8760


def test_a_crash_ends_the_episode_and_the_next_one_works(env):
    first = temperatures(env, [OFF, OFF])
    pid, folder = process_of(env), folder_of(env)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EnvError, match="signal 9"):
        env.step(OFF)
    assert not folder.exists()
    with pytest.raises(EnvError, match="reset the environment"):
        env.step(OFF)
    assert temperatures(env, [OFF, OFF]).tolist() == first.tolist()
    assert process_of(env) != pid


def test_a_step_that_hangs_is_killed_at_its_time_limit():
    env = EnergyPlusEnv(episode_len=12, step_timeout=1.0)
    env.reset(options={"day": 3})
    pid = process_of(env)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EnvError, match="EnergyPlus took longer than 1 s, so its process was killed"):
        env.step(OFF)
    assert not running(pid)
    env.reset(options={"day": 3})
    env.step(OFF)
    env.close()


def test_what_energyplus_itself_refuses_is_a_sentence():
    env = EnergyPlusEnv("RestaurantFastFood", max_power=1e6, time_res=3600)
    env.reset(options={"day": 3})
    with pytest.raises(EnvError, match=r"^EnergyPlus stopped with code 1: Severe .*out of bounds"):
        env.step(np.ones(3, np.float32))
    env.close()


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    closed, forgotten = EnergyPlusEnv(episode_len=4), EnergyPlusEnv(episode_len=4)
    left = []
    for env in (closed, forgotten):
        env.reset(options={"day": 3})
        env.step(OFF)
        left.append((process_of(env), folder_of(env)))
    closed.close()
    closed.close()
    del env, forgotten
    gc.collect()
    for pid, folder in left:
        assert not running(pid)
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal
from sapwood.envs.hvac import EnergyPlusEnv
env = EnergyPlusEnv(episode_len=4)
env.reset(options={"day": 3})
print(env._session._worker._process.pid, env._session._folder.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_parent_that_is_killed_leaves_neither_process_nor_files(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == -signal.SIGKILL
    pid, folder = run.stdout.split()
    deadline = time.monotonic() + 60
    while (running(int(pid)) or Path(folder).exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(int(pid))
    assert not Path(folder).exists()
    assert list(tmp_path.iterdir()) == []


def test_an_epw_file_of_ones_own(tmp_path):
    path = energyplus_model.weather_file("Phoenix", None)
    rows = {}
    for name, options in {"shipped": {}, "own": {"epw": path}}.items():
        env = EnergyPlusEnv(climate="Hot_Dry", episode_len=4, **options)
        rows[name] = temperatures(env, [OFF] * 4).tolist()
        env.close()
    assert rows["own"] == rows["shipped"]
    # dry-bulb and irradiance are fine, so the RC model reads it; EnergyPlus wants the header too
    lines = path.read_text(encoding="latin-1").splitlines()
    broken = tmp_path / "broken.epw"
    broken.write_text("\n".join([lines[0], *["NOTHING"] * 7, *lines[8:]]), encoding="latin-1")
    env = EnergyPlusEnv(epw=broken)
    with pytest.raises(EnvError, match="EnergyPlus stopped with code 1: "):
        env.reset(options={"day": 3})


def test_the_proportional_controller_holds_the_building():
    env = EnergyPlusEnv("OfficeSmall", "Cool_Dry", time_res=900, episode_len=96)
    returns = {}
    for name, controller in {"off": zero, "proportional": proportional}.items():
        env.reset(options={"day": 24})
        returns[name] = episode_return(env, controller)
    env.close()
    assert returns["proportional"] > 0.4 * returns["off"]


def test_the_fitted_mass_follows_energyplus_where_air_alone_does_not():
    """A free winter day in a climate that it was not fitted in: benchmarks/rc_vs_energyplus.py has the whole table."""
    truth = EnergyPlusEnv("OfficeSmall", "Cool_Humid", time_res=3600, episode_len=24)
    air = HvacEnv("OfficeSmall", "Cool_Humid", time_res=3600)
    fitted = HvacEnv("OfficeSmall", "Cool_Humid", time_res=3600, thermal_mass="fitted")
    error, days = {}, {}
    for name, env in {"truth": truth, "air": air, "fitted": fitted}.items():
        env.reset(options={"day": 24})
        days[name] = np.array([env.step(OFF)[4]["temperatures"][:5] for _ in range(24)])
        error[name] = float(((days[name] - days["truth"]) ** 2).mean() ** 0.5)
    truth.close()
    assert error["fitted"] < 1.5
    assert error["air"] > 10.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_res": 450}, "time_res 450.*whole minutes"),
        ({"climate": "Very_Cold"}, "International Falls.*epw: PATH"),
        ({"episode_len": 105_121}, "longer than a year"),
        ({"step_timeout": 0}, "step_timeout 0"),
        (
            {
                "building": Building(
                    "own",
                    (Zone("z", (0, 4), (0, 5), (0, 3), 20, wall_net=30),),
                    UValues(2.0, 3.0, 0.5, 0.2, 6.0, 0.4, 2.5),
                ),
                "thermal_mass": 1.0,
            },
            "models of the 16 named buildings only.*'own'",
        ),
    ],
)
def test_what_it_can_not_do_is_refused_in_a_sentence(options, message):
    with pytest.raises(ConfigError, match=message):
        EnergyPlusEnv(**options)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(energyplus_model, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"backend energyplus needs .*pip install 'sapwood\[energyplus\]'"):
        Hvac(backend="energyplus")


def test_the_model_keeps_the_envelope_and_nothing_of_the_plant():
    plan = energyplus_model.load_building("OfficeSmall")
    text = energyplus_model.envelope(plan).upper()
    kinds = [line.split(",")[0].rstrip(";") for line in text.splitlines()]
    assert kinds.count("ZONE") == 6
    assert kinds.count("BUILDINGSURFACE:DETAILED") == 43
    assert kinds.count("ZONEINFILTRATION:DESIGNFLOWRATE") == 6
    for gone in ("LIGHTS", "PEOPLE", "ELECTRICEQUIPMENT", "RUNPERIOD", "ZONECONTROL:THERMOSTAT", "OUTPUT:VARIABLE"):
        assert gone not in kinds


def test_the_text_world_plays_in_it():
    family = Hvac(backend="energyplus", time_res=3600, horizon=2)
    assert "OfficeSmall in EnergyPlus" in family.describe()
    task = family.tasks("eval", 1, seed=0)[0]
    env = family.make(task)
    text = env.start().messages
    # reach of the fitted model, not the air's 30 C
    assert "moves the zones about 10 C" in text[0].content
    step = env.step('{"power": 0.5}')
    assert step.observation is not None
    assert step.info["parsed"] == "json"
    pid = process_of(env.env)  # pyright: ignore[reportArgumentType]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EnvError):
        env.step('{"power": 0.5}')
    env.close()
    baselines = family.baselines()
    assert set(baselines) == {"random", "zero", "proportional"}
    assert baselines["zero"](task) < 0


def test_stable_baselines_trains_in_it():
    from stable_baselines3 import PPO

    env = EnergyPlusEnv("RestaurantFastFood", control="uniform", time_res=3600, episode_len=8)
    learner = PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    before = learner.policy.action_net.weight.detach().clone()
    learner.learn(16)
    assert learner.num_timesteps == 16
    assert not before.equal(learner.policy.action_net.weight)
    env.close()
