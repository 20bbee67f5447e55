"""Everyone on the same days: who plays which, what is told of it, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sapwood.engines.local import LocalOptions
from sapwood.envs.hvac.controllers import proportional
from sapwood.envs.hvac.layout import world_of
from sapwood.envs.hvac.text import Hvac
from sapwood.evaluate import mean_interval
from sapwood.pipeline import evaluation, rollout, trajectories
from sapwood.pipeline.evaluation import Held
from sapwood.pipeline.rollout import RolloutOptions
from sapwood.pipeline.trajectories import Decision, Episode, TrajectoryFile, recorded
from sapwood.sections import ModelSection
from tests.pipeline.playing import save_model, silent

FAMILY = Hvac(horizon=2, few_shot=1, history=0, start="random", control="uniform")


def step(reward: float, energy: float, comfort: float, **said) -> Decision:
    return Decision(0, (20.0,) * 10, (0.0,), reward, energy, comfort, **said)


def spoken(parsed: str, tokens: int) -> dict:
    # "failed" acts by the fallback
    fallback = parsed == "failed"
    said = {"prompt": "p", "state": "s", "reply": "r", "parsed": parsed, "fallback": fallback}
    return {**said, "token_ids": tuple(range(tokens))}


def test_a_summary_by_hand() -> None:
    first = (step(-1.0, 0.5, 2.0, **spoken("json", 4)), step(-3.0, 1.5, 4.0, **spoken("failed", 8)))
    second = (step(-2.0, 0.0, 3.0, **spoken("regex", 6)),)
    episodes = (Episode("a", 1, 0, 0, -4.0, first), Episode("b", 2, 0, 0, -2.0, second))
    found = evaluation.summary("base", recorded(FAMILY, "llm", 0, episodes))
    assert found.returns == {"a": -4.0, "b": -2.0}
    assert (found.turns, found.parsed, found.fallback, found.reply_tokens) == (3, 2 / 3, 1 / 3, 6.0)
    assert found.metrics == {"energy": pytest.approx(2 / 3), "comfort": 3.0}
    silent_one = evaluation.summary(
        "ppo", recorded(FAMILY, "ppo", 0, (Episode("a", 1, 0, 0, -1.0, (step(-1, 1, 1),)),))
    )
    assert (silent_one.parsed, silent_one.fallback, silent_one.reply_tokens) == (None, None, None)


def test_every_seed_has_days_of_its_own() -> None:
    seeds = evaluation.evaluation_seeds(5, 3)
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    held = Held.of(FAMILY, "eval", 2, seeds)
    assert held.seeds == ((seeds[0], 0, 2), (seeds[1], 2, 4), (seeds[2], 4, 6))
    assert held.tasks[:2] == tuple(FAMILY.tasks("eval", 2, 5))
    assert len({task.id for task in held.tasks}) == 6
    days = {int(task.metadata["day"]) for task in held.tasks}
    assert days <= set(FAMILY.days("eval"))


def test_what_is_published(tmp_path: Path) -> None:
    held = Held.of(FAMILY, "eval", 2, [3, 4])
    files = {
        name: evaluation.play_controller(name, FAMILY, held, 3, make)
        for name, make in evaluation.known_controllers(FAMILY).items()
    }
    files[evaluation.PPO] = evaluation.play_controller(
        evaluation.PPO, FAMILY, held, 3, lambda task: proportional, lambda seen: np.zeros(len(seen))
    )
    for name, gain in ((evaluation.BASE, 0.0), (evaluation.TUNED, 1.5)):
        episodes = tuple(
            Episode(
                task.id, int(task.metadata["day"]), 0, task.seed, i + gain, (step(i + gain, 0, 1, **spoken("json", 2)),)
            )
            for i, task in enumerate(held.tasks)
        )
        trunk = {"p": ()}
        files[name] = TrajectoryFile("llm", 3, world_of(FAMILY), episodes, {"name": "tiny"}, trunk)
        (tmp_path / f"{name}_rollout.json").write_text("written as it was played")
        trajectories.write(tmp_path / f"{name}_rollout.json", files[name])
    result = evaluation.publish(FAMILY, held, files, tmp_path)

    told = json.loads(result.path.read_text())
    by_name = {row["name"]: row for row in told["results"]}
    assert list(by_name) == ["random", "zero", "proportional", "one_step_optimal", "ppo", "base", "finetuned"]
    assert by_name["base"]["mean"] == pytest.approx(1.5)  # 0, 1, 2, 3
    assert by_name["finetuned"]["mean"] == pytest.approx(3.0)
    assert told["difference"]["mean"] == pytest.approx(1.5)
    # the same controller on the same days
    assert by_name["ppo"]["returns"] == by_name["proportional"]["returns"]
    assert told["by_seed"]["base"] == {"3": 0.5, "4": 2.5}
    over = mean_interval([0.5, 2.5])
    assert told["over_seeds"]["base"] == {"mean": 1.5, "lo": over.lo, "hi": over.hi, "seeds": 2}
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / evaluation.PAGE).read_text()
    # every player's days can be read again
    assert {path.name for path in tmp_path.glob("*_rollout.json")} == {f"{name}_rollout.json" for name in files}
    again = trajectories.read(result.files["proportional"])
    assert [e.total for e in again.episodes] == pytest.approx([e.total for e in files["proportional"].episodes])


def test_controllers_do_what_the_worlds_own_baselines_do() -> None:
    held = Held.of(FAMILY, "eval", 2, [0])
    for name, make in evaluation.known_controllers(FAMILY).items():
        file = evaluation.play_controller(name, FAMILY, held, 0, make)
        alone = [FAMILY.baselines()[name](task) for task in held.tasks]
        assert [episode.total for episode in file.episodes] == pytest.approx(alone)


def test_a_model_plays_greedily_and_what_it_has_played_is_used(tmp_path: Path) -> None:
    model = ModelSection(name=str(save_model(tmp_path / "tiny")))
    held = Held.of(FAMILY, "eval", 2, [0])
    options = RolloutOptions(max_new_tokens=4, replies_per_state=3, temperature=(0.3, 0.7))
    path = tmp_path / "base_rollout.json"

    def play() -> TrajectoryFile:
        return evaluation.play_model(options, FAMILY, model, LocalOptions(), held, path, silent(), 0)

    first = play()
    assert [episode.task for episode in first.episodes] == [task.id for task in held.tasks]
    steps = [step for _, step in first.steps]
    assert {step.temperature for step in steps} == {0.0}
    assert not any(step.others for step in steps)
    assert all(math.isfinite(step.reward) for step in steps)
    [part] = tmp_path.glob("base_rollout.*.jsonl*")
    whole = part.read_text()
    assert steps[0].reply
    part.write_text(whole.replace(json.dumps(steps[0].reply), '"kept reply"', 1))
    assert play().episodes[0].steps[0].reply == "kept reply"  # not played again
    part.write_text(whole[: len(whole) // 2])  # damaged: played again
    assert play() == first
    rollout.remove_parts(tmp_path)
    assert not list(tmp_path.glob("*.jsonl*"))
