"""Trajectory files: what is written reads back the same, and what is damaged is told by its place."""

from __future__ import annotations

import json
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest

from sapwood.envs.hvac import Hvac
from sapwood.envs.hvac.controllers import one_step_optimal, proportional
from sapwood.envs.hvac.layout import action_of, powers_of, world_of
from sapwood.envs.hvac.prompt import describe
from sapwood.errors import DataError, StorageError
from sapwood.pipeline.trajectories import (
    Decision,
    Episode,
    Reply,
    TrajectoryFile,
    check_world,
    play,
    prompt_id,
    read,
    recorded,
    write,
)
from sapwood.types import Message

UNIFORM = Hvac(horizon=4)
PER_ZONE = Hvac(horizon=3, control="per_zone")
TRUNK = (Message("system", "You heat."), Message("user", "Zones 20 C"), Message("assistant", '{"power": 0.1}'))


def ppo_file(family: Hvac = UNIFORM, count: int = 2) -> TrajectoryFile:
    tasks = family.tasks("train", count, seed=0)
    return recorded(family, "ppo", 0, [play(family, task, proportional, lambda x: x.sum(1)) for task in tasks])


def llm_file() -> TrajectoryFile:
    tokens = {"token_ids": (5, 6), "sampled_logprobs": (-0.5, -1.25), "kept_logmass": (0.0, -0.125)}
    other = Reply("no \ud800 <b>", (0.0,), -9.0, "failed", True, **tokens)
    step = Decision(
        0, tuple(map(float, range(10))), (0.25,), -1.5, 0.5, 1.25,
        prompt=prompt_id(TRUNK), state="Zones 21 C", reply='{"power": 0.25}', parsed="json", temperature=0.7,
        others=(other, changed(other, reply="0", energy=0.5, comfort=2.0)), **tokens,
    )  # fmt: skip
    episode = Episode("hvac-train-0-0-day3", 3, 0, 17, -1.5, (step,))
    model = {"name": "smollm2-135m", "adapter": None}
    return TrajectoryFile("llm", 0, world_of(UNIFORM), (episode,), model, {prompt_id(TRUNK): TRUNK})


def damaged(path: Path, change, file: TrajectoryFile | None = None) -> str:
    """What `read` says of a file after a change to its JSON."""
    write(path, file or llm_file())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read(path)
    return str(error.value)


@pytest.mark.parametrize("make", [ppo_file, llm_file, lambda: ppo_file(PER_ZONE)])
def test_what_is_written_reads_back_the_same(tmp_path, make):
    file = make()
    path = write(tmp_path / "a" / "t.json", file)
    again = read(path)
    assert again == file
    first = path.read_bytes()
    write(path, again)
    assert path.read_bytes() == first
    assert again.source == str(path)
    assert not list(path.parent.glob("*.part"))


def test_layout_of_the_file_is_the_documented_one(tmp_path):
    path = write(tmp_path / "t.json", ppo_file())
    content = json.loads(path.read_text())
    assert list(content) == ["format", "controller", "model", "seed", "world", "prompts", "episodes"]
    assert content["format"] == 1
    assert content["world"]["building"] == "OfficeSmall"
    assert content["world"]["zones"][-1] == "ATTIC"
    assert content["world"]["action"] == ["all zones"]
    assert len(content["world"]["observation"]) == 10
    assert list(content["episodes"][0]) == ["task", "day", "hour", "seed", "return", "steps"]
    assert list(content["episodes"][0]["steps"][0]) == [
        "step", "observation", "action", "reward", "energy", "comfort", "state", "value",
    ]  # fmt: skip
    # An episode a line, so that two files can be compared line by line.
    assert [line.startswith('{"task"') for line in path.read_text().splitlines()].count(True) == 2


def test_the_world_has_the_physics_and_not_the_view():
    world = world_of(Hvac(few_shot=7, history=0, reasoning=True, beta=0.9, reward_scale=2.0))
    assert world["beta"] == 0.9
    assert not {"few_shot", "history", "reasoning", "horizon", "memory", "parse_penalty", "reward_scale"} & set(world)
    assert world == world_of(Hvac(beta=0.9))


def test_play_records_what_the_simulator_did():
    """Replaying the recorded powers from the recorded start gives the recorded rewards."""
    task = PER_ZONE.tasks("train", 1, seed=5)[0]
    episode = play(PER_ZONE, task, one_step_optimal, lambda x: 2.0 * x[:, 0])
    env = PER_ZONE.simulator()
    observation = PER_ZONE.reset_simulator(env, task)
    for step in episode.steps:
        assert step.observation == pytest.approx(observation.tolist(), abs=1e-5)
        assert np.array_equal(np.array(step.observation, np.float32), observation)
        assert step.value == pytest.approx(2.0 * step.observation[0])
        assert step.state == describe(env)
        observation, reward, _, _, info = env.step(action_of(PER_ZONE, step.action))
        assert step.reward == pytest.approx(reward, abs=1e-5)
        assert (step.energy, step.comfort) == pytest.approx((info["energy"], info["comfort"]), abs=1e-5)
    assert episode.total == pytest.approx(sum(step.reward for step in episode.steps))
    assert (episode.task, episode.day, len(episode.steps)) == (task.id, task.metadata["day"], 3)


def test_powers_are_those_of_a_reply():
    # OfficeSmall's attic is not conditioned, so a reply has five powers and the simulator six.
    action = np.array([0.5, -2.0, 0.1, 0.2, 0.3, 0.9], np.float32)
    assert powers_of(PER_ZONE, action) == (0.5, -1.0, 0.1, 0.2, 0.3)
    assert action_of(PER_ZONE, (0.5, -1.0, 0.1, 0.2, 0.3)).tolist() == pytest.approx([0.5, -1.0, 0.1, 0.2, 0.3, 0.0])
    assert powers_of(UNIFORM, np.array([1.5], np.float32)) == (1.0,)
    everything = Hvac(control="per_zone", powered="all")
    assert len(powers_of(everything, action)) == 6


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e999", "1e10", '"12"', "true", "null", "[1]"])
def test_a_number_that_is_none_is_told_by_its_place(tmp_path, bad):
    path = write(tmp_path / "t.json", ppo_file())
    text = path.read_text().splitlines()
    row = next(i for i, line in enumerate(text) if line.startswith('{"task"')) + 1
    episode = json.loads(text[row].rstrip(","))
    reward = json.dumps(episode["steps"][2]["reward"])
    text[row] = text[row].replace(f'"reward": {reward}', f'"reward": {bad}')
    path.write_text("\n".join(text))
    with pytest.raises(DataError, match=r"t\.json: episode 2 \(hvac-train-0-1-day\d+\), step 2: reward is "):
        read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format=2), "format is 2, not 1"),
        (lambda c: c.pop("format"), 'it has no "format"'),
        (lambda c: c.update(extra=1), "'extra' is no field of it"),
        (lambda c: c.update(episodes=[]), "episodes is a list of 0"),
        (lambda c: c.update(seed=1.5), "seed is 1.5, not a whole number"),
        (lambda c: c.update(world=[]), "world is a list of 0, not an object"),
        (lambda c: c["world"].update(action=[]), "world.action is a list of 0"),
        (lambda c: c["world"].update(observation=["x"] * 9), "observation is a list of 10, not a list of 9 numbers"),
        (lambda c: c["prompts"][prompt_id(TRUNK)][0].update(content="x"), "the file was changed"),
        (lambda c: c["episodes"][0].update(day=365), "day is 365, not a whole number in 0..364"),
        (lambda c: c["episodes"][0].update(steps=[]), "episode 1 (hvac-train-0-0-day3): steps is a list of 0"),
        (lambda c: c["episodes"].append(7), "episode 2: it is 7, not an object"),
        (lambda c: c["episodes"][0]["steps"].append(dict(c["episodes"][0]["steps"][0])), "step is 0, not after step 0"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told(tmp_path, change, said):
    assert said in damaged(tmp_path / "t.json", change)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"action": [0.1, 0.2]}, "action is a list of 2, not a list of 1 numbers"),
        ({"observation": [1.0] * 9 + [float("nan")]}, "observation is nan, not made of numbers"),
        ({"prompt": "0" * 12}, "prompt is '000000000000', not an id of prompts"),
        ({"parsed": "guess"}, "parsed is 'guess', not one of json, list, regex, failed"),
        ({"fallback": 1}, "fallback is 1, not true or false"),
        ({"reply": None}, "reply is None, not a text"),
        ({"token_ids": [1, -2]}, "token_ids is a list of 2, not a list of token ids"),
        ({"sampled_logprobs": [-0.1]}, "sampled_logprobs is a list of 1, not a list of 2 numbers"),
        ({"sampled_logprobs": [-0.1, 0.5]}, "sampled_logprobs is 0.5, not at most 0"),
        ({"temperature": -1}, "temperature is -1.0, not 0 or more"),
        ({"others": [{}]}, "other reply 1: action is None"),
        ({"rewrad": 1}, "'rewrad' is no field of it"),
        ({"step": 10**30}, "step is 1000000000"),
    ],
)
def test_a_damaged_step_is_told(tmp_path, fields, said):
    told = damaged(tmp_path / "t.json", lambda c: c["episodes"][0]["steps"][0].update(fields))
    assert "episode 1 (hvac-train-0-0-day3), step 0: " in told
    assert said in told
    assert "\n" not in told


def test_a_reply_needs_its_fields(tmp_path):
    told = damaged(tmp_path / "t.json", lambda c: c["episodes"][0]["steps"][0].pop("reply"))
    assert "prompt is there without a reply" in told
    told = damaged(tmp_path / "t.json", lambda c: c["episodes"][0]["steps"][0].pop("token_ids"))
    assert "sampled_logprobs is there without token_ids" in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON at line 1, column 1"),
        (b'{"format": 1,\n "contr', "no JSON at line 2"),
        (b"\xff\xfe\x00", "no UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": ' + b"9" * 5000 + b"}", "a number too long"),
        (b"[]", "no JSON object"),
        (b"{}", 'it has no "format"'),
        (b"PK\x03\x04", "no JSON"),
    ],
)
def test_another_file_is_told(tmp_path, content, said):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.json: ") as error:
        read(path)
    assert said in str(error.value)


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="there is no such trajectory file"):
        read(tmp_path / "no.json")
    with pytest.raises(DataError, match="not a trajectory file: it is a folder or a device"):
        read(tmp_path)


def test_what_terminals_obey_is_escaped_in_messages(tmp_path):
    told = damaged(tmp_path / "t.json", lambda c: c["episodes"][0].update(task="\x1b[31mred", day=-1))
    assert "\x1b" not in told
    assert "\\x1b[31mred" in told


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path):
    path = write(tmp_path / "t.json", ppo_file())
    before = path.read_bytes()
    broken = ppo_file()
    step = changed(broken.episodes[1].steps[0], reward=float("nan"))
    episode = changed(broken.episodes[1], steps=(step,))
    with pytest.raises(DataError, match="not finite"):
        write(path, changed(broken, episodes=(broken.episodes[0], episode)))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't be written"):
        write(tmp_path / "file" / "t.json", broken)


def test_files_of_another_building_or_layout_are_refused(tmp_path):
    file = read(write(tmp_path / "t.json", ppo_file()))
    assert check_world(file, UNIFORM) == {}
    with pytest.raises(DataError, match=r"t\.json: .*its building is OfficeSmall, and this world's is Warehouse"):
        check_world(file, Hvac(building="Warehouse"))
    with pytest.raises(DataError, match=r"its control is uniform, and this world's is per_zone.*--stage ppo"):
        check_world(file, PER_ZONE)
    with pytest.raises(DataError, match=r"it has 1 action entries \(x\), and this world has 1 \(all zones\)"):
        check_world(changed(file, world={**file.world, "action": ["x"]}), UNIFORM)
    with pytest.raises(DataError, match="--stage rollout"):
        check_world(llm_file(), Hvac(building="Warehouse"))
    told = check_world(file, Hvac(horizon=4, climate="Cool_Dry", target=21.0))
    assert told == {"climate": ("Hot_Dry", "Cool_Dry"), "target": (22.0, 21.0)}
