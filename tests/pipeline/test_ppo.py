"""Stage ppo: it learns, continues bit for bit, sees training days only, and loads nothing that could run."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sapwood.envs.hvac import Hvac
from sapwood.errors import DataError, Stopped, TrainingStopped
from sapwood.pipeline import ppo
from sapwood.pipeline.ppo import PpoOptions, TrainingDays, run, scaling_of
from sapwood.pipeline.ppo_policy import ENTRY, load_ppo
from sapwood.pipeline.trajectories import read
from sapwood.progress import Progress
from sapwood.signals import Stopping

FAMILY = Hvac(horizon=4)
SMALL = PpoOptions(
    total_steps=48, n_envs=2, rollout_steps=16, batch_size=8, n_epochs=2, hidden=(8,), record_days=3,
    checkpoint_every=16,
)  # fmt: skip


def quiet() -> Progress:
    return Progress(stream=io.StringIO())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    run(SMALL, FAMILY, folder, quiet(), seed=3)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(folder / "ppo_final.zip") as archive:
        return torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_the_stage_leaves(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "checkpoints", "ppo_final.zip", "ppo_trajectory.json", "training_curve.csv", "training_curve.png",
    ]  # fmt: skip
    file = read(trained / "ppo_trajectory.json")
    assert (file.controller, len(file.episodes), file.count) == ("ppo", 3, 12)
    policy = load_ppo(trained / "ppo_final.zip", FAMILY)
    assert file.model == policy.about
    for _, step in file.steps:
        observation = np.array([step.observation], np.float32)
        assert step.action == pytest.approx(policy.act(observation)[0].tolist(), abs=1e-6)
        assert step.value == pytest.approx(policy.value(observation)[0], rel=1e-6)
    lines = (trained / "training_curve.csv").read_text().splitlines()
    assert lines[0].startswith("steps,return,entropy,policy_loss,value_loss")
    assert [line.split(",")[0] for line in lines[1:]] == ["16", "32", "48"]
    assert (trained / "training_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_file_acts_as_stable_baselines_does(trained):
    """The same actions and values from our reading of the weights and from PPO.load, which unpickles."""
    from stable_baselines3 import PPO

    theirs, ours = PPO.load(trained / "ppo_final.zip", device="cpu"), load_ppo(trained / "ppo_final.zip", FAMILY)
    rng = np.random.default_rng(0)
    observations = rng.uniform(-10, 45, (50, 10)).astype(np.float32)
    assert ours.act(observations) == pytest.approx(theirs.predict(observations, deterministic=True)[0], abs=1e-6)
    values = theirs.policy.predict_values(torch.from_numpy(observations))[:, 0].detach().numpy()
    assert ours.value(observations) == pytest.approx(values * scaling_of(FAMILY, 3).reward, rel=1e-5)
    env = FAMILY.simulator()
    FAMILY.reset_simulator(env, FAMILY.tasks("train", 1, 0)[0])
    assert ours(env) == pytest.approx(ours.act(env.observation[None])[0], abs=0)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(trained, tmp_path):
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    torch.manual_seed(5)
    run(SMALL, FAMILY, tmp_path / "a", quiet(), seed=3)
    assert torch.initial_seed() == 5
    assert np.array_equal(np.random.get_state()[1], before)
    for name in ("ppo_final.zip", "ppo_trajectory.json", "training_curve.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (trained / name).read_bytes(), name
    run(SMALL, FAMILY, tmp_path / "b", quiet(), seed=4)
    assert not same(tmp_path / "b", trained)


def test_a_training_that_was_cut_short_continues_bit_for_bit(trained, tmp_path):
    run(SMALL.model_copy(update={"total_steps": 32}), FAMILY, tmp_path, quiet(), seed=3)
    assert not same(tmp_path, trained)
    result = run(SMALL, FAMILY, tmp_path, quiet(), seed=3)
    assert result.steps == 48
    assert same(tmp_path, trained)
    assert (tmp_path / "training_curve.csv").read_bytes() == (trained / "training_curve.csv").read_bytes()


def test_a_damaged_checkpoint_is_left_out_and_an_older_one_taken(trained, tmp_path):
    stream = io.StringIO()
    run(SMALL.model_copy(update={"total_steps": 32}), FAMILY, tmp_path, quiet(), seed=3)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    run(SMALL, FAMILY, tmp_path, Progress(stream=stream), seed=3)
    assert "damaged; left out" in stream.getvalue()
    assert "going on from step 16 of 48" in stream.getvalue()
    assert same(tmp_path, trained)


def test_checkpoints_of_other_options_are_not_continued(trained, tmp_path):
    stream = io.StringIO()
    run(SMALL.model_copy(update={"gamma": 0.5}), FAMILY, tmp_path, quiet(), seed=3)
    run(SMALL, FAMILY, tmp_path, Progress(stream=stream), seed=3)
    assert "training begins anew" in stream.getvalue()
    assert same(tmp_path, trained)
    shorter = SMALL.model_copy(update={"total_steps": 16})
    assert run(shorter, FAMILY, tmp_path, quiet(), seed=3).steps == 16
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_signal_saves_and_the_rest_is_the_same(trained, tmp_path, monkeypatch):
    """The signal comes in the middle of the second rollout, which is then played again."""
    with Stopping() as stopping:
        step, count = TrainingDays.step, [0]

        def counted(self, action):
            count[0] += 1
            if count[0] == 22:
                stopping.requested = signal.SIGINT
            return step(self, action)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingDays, "step", counted)
            with pytest.raises(Stopped, match=r"Ctrl-C at step 16 of 48; it is saved") as e:
                run(SMALL, FAMILY, tmp_path, quiet(), seed=3, stopping=stopping)
        assert e.value.exit_code == 130
        assert not (tmp_path / "ppo_final.zip").exists()
    run(SMALL, FAMILY, tmp_path, quiet(), seed=3)
    assert same(tmp_path, trained)


def test_a_killed_process_continues(trained, tmp_path):
    step = TrainingDays.step
    child = os.fork()
    if child == 0:
        TrainingDays.step = lambda self, action: (time.sleep(0.02), step(self, action))[1]
        run(SMALL, FAMILY, tmp_path, quiet(), seed=3)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "checkpoints").glob("step_*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "ppo_final.zip").exists()
    assert run(SMALL, FAMILY, tmp_path, quiet(), seed=3).steps == 48
    assert same(tmp_path, trained)


def test_it_learns_and_sees_training_days_only(tmp_path, monkeypatch):
    """Better than proportional control after 12 updates; no held-out day is simulated."""
    seen: set[int] = set()
    reset = Hvac.reset_simulator
    monkeypatch.setattr(
        Hvac, "reset_simulator", lambda self, env, task: (seen.add(task.metadata["day"]), reset(self, env, task))[1]
    )
    family = Hvac(time_res=900, max_power=2000, start="random", horizon=8)
    options = PpoOptions(total_steps=6144, rollout_steps=512, record_days=60, learning_rate=2e-3)
    result = run(options, family, tmp_path, quiet(), seed=0)
    assert len(seen) > 200
    assert seen <= set(family.days("train"))
    assert not seen & set(family.days("eval"))
    # Zero control has -54 on these days, proportional control -16, one-step-optimal -3.9.
    assert result.returns["ppo"] > result.returns["proportional"] > -25
    tasks = family.tasks("eval", 20, 0)
    policy = load_ppo(result.policy, family)
    from sapwood.pipeline.trajectories import play

    ours = np.mean([play(family, task, policy).total for task in tasks])
    nothing = np.mean([family.baselines()["zero"](task) for task in tasks])
    assert ours > 0.3 * nothing


def test_training_days_follow_each_other_by_seed_and_number():
    days = len(FAMILY.days("train"))
    first, again, other = (TrainingDays(FAMILY, 1.0, 0, number) for number in (0, 0, 1))
    tasks = [first.task(i) for i in range(2 * days)]
    assert [again.task(i) for i in range(2 * days)] == tasks
    assert [other.task(i) for i in range(2 * days)] != tasks
    assert sorted(task.metadata["day"] for task in tasks[:days]) == list(FAMILY.days("train"))
    assert [t.metadata["day"] for t in tasks[:days]] != [t.metadata["day"] for t in tasks[days:]]
    later = TrainingDays(FAMILY, 1.0, 0, 0, first=7)
    observation, _ = later.reset()
    env = FAMILY.simulator()
    assert np.array_equal(observation, FAMILY.reset_simulator(env, tasks[7]))
    total = 0.0
    for _ in range(4):
        _, reward, _, done, info = TrainingDays.step(later, np.zeros(1, np.float32))
        total += reward
    assert done
    assert info["return"] == pytest.approx(total)


def test_scaling_is_about_one():
    scaling = scaling_of(FAMILY, 0)
    assert scaling == scaling_of(FAMILY, 0)
    assert scaling.mean[:6] == (22.0,) * 6
    assert scaling.scale[:6] == (5.0,) * 6
    rng, sizes = np.random.default_rng(9), []
    env = FAMILY.simulator()
    for task in FAMILY.tasks("train", 40, 1):
        FAMILY.reset_simulator(env, task)
        for _ in range(4):
            sizes.append(-env.step(rng.uniform(-1, 1, 1).astype(np.float32))[1])
    assert np.mean(sizes) / scaling.reward == pytest.approx(1.0, abs=0.3)


def test_records_no_day_twice(tmp_path):
    stream = io.StringIO()
    options = SMALL.model_copy(update={"record_days": 9999, "total_steps": 16})
    result = run(options, FAMILY, tmp_path, Progress(stream=stream), seed=3)
    days = [episode.day for episode in read(result.trajectory).episodes]
    assert sorted(days) == list(FAMILY.days("train"))
    assert f"the world has {len(days)} training days" in stream.getvalue()


def test_a_diverged_training_is_told(tmp_path, monkeypatch):
    from stable_baselines3 import PPO

    monkeypatch.setattr(PPO, "train", lambda self: self.policy.log_std.data.fill_(float("nan")))
    with pytest.raises(TrainingStopped, match=r"non-finite before step \d+; lower ppo.learning_rate"):
        run(SMALL, FAMILY, tmp_path, quiet(), seed=3)
    assert not (tmp_path / "ppo_final.zip").exists()


# --- files that are not ours -------------------------------------------------------------------------------------


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def foreign(path: Path, family: Hvac = FAMILY) -> Path:
    from stable_baselines3 import PPO

    PPO("MlpPolicy", family.simulator(), n_steps=8, batch_size=8, device="cpu", seed=0).save(path)
    return path


def repacked(source: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as made:
        for name in old.namelist():
            content = changes.get(name, old.read(name))
            if content is not None:
                made.writestr(name, content)
    return target


def test_a_foreign_file_is_refused_unless_trusted(tmp_path):
    path = foreign(tmp_path / "theirs.zip")
    options = SMALL.model_copy(update={"policy": path})
    with pytest.raises(DataError, match=r"theirs\.zip: a file of Stable-Baselines3 that Sapwood did not write"):
        run(options, FAMILY, tmp_path / "out", quiet())
    assert not any((tmp_path / "out").iterdir())
    result = run(options.model_copy(update={"trust": True}), FAMILY, tmp_path / "out", quiet())
    file = read(result.trajectory)
    assert (result.steps, len(file.episodes), file.model["foreign"]) == (0, 3, True)
    with pytest.raises(DataError, match="did not write"):
        load_ppo(result.policy, FAMILY)
    with pytest.raises(DataError, match="10 observations and 1 powers, and this world has 7 and 1"):
        load_ppo(path, Hvac(building="Warehouse"), trust=True)


def test_what_a_file_holds_is_never_run(trained, tmp_path):
    """Neither the pickles that Stable-Baselines3 reads nor weights with something else inside."""
    touched = tmp_path / "touched"
    bad = pickle.dumps(Exploit(touched))
    torch_bad = io.BytesIO()
    torch.save({"x": Exploit(touched)}, torch_bad)
    path = repacked(trained / "ppo_final.zip", tmp_path / "a.zip", {"policy.pth": torch_bad.getvalue()})
    with pytest.raises(DataError, match="holds more than weights"):
        load_ppo(path, FAMILY)
    path = repacked(trained / "ppo_final.zip", tmp_path / "b.zip", {"policy.pth": bad})
    with pytest.raises(DataError):
        load_ppo(path, FAMILY)
    import base64

    with zipfile.ZipFile(trained / "ppo_final.zip") as archive:
        data = json.loads(archive.read("data"))
    data["policy_class"][":serialized:"] = base64.b64encode(bad).decode()
    path = repacked(trained / "ppo_final.zip", tmp_path / "c.zip", {"data": json.dumps(data).encode()})
    load_ppo(path, FAMILY)  # our own reading doesn't look at it
    without = repacked(path, tmp_path / "d.zip", {ENTRY: None})
    with pytest.raises(DataError, match="did not write"):
        load_ppo(without, FAMILY)
    assert not touched.exists()


def entry(trained: Path, **changes) -> dict[str, bytes]:
    with zipfile.ZipFile(trained / "ppo_final.zip") as archive:
        return {ENTRY: json.dumps({**json.loads(archive.read(ENTRY)), **changes}).encode()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda t: entry(t, format=9), "not of format 1"),
        (lambda t: entry(t, scaling={"mean": [1], "scale": [0], "reward": 1}), "scaling of observations"),
        (lambda t: entry(t, scaling={"mean": [1], "scale": [1], "reward": float("nan")}), "scaling of rewards"),
        (lambda t: entry(t, scaling={"mean": [1.0], "scale": [1.0], "reward": 1.0}), "a layer of the policy is"),
        (lambda t: entry(t, world=None), "has no world"),
        (lambda t: {ENTRY: b"[" * 100_000}, "not a policy of Sapwood's"),
        (lambda t: {"policy.pth": b""}, "not a policy of Sapwood's"),
        (lambda t: {"policy.pth": None}, "not a policy of Sapwood's"),
    ],
)
def test_a_damaged_policy_is_told(trained, tmp_path, changes, said):
    path = repacked(trained / "ppo_final.zip", tmp_path / "p.zip", changes(trained))
    with pytest.raises(DataError, match=r"p\.zip: ") as error:
        load_ppo(path, FAMILY)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(trained, tmp_path):
    state = weights(trained)
    state["action_net.bias"][0] = float("nan")
    made = io.BytesIO()
    torch.save(state, made)
    path = repacked(trained / "ppo_final.zip", tmp_path / "p.zip", {"policy.pth": made.getvalue()})
    with pytest.raises(DataError, match=r"action_net\.bias has a number that is not finite"):
        load_ppo(path, FAMILY)


def test_a_cut_or_missing_file_and_another_world(trained, tmp_path):
    with pytest.raises(DataError, match="no such policy; make it with `sapwood pipeline RECIPE --stage ppo`"):
        load_ppo(tmp_path / "no.zip", FAMILY)
    (tmp_path / "cut.zip").write_bytes((trained / "ppo_final.zip").read_bytes()[:-100])
    with pytest.raises(DataError, match="not a policy file, or a damaged one"):
        load_ppo(tmp_path / "cut.zip", FAMILY)
    with pytest.raises(DataError, match="trained in another world: its building is OfficeSmall"):
        load_ppo(trained / "ppo_final.zip", Hvac(building="Warehouse"))
    with pytest.raises(DataError, match="its control is uniform"):
        load_ppo(trained / "ppo_final.zip", Hvac(control="per_zone"))


def test_every_option_changes_something(trained, tmp_path, monkeypatch):
    """Each training option gives another policy."""
    monkeypatch.setattr(ppo, "_picture", lambda rows, family: b"")
    others = {
        "learning_rate": 1e-3, "gamma": 0.9, "n_envs": 1, "rollout_steps": 8, "batch_size": 4, "n_epochs": 1,
        "gae_lambda": 0.5, "clip_range": 0.01, "ent_coef": 0.1, "vf_coef": 1.0, "max_grad_norm": 0.01,
        "hidden": (4, 4), "log_std_init": 0.0,
    }  # fmt: skip
    assert set(others) == set(PpoOptions.model_fields) - ppo._FREE
    for name, value in others.items():
        folder = tmp_path / name
        run(SMALL.model_copy(update={name: value, "record_days": 1}), FAMILY, folder, quiet(), seed=3)
        assert not same(folder, trained), name
