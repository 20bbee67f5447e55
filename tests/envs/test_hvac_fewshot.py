"""Which examples a prompt shows: from a file or a pool, fixed, nearest or balanced."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from sapwood.envs.check import check_env
from sapwood.envs.hvac import Hvac
from sapwood.envs.hvac.fewshot import balanced, fixed, load_shots, nearest
from sapwood.envs.hvac.layout import world_of
from sapwood.errors import ConfigError, DataError

WORLD = world_of(Hvac())


def rows(clusters: int = 4, each: int = 3) -> list[dict]:
    """Cluster c has mean power -0.3 + 0.2 c and zones of 20 + c degrees; its examples are 0.1 K apart."""
    made = []
    for cluster in range(clusters):
        for rank in range(each):
            zones = [20.0 + cluster + rank / 10] * 6
            made.append(
                {
                    "cluster": cluster, "rank": rank, "state": f"state {cluster} {rank}",
                    "observation": [*zones, 10.0, 20.0, 0.5, 0.0], "action": [round(-0.3 + 0.2 * cluster, 2)],
                    "reward": -float(rank), "task": "t", "day": 1, "hour": 0, "step": rank,
                }
            )  # fmt: skip
    return made


def file_of(path: Path, examples: list[dict] | None = None, **changes) -> str:
    content = {
        "format": 1, "world": WORLD, "source": {}, "rule": {}, "mean": [0.0] * 10, "scale": [1.0] * 10,
        "examples": rows() if examples is None else examples, **changes,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def path(tmp_path) -> str:
    return file_of(tmp_path / "few_shot_examples_structured.json")


def names(shots) -> list[str]:
    return [shot.state.removeprefix("state ") for shot in shots]


def test_fixed_takes_the_best_of_evenly_spread_clusters(path):
    shots = load_shots(path)
    # Two of four clusters: the middles of two halves, 1 and 3.
    assert names(fixed(shots, 2)) == ["1 0", "3 0"]
    # One is the middle; four are all, every second first, so that neighbours differ.
    assert names(fixed(shots, 1)) == ["2 0"]
    assert names(fixed(shots, 4)) == ["0 0", "2 0", "1 0", "3 0"]
    # Six: the best of all four, then the second best of two, by power.
    assert sorted(names(fixed(shots, 6))) == ["0 0", "0 1", "1 0", "1 1", "2 0", "3 0"]
    assert len(fixed(shots, 32)) == 12


def test_nearest_is_by_standardised_distance(tmp_path):
    shots = load_shots(file_of(tmp_path / "a.json"))
    state = np.array([22.0] * 6 + [10.0, 20.0, 0.5, 0.0])
    # Zones of 22.0, 22.1 and 22.2; the nearest stands last, next to the question.
    assert names(nearest(shots, state, 3)) == ["2 2", "2 1", "2 0"]
    far = rows()
    for row in far:
        row["observation"][6] = 40.0 if row["cluster"] == 2 else 10.0
    coarse = load_shots(file_of(tmp_path / "b.json", far, scale=[1.0] * 6 + [1000.0] + [1.0] * 3))
    fine = load_shots(file_of(tmp_path / "c.json", far, scale=[1.0] * 6 + [0.1] + [1.0] * 3))
    assert names(nearest(coarse, state, 1)) == ["2 0"]
    # 30 degrees outdoors are 300 deviations; the nearest other zones are those of cluster 1, 0.8 K below.
    assert names(nearest(fine, state, 1)) == ["1 2"]


def test_balanced_has_one_of_each_of_some_clusters(path):
    shots = load_shots(path)
    drawn = [names(balanced(shots, 3, seed)) for seed in range(40)]
    assert all(len({name[0] for name in three}) == 3 for three in drawn)
    assert {name for three in drawn for name in three} == set(names(shots.examples))
    assert drawn == [names(balanced(shots, 3, seed)) for seed in range(40)]
    assert len({tuple(three) for three in drawn}) > 20
    six = names(balanced(shots, 6, 1))
    assert len(set(six)) == 6
    assert sorted(name[0] for name in six) in (sorted("001123"), sorted("001223"), sorted("001233"), sorted("011223"),
                                               sorted("011233"), sorted("012233"))  # fmt: skip
    assert len(balanced(shots, 32, 0)) == 12


def test_fixed_examples_of_a_file_are_the_trunk_of_every_prompt(path):
    family = Hvac(examples=path, few_shot=2)
    prompts = []
    for task in family.tasks("train", 2, seed=0):
        env = family.make(task)
        prompts += [env.start().messages, env.step('{"power": 0.1}').observation.messages]
    assert all(prompt[:-1] == family.prompt_trunk for prompt in prompts)
    contents = [message.content for message in family.prompt_trunk]
    assert contents[1:] == ["state 1 0", '{"power": -0.1}', "Reward 0.0. state 3 0", '{"power": 0.3}']
    assert prompts[0][-1].content.startswith("Reward 0.0. Time 00:00")
    check_env(family)


def test_nearest_changes_with_the_state_and_balanced_with_the_task(path):
    near = Hvac(examples=path, few_shot=2, few_shot_choice="nearest", start="random", horizon=4)
    assert [message.role for message in near.prompt_trunk] == ["system"]
    env = near.make(near.tasks("train", 1, seed=3)[0])
    first = env.start().messages
    later = env.step('{"power": 1.0}').observation.messages
    assert len(first) == len(later) == 6
    assert first[1:-1] != later[1:-1]
    even = Hvac(examples=path, few_shot=2, few_shot_choice="balanced")
    trunks = set()
    for task in even.tasks("train", 8, seed=0):
        env = even.make(task)
        begin = env.start().messages[:-1]
        assert env.step("0").observation.messages[:-1] == begin
        assert even.make(task).start().messages[:-1] == begin
        trunks.add(begin)
    assert len(trunks) > 3
    for family in (near, even):
        check_env(family)


def test_the_reward_before_a_state_is_the_last_examples(path):
    family = Hvac(examples=path, few_shot=2, few_shot_choice="nearest")
    messages = family.make(family.tasks("train", 1, seed=0)[0]).start().messages
    shown = {row["state"]: row["reward"] for row in rows()}
    last = messages[-3].content.split(". ")[-1]
    assert messages[-1].content.startswith(f"Reward {shown[last] + 0.0:.1f}. Time")
    plain = Hvac(examples=path, few_shot=2, few_shot_choice="nearest", history=0)
    messages = plain.make(plain.tasks("train", 1, seed=0)[0]).start().messages
    assert not any("Reward" in message.content for message in messages[1:])


def test_without_a_file_nearest_and_balanced_choose_from_a_pool():
    near, even = (Hvac(few_shot=3, few_shot_choice=choice, start="random") for choice in ("nearest", "balanced"))
    task = near.tasks("eval", 1, seed=1)[0]
    for family in (near, even):
        env = family.make(task)
        messages = env.start().messages
        assert len(messages) == 8
        again = family.make(task).start().messages
        assert messages == again
        check_env(family)
    assert len(near.shots) == 0


def test_a_file_that_changes_later_changes_no_family(path):
    family = Hvac(examples=path, few_shot=1)
    before = family.prompt_trunk
    Path(path).unlink()
    assert family.prompt_trunk == before
    assert pickle.loads(pickle.dumps(family)).prompt_trunk == before
    with pytest.raises(DataError, match="there is no such file; make it with `sapwood pipeline RECIPE --stage select`"):
        Hvac(examples=path)


def test_a_copy_with_another_file_reads_it(tmp_path, path):
    family = Hvac(examples=path, few_shot=1)
    other = file_of(tmp_path / "other.json", rows(clusters=1))
    assert names(family.model_copy(update={"examples": other}).shots) == ["0 0"]
    assert names(Hvac(few_shot=1).model_copy(update={"examples": path}).shots) == ["2 0"]
    warehouse = Hvac(building="Warehouse").model_copy(update={"examples": path})
    with pytest.raises(DataError, match="from another world"):
        _ = warehouse.shots


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"building": "Warehouse"}, "its building is OfficeSmall, and this world's is Warehouse"),
        ({"control": "per_zone"}, "its control is uniform, and this world's is per_zone"),
        ({"max_power": 2000.0}, "its max_power is 8000.0, and this world's is 2000.0"),
        ({"time_res": 900.0}, "its time_res is 3600.0, and this world's is 900.0"),
        ({"target": 20.0}, "its target is 22.0, and this world's is 20.0"),
    ],
)
def test_examples_of_another_world_are_refused(path, options, said):
    with pytest.raises(DataError, match=r"few_shot_examples_structured\.json: from another world: ") as error:
        Hvac(examples=path, **options)
    assert said in str(error.value)
    assert "--stage select" in str(error.value)


def test_examples_of_another_climate_or_reward_are_taken(path):
    assert Hvac(examples=path, climate="Cool_Dry", beta=0.9).shots == Hvac(examples=path).shots


def test_options_that_cannot_be_honoured(path):
    with pytest.raises(ConfigError, match="examples are given and few_shot is 0"):
        Hvac(examples=path, few_shot=0)
    with pytest.raises(ConfigError, match="few_shot_choice is balanced and few_shot is 0"):
        Hvac(few_shot_choice="balanced", few_shot=0)
    with pytest.raises(ConfigError, match="memory chat shows them once"):
        Hvac(few_shot_choice="nearest", memory="chat")
    assert len(Hvac(few_shot_choice="balanced", memory="chat").tasks("train", 1, 0)) == 1


def changed(row: dict, **fields) -> list[dict]:
    return [rows()[0], {**row, **fields}]


@pytest.mark.parametrize(
    ("examples", "changes", "said"),
    [
        ([], {}, "it has no examples"),
        (None, {"format": 2}, 'its "format" is 2, not 1'),
        (None, {"world": []}, "it has no world"),
        (None, {"mean": [0.0] * 9}, "mean is no list of 10 numbers"),
        (None, {"scale": [0.0] * 10}, "scale has a number that is not positive"),
        (changed(rows()[1], action=[1.5]), {}, "example 2: action has a power outside -1..1"),
        (changed(rows()[1], action=[0.1, 0.2]), {}, "example 2: action is no list of 1 numbers"),
        (changed(rows()[1], observation=[float("nan")] * 10), {}, "example 2: observation is nan"),
        (changed(rows()[1], reward="-1"), {}, "example 2: reward is -1, not a number"),
        (changed(rows()[1], reward=10**400), {}, "example 2: reward is 1000"),
        (changed(rows()[1], state=" "), {}, "example 2: state is no text"),
        (changed(rows()[1], cluster=True), {}, "example 2: cluster is True"),
        ([3], {}, "example 1: it is no object"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, examples, changes, said):
    path = file_of(tmp_path / "x.json", examples, **changes)
    with pytest.raises(DataError, match=r"^examples .*x\.json: ") as error:
        Hvac(examples=path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_another_file_is_told(tmp_path):
    for content in ("", "{", "[1]", "x" * 100):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=r"x\.json: not a file of examples"):
            Hvac(examples=str(tmp_path / "x.json"))
