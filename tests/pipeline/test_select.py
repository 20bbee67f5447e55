"""Stage select: the best of every kind of state, told where there are fewer, and usable in prompts."""

from __future__ import annotations

import io
import json
from dataclasses import replace as changed

import numpy as np
import pytest

from sapwood.envs.hvac import Hvac
from sapwood.envs.hvac.controllers import proportional
from sapwood.errors import DataError
from sapwood.pipeline.select import SelectOptions, principal, run
from sapwood.pipeline.trajectories import Decision, Episode, TrajectoryFile, play, recorded, write
from sapwood.progress import Progress

FAMILY = Hvac(horizon=24)


def blobs(steps: list[tuple[float, float, float, float | None]], per_episode: int = 1000) -> TrajectoryFile:
    """Steps of (outdoor temperature, power, reward, value); all else is the same."""
    made = []
    for first in range(0, len(steps), per_episode):
        decisions = tuple(
            Decision(
                i,
                (22.0,) * 6 + (outdoor, 20.0, 0.0, 0.0),
                (power,),
                reward,
                0.1,
                0.2,
                value,
                state=f"state {first + i}",
            )
            for i, (outdoor, power, reward, value) in enumerate(steps[first : first + per_episode])
        )
        made.append(Episode(f"e{first}", 1, 0, 0, 0.0, decisions))
    return recorded(FAMILY, "ppo", 0, made)


def select(tmp_path, file: TrajectoryFile, family: Hvac = FAMILY, **options):
    path = write(tmp_path / "ppo_trajectory.json", file)
    stream = io.StringIO()
    result = run(SelectOptions(**options), family, path, tmp_path / "out", Progress(stream=stream))
    return result, json.loads(result.examples.read_text()), stream.getvalue()


def test_the_best_of_each_cluster(tmp_path):
    """Three groups by weather, 4 steps each with rewards -0, -1, -2, -3 less their number; 2 of each are taken."""
    steps = [(outdoor, power, -i - n / 10, None) for n, (outdoor, power) in enumerate([(40, -0.5), (0, 0.5), (20, 0.1)])
             for i in range(4)]  # fmt: skip
    result, content, told = select(tmp_path, blobs(steps), preselect=12, clusters=3, per_cluster=2)
    assert result.sizes == (2, 2, 2)
    assert (result.count, result.preselected, result.steps) == (6, 12, 12)
    rows = content["examples"]
    # Clusters are numbered from cooling to heating, ranks by reward.
    assert [(r["cluster"], r["rank"], r["action"][0], r["reward"]) for r in rows] == [
        (0, 0, -0.5, 0.0), (0, 1, -0.5, -1.0),
        (1, 0, 0.1, -0.2), (1, 1, 0.1, -1.2),
        (2, 0, 0.5, -0.1), (2, 1, 0.5, -1.1),
    ]  # fmt: skip
    assert [r["state"] for r in rows] == ["state 0", "state 1", "state 8", "state 9", "state 4", "state 5"]
    assert content["mean"][6] == pytest.approx(20.0)
    # Of 40, 0 and 20: sqrt((400 + 400 + 0) / 3).
    assert content["scale"][6] == pytest.approx(16.3299, abs=1e-4)
    assert content["scale"][0] == 1.0  # a column that never changes divides by 1
    assert content["source"]["controller"] == "ppo"
    assert content["rule"]["rank"] == "reward"
    assert "6 examples in 3 clusters, of 12 steps" in told
    assert "fewer" not in told
    assert (tmp_path / "out" / "clusters.png").read_bytes().startswith(b"\x89PNG")


def test_preselection_keeps_the_best_by_reward(tmp_path):
    steps = [(float(i), 0.0, -float(i), None) for i in range(10)]
    _, content, _ = select(tmp_path, blobs(steps), preselect=4, clusters=1, per_cluster=9)
    assert [row["reward"] for row in content["examples"]] == [0.0, -1.0, -2.0, -3.0]


def test_rank_by_advantage(tmp_path):
    """advantage = r + gamma V' - V; gamma .5: -1 + 0 - -2 = 1; -4 - 5 - 0 = -9; the last step has no next state."""
    steps = [(1.0, 0.1, -1.0, -2.0), (2.0, 0.2, -4.0, 0.0), (3.0, 0.3, 0.0, -10.0)]
    _, content, _ = select(tmp_path, blobs(steps), rank="advantage", gamma=0.5, clusters=1, preselect=5)
    assert [(row["action"][0], row["advantage"]) for row in content["examples"]] == [(0.1, 1.0), (0.2, -9.0)]
    _, content, _ = select(tmp_path, blobs(steps), rank="reward", clusters=1, preselect=5)
    assert [row["action"][0] for row in content["examples"]] == [0.3, 0.1, 0.2]


def test_fewer_are_said(tmp_path):
    steps = [(40.0, -0.5, -1.0, None)] * 5 + [(0.0, 0.5, -1.0, None)]
    result, _, told = select(tmp_path, blobs(steps))
    assert result.sizes == (5, 1)
    assert "6 steps are fewer than select.preselect 2,000" in told
    assert "2 clusters and not 12: there are no more different states" in told
    assert "2 of 2 clusters have fewer than 20 states (the smallest 1), so there are 6 examples and not 240" in told


def test_the_same_seed_gives_the_same_file(tmp_path):
    file = recorded(FAMILY, "p", 0, [play(FAMILY, task, proportional) for task in FAMILY.tasks("train", 6, 0)])
    first, *_ = select(tmp_path / "a", file, clusters=5)
    again, *_ = select(tmp_path / "b", file, clusters=5)
    assert first.examples.read_bytes() == again.examples.read_bytes()
    assert first.picture.read_bytes() == again.picture.read_bytes()
    assert len(first.sizes) == 5


def test_examples_of_the_documented_size(tmp_path):
    """2,000 of 2,880 steps, 12 clusters of 20: 240 examples, and prompts of the family take them."""
    file = recorded(FAMILY, "p", 0, [play(FAMILY, task, proportional) for task in FAMILY.tasks("train", 120, 0)])
    result, _, _ = select(tmp_path, file)
    assert result.sizes == (20,) * 12
    family = Hvac(examples=str(result.examples), few_shot=12)
    assert len(family.shots) == 12


def test_what_cannot_be_examples_is_refused(tmp_path):
    good = blobs([(1.0, 0.1, -1.0, None), (2.0, 0.1, -1.0, None)])

    def refused(file, family=FAMILY, **options) -> str:
        with pytest.raises(DataError, match=r"ppo_trajectory\.json: ") as error:
            select(tmp_path, file, family, **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "its building is OfficeSmall, and this world's is Warehouse" in refused(good, Hvac(building="Warehouse"))
    assert "needs a critic's value at every step, and episode e0, step 0 has none" in refused(good, rank="advantage")
    wordless = changed(good.episodes[0].steps[1], state=None)
    episode = changed(good.episodes[0], steps=(good.episodes[0].steps[0], wordless))
    assert "episode e0, step 1 has no state in words" in refused(changed(good, episodes=(episode,)))


def test_a_language_models_file_is_refused(tmp_path):
    from tests.pipeline.test_trajectories import llm_file

    path = write(tmp_path / "llm_rollout.json", llm_file())
    with pytest.raises(DataError, match="recorded from a language model"):
        run(SelectOptions(), Hvac(), path, tmp_path)


def test_principal_components():
    """Points along (3, 4) / 5 with a little across: the first axis is that line, and has the larger share."""
    along = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    across = np.array([0.1, -0.2, 0.2, -0.2, 0.1])
    points = np.outer(along, [0.6, 0.8]) + np.outer(across, [-0.8, 0.6])
    places, shares = principal(points)
    assert places[:, 0] == pytest.approx(along)
    assert np.abs(places[:, 1]) == pytest.approx(np.abs(across))
    # 10 and 0.14 of 10.14.
    assert shares == pytest.approx([10 / 10.14, 0.14 / 10.14])
    assert principal(np.zeros((1, 1)))[0].shape == (1, 2)
