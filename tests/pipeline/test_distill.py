"""Stage 4: what each gate keeps, worked by hand, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from sapwood.data import recordings
from sapwood.envs.hvac.controllers import proportional
from sapwood.envs.hvac.layout import powers_of, world_of
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import DataError
from sapwood.pipeline import distill, trajectories
from sapwood.pipeline.distill import Candidate, DistillOptions, Filtered, candidates, gate, quality, scores
from sapwood.pipeline.trajectories import Decision, Episode, Reply, TrajectoryFile, play, prompt_id, recorded
from sapwood.types import Message
from tests.pipeline.playing import silent

FAMILY = Hvac(horizon=4, few_shot=0, start="random", control="uniform")
TRUNK = (Message("system", "You heat."),)
MODEL = {"name": "m", "adapter": None, "weights": "w"}
TOKENS: dict[str, Any] = {"token_ids": (5, 6), "sampled_logprobs": (-0.5, -1.0), "kept_logmass": (0.0, -0.25)}


def said(reward: float, action: float = 0.1, parsed: Any = "json", fallback: bool = False, text: str = "ok") -> Reply:
    return Reply(text, (action,), reward, parsed, fallback, **TOKENS)


def candidate(reward: float, state: int = 0, number: int = 0, **changes: Any) -> Candidate:
    """A reply in a state; changes: of the reply, or of the candidate's ahead, regret, outdoor and hour."""
    own = {name: changes.pop(name) for name in ("ahead", "regret", "outdoor", "hour") if name in changes}
    step = Decision(0, (20.0,) * 10, (0.1,), reward, 0.0, 0.0)
    episode = Episode("t", 0, 0, 0, 0.0, (step,))
    told = {"outdoor": 20.0, "hour": 0.0, **own}
    return Candidate(0, episode, step, said(reward, **changes), number, state, total=reward, **told)


def kept(found: list[Candidate], rank: distill.Rank = "reward", **options: Any) -> list[float]:
    result = gate(found, DistillOptions(**options), rank)
    return [found[i].said.reward for i in result.kept]


# --- gates ------------------------------------------------------------------------------------------------------


def test_the_gates_by_hand() -> None:
    bad = [
        candidate(0.0, parsed="failed", fallback=True),
        candidate(0.0, fallback=True),
        candidate(0.0, action=1.5),
        candidate(0.0, action=-1.5),
    ]
    found = [*bad, *(candidate(float(-i)) for i in range(1, 22))]  # 21 valid rewards, -1 to -21
    result = gate(found, DistillOptions(), "reward")
    valid, outliers, rank = result.gates
    assert valid["left_out"] == {"fallback": 1, "out of range": 2, "unreadable": 1}
    assert valid["kept"] == 21
    # Of the sorted -21, -20 .. -1: the 5 % quantile is at place 0.05 * 20 = 1, the 99 % quantile at 19.8: -1.2.
    assert (outliers["from"], outliers["to"]) == pytest.approx((-20.0, -1.2))
    assert outliers["left_out"] == {"below": 1, "above": 1}
    # 19 are left, -20 to -2: their median is -11, which is kept.
    assert rank["from"] == result.cut == pytest.approx(-11.0)
    assert [found[i].said.reward for i in result.kept] == [float(-i) for i in range(2, 12)]
    assert rank["left_out"] == {"below": 9}


def test_every_option_of_the_gates_counts() -> None:
    found = [candidate(float(-i)) for i in range(1, 22)]
    assert len(kept(found, q_low=0.0, q_high=1.0, min_percentile=0.0)) == 21
    assert max(kept(found, q_low=0.0, q_high=1.0)) == -1.0
    assert min(kept(found, q_low=0.2, min_percentile=0.0)) == -17.0
    assert len(kept(found, min_percentile=0.9)) == 2


def test_scores_against_the_other_replies() -> None:
    found = [
        candidate(-1.0, 0), candidate(-2.0, 0, 1), candidate(-6.0, 0, 2),
        candidate(-9.0, 0, 3, parsed="failed"),  # not compared with
        candidate(-3.0, 1), candidate(-3.0, 1, 1),  # equal: nothing to compare
        candidate(-4.0, 2),  # alone
    ]  # fmt: skip
    made = scores(found, "group")
    # Each less the mean of the other two: -1 + 4, -2 + 3.5, -6 + 1.5.
    assert made[:3].tolist() == pytest.approx([3.0, 1.5, -4.5])
    assert np.isnan(made[3:]).all()
    assert scores(found, "reward").tolist() == [-1.0, -2.0, -6.0, -9.0, -3.0, -3.0, -4.0]
    compared = gate(found, DistillOptions(q_low=0.0, q_high=1.0), "group").gates[2]
    assert compared == {"gate": "compared", "kept": 3, "left_out": {"without a score": 3}}


def test_the_weather_decides_the_reward_and_not_the_comparison() -> None:
    """A mild and a hot hour with a good and a bad reply each: reward keeps the mild hour, group the good replies."""
    found = [
        candidate(-1.0, 0, 0, outdoor=20.0, regret=0.0), candidate(-2.0, 0, 1, outdoor=20.0, regret=1.0),
        candidate(-9.0, 1, 0, outdoor=40.0, regret=0.0), candidate(-10.0, 1, 1, outdoor=40.0, regret=1.0),
    ]  # fmt: skip
    options = DistillOptions(q_low=0.0, q_high=1.0)
    by_reward = quality(found, gate(found, options, "reward").kept)
    by_group = quality(found, gate(found, options, "group").kept)
    assert by_reward is not None
    assert by_group is not None
    assert (by_reward.regret, by_reward.gain, by_reward.outdoor_shift) == pytest.approx((0.5, 0.0, 0.5))
    assert (by_group.regret, by_group.gain, by_group.outdoor_shift) == pytest.approx((0.0, 0.5, 0.0))


# --- what is recorded, replayed ---------------------------------------------------------------------------------


def llm_file(family: Hvac = FAMILY, episodes: int = 3, others: bool = True, seed: int = 0) -> TrajectoryFile:
    """Proportional control, as if a model had said it; with it an other reply of power 0.3, tried in the simulator."""
    made = []
    for task in family.tasks("train", episodes, seed):
        env = family.simulator(task.metadata.get("steps"))
        observation = family.reset_simulator(env, task)
        steps = []
        for number in range(family.horizon):
            action = np.array([round(float(a), 2) for a in proportional(env)], np.float32)
            tried = distill.copied(env).step(np.full_like(action, 0.3))[1]
            other = (Reply("other", (0.3,), tried, "json", False, **TOKENS),) if others else ()
            seen = tuple(observation.tolist())
            observation, reward, _, _, info = env.step(action)
            steps.append(
                Decision(
                    number, seen, powers_of(family, action), reward, info["energy"], info["comfort"],
                    prompt=prompt_id(TRUNK), state=f"{task.id} {number}", reply="mine", parsed="json",
                    temperature=0.5, others=other, **TOKENS,
                )
            )  # fmt: skip
        day, hour = int(task.metadata["day"]), int(task.metadata["hour"])
        made.append(Episode(task.id, day, hour, task.seed, sum(s.reward for s in steps), tuple(steps)))
    return TrajectoryFile("llm", seed, world_of(family), tuple(made), MODEL, {prompt_id(TRUNK): TRUNK})


def test_regrets_are_exact() -> None:
    file = llm_file()
    found = candidates([file], FAMILY, 0.9, None, silent())
    assert len(found) == 3 * 4 * 2
    grid = np.arange(-100, 101) / 100
    for task, episode in zip(FAMILY.tasks("train", 3, 0), file.episodes, strict=True):
        env = FAMILY.simulator()
        FAMILY.reset_simulator(env, task)
        for step in episode.steps:
            best = max(distill.copied(env).step(np.array([p], np.float32))[1] for p in grid)
            mine, other = (c for c in found if c.step is step)
            assert mine.regret == pytest.approx(best - step.reward, abs=1e-4)
            assert other.regret == pytest.approx(best - step.others[0].reward, abs=1e-4)
            assert mine.hour == (episode.hour + step.step) % 24
            assert mine.outdoor == step.observation[6]
            env.step(np.array(step.action, np.float32))


def test_returns_are_discounted_and_a_reply_that_did_not_act_shares_the_future() -> None:
    file = llm_file(episodes=1)
    found = candidates([file], FAMILY, 0.5, None, silent())
    r = [step.reward for step in file.episodes[0].steps]
    assert found[0].total == pytest.approx(r[0] + 0.5 * r[1] + 0.25 * r[2] + 0.125 * r[3])
    tried = file.episodes[0].steps[0].others[0].reward
    assert found[1].total == pytest.approx(tried + 0.5 * r[1] + 0.25 * r[2] + 0.125 * r[3])
    assert found[-2].total == pytest.approx(r[3])


def test_the_critics_advantage() -> None:
    """V is the mean zone temperature: r + gamma V(s') - V(s), with what every reply led to."""
    file = llm_file(episodes=1)
    found = candidates([file], FAMILY, 0.9, lambda x: x[:, :6].mean(1).astype(np.float64), silent())
    env = FAMILY.simulator()
    FAMILY.reset_simulator(env, FAMILY.tasks("train", 3, 0)[0])
    for number, step in enumerate(file.episodes[0].steps):
        before = env.temperatures.mean()
        twin = distill.copied(env)
        twin.step(np.array([0.3], np.float32))
        env.step(np.array(step.action, np.float32))
        for place, after in ((0, env), (1, twin)):
            one = found[2 * number + place]
            assert one.ahead == pytest.approx(one.said.reward + 0.9 * after.temperatures.mean() - before, abs=1e-4)


def test_another_world_is_replayed_as_it_was(tmp_path) -> None:
    """A rollout of another climate keeps its own: its rewards repeat there."""
    cold = FAMILY.model_copy(update={"climate": "Chicago"})
    path = trajectories.write(tmp_path / "cold.json", llm_file(cold))
    found = candidates([trajectories.read(path)], FAMILY, 0.9, None, silent())
    assert all(c.regret is not None and c.regret > -1e-6 for c in found)


@pytest.mark.parametrize(
    "world", [{"control": "per_zone"}, {"setback": [(0, 18.0), (7, 22.0)], "price": 0.2, "occupancy": "office_hours"}]
)
def test_any_world_of_the_rc_model_is_replayed(tmp_path, world) -> None:
    family = Hvac.model_validate({**FAMILY.model_dump(), **world})
    path = trajectories.write(tmp_path / "x.json", llm_file(family, episodes=2, others=False))
    file = trajectories.read(path)
    for own in (family, FAMILY) if "price" in world else (family,):  # whatever the recipe says
        found = candidates([file], own, 0.9, None, silent())
        assert all(c.regret is not None for c in found)


def test_rewards_that_do_not_repeat_leave_regrets_unknown() -> None:
    file = llm_file(episodes=1)
    episode = file.episodes[0]
    steps = (*episode.steps[:2], replace(episode.steps[2], reward=-99.0), episode.steps[3])
    found = candidates([replace(file, episodes=(replace(episode, steps=steps),))], FAMILY, 0.9, None, silent())
    assert [c.regret is not None for c in found[::2]] == [True, True, False, False]


# --- the stage --------------------------------------------------------------------------------------------------


def run(folder: Path, *files: TrajectoryFile, family: Hvac = FAMILY, critic: Any = None, **options: Any):
    paths = [trajectories.write(folder / f"rollout{i}.json", file) for i, file in enumerate(files)]
    return distill.run(DistillOptions(**options), paths, family, folder, silent(), critic=critic)


def test_what_is_written(tmp_path) -> None:
    result = run(tmp_path, llm_file(), llm_file(seed=1), critic=lambda x: x[:, 0] * 0.0)
    data = recordings.read(result.path)
    assert (result.rank, data.rank, data.gamma) == ("group", "group", 0.99)
    assert len(data.decisions) == result.kept
    assert result.recorded == 2 * 3 * 4 * 2
    assert data.model == MODEL
    assert data.prompts == {prompt_id(TRUNK): TRUNK}
    advantages = np.array([d.advantage for d in data.decisions])
    assert advantages.min() >= 0.0
    assert advantages.mean() == pytest.approx(1.0)
    targets = np.array([d.value_target for d in data.decisions])
    assert (targets.mean(), targets.std()) == pytest.approx((0.0, 1.0))
    assert {d.source["file"] for d in data.decisions} == {"rollout0.json", "rollout1.json"}
    first = data.decisions[0]
    assert (first.token_ids, first.sampled_logprobs, first.kept_logmass) == ((5, 6), (-0.5, -1.0), (0.0, -0.25))
    report = json.loads(result.report.read_text())
    assert report["gates"][0] == {"gate": "valid", "kept": 48, "left_out": {}}
    assert report["gates"][-1]["kept"] == result.kept
    assert set(report["rankings"]) == {"group", "value", "reward"}
    assert report["rankings"]["group"]["gain"] > report["rankings"]["reward"]["gain"]
    for name in (distill.HISTOGRAM, distill.SHARES):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "others", "critic", "rank"),
    [
        ({}, True, True, "group"),
        ({}, False, True, "value"),
        ({}, False, False, "reward"),
        ({"rank": "reward"}, True, True, "reward"),
        ({"rank": "value"}, True, True, "value"),
    ],
)
def test_the_ranking_that_decides(tmp_path, options, others, critic, rank) -> None:
    value = (lambda x: x[:, 0] * 0.0) if critic else None
    assert run(tmp_path, llm_file(others=others), critic=value, **options).rank == rank


def test_it_repeats_byte_for_byte(tmp_path) -> None:
    first = run(tmp_path, llm_file()).path.read_bytes()
    assert run(tmp_path, llm_file()).path.read_bytes() == first


def test_all_equal_rewards_are_all_kept(tmp_path) -> None:
    file = llm_file(episodes=1, others=False)
    episode = replace(file.episodes[0], steps=tuple(replace(step, reward=-2.0) for step in file.episodes[0].steps))
    data = recordings.read(run(tmp_path, replace(file, episodes=(episode,))).path)
    assert [d.advantage for d in data.decisions] == [1.0] * 4


# --- what is refused --------------------------------------------------------------------------------------------


def changed(file: TrajectoryFile, **changes: Any) -> TrajectoryFile:
    """The file with all steps changed."""
    episodes = tuple(replace(e, steps=tuple(replace(s, **changes) for s in e.steps)) for e in file.episodes)
    return replace(file, episodes=episodes)


def test_controllers_are_never_learnt_from(tmp_path) -> None:
    task = FAMILY.tasks("train", 1, 0)[0]
    file = recorded(FAMILY, "ppo", 0, [play(FAMILY, task, proportional)])
    with pytest.raises(DataError, match=r"rollout0\.json: its controller is 'ppo', and a model learns from its own"):
        run(tmp_path, file)
    assert [p.name for p in tmp_path.iterdir()] == ["rollout0.json"]


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        (llm_file(Hvac(building="OfficeMedium", horizon=4, few_shot=0)), {}, "recorded in another world: its building"),
        (changed(llm_file(others=False), kept_logmass=()), {}, "step 0: its token ids and log-probabilities are"),
        (changed(llm_file(), temperature=0.0), {}, "it was sampled greedily, so its probabilities teach nothing"),
        (llm_file(others=False), {"rank": "group"}, r"rank is group, which needs several replies to each state: .*=4"),
        (llm_file(), {"rank": "value"}, r"distill\.rank is value, which needs a critic: train the PPO"),
    ],
)  # fmt: skip
def test_what_cannot_be_filtered(tmp_path, file, options, sentence) -> None:
    with pytest.raises(DataError, match=sentence):
        run(tmp_path, file, **options)


def test_rollouts_of_two_models(tmp_path) -> None:
    other = replace(llm_file(seed=1), model={**MODEL, "adapter": "a1b2"})
    with pytest.raises(DataError, match=r"rollout1\.json: recorded of another model than .*adapter none against a1b2"):
        run(tmp_path, llm_file(), other)


def test_a_missing_rollout_names_the_command(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: there is no such rollout; make it with `sapwood pipeline"):
        distill.run(DistillOptions(), [tmp_path / "nowhere.json"], FAMILY, tmp_path, silent())


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        (
            changed(llm_file(others=False), parsed="failed", fallback=True),
            {},
            r"the gate 'valid' leaves nothing to learn from: 12 unreadable; lower rollout\.temperature",
        ),
        (
            llm_file(episodes=1, others=False),
            {"q_low": 0.4, "q_high": 0.6},
            r"the gate 'outliers' leaves nothing .*: 2 below, 2 above; lower distill\.q_low \(0\.4\)",
        ),
    ],
)
def test_a_filter_that_keeps_nothing_says_which_gate_and_what_to_change(tmp_path, file, options, sentence) -> None:
    (tmp_path / distill.DATA).write_text("from before")
    with pytest.raises(DataError, match=sentence):
        run(tmp_path, file, **options)
    assert (tmp_path / distill.DATA).read_text() == "from before"
    report = json.loads((tmp_path / distill.REPORT).read_text())
    assert report["emptied_by"] == sentence.partition("'")[2].partition("'")[0]


def test_replies_that_all_do_the_same_leave_nothing_to_compare(tmp_path) -> None:
    file = llm_file(episodes=1)
    steps = tuple(replace(s, others=(replace(s.others[0], reward=s.reward),)) for s in file.episodes[0].steps)
    same = replace(file, episodes=(replace(file.episodes[0], steps=steps),))
    with pytest.raises(DataError, match=r"the gate 'compared' .*8 without a score; raise rollout\.temperature"):
        run(tmp_path, same, q_low=0.0, q_high=1.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"q_low": 0.9, "q_high": 0.2}, r"distill\.q_low \(0\.9\) must be below distill\.q_high"),
        ({"rank": "best"}, "'auto', 'reward', 'value' or 'group'"),
        ({"min_percentile": 1.5}, "less than or equal to 1"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DistillOptions(**options)


def test_a_gate_that_is_never_reached_is_not_told() -> None:
    result = gate([candidate(-1.0, parsed="failed")], DistillOptions(), "reward")
    assert isinstance(result, Filtered)
    assert [entry["gate"] for entry in result.gates] == ["valid"]
    assert result.emptied == "valid"
