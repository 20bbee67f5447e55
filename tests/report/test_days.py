"""Trajectory files of buildings side by side: what is read, what is drawn, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapwood.cli import main
from sapwood.errors import StorageError
from sapwood.report import Server, write_report
from sapwood.report import days as days_module
from sapwood.report.building import is_building, records
from sapwood.report.days import days
from sapwood.report.folder import RunFolder
from sapwood.report.reading import Problems
from tests.report.browser import Page
from tests.report.hostile import CHECK, HOSTILE, READ, UNFOLD, visible
from tests.report.synthetic import make_run

ZONES = ["A", "B"]
WORLD = {
    "building": "Hut", "climate": "Hot", "control": "uniform", "zones": ZONES,
    "observation": [*ZONES, "outdoor temperature", "ground temperature", "irradiance", "people heat"],
    "action": ["all zones"],
}  # fmt: skip


def step(number: int, reward: float, **more: Any) -> dict[str, Any]:
    return {
        "step": number, "observation": [20.0 + number, 22.0 + number, 5.0 - number, 1.0, 0.0, 0.0],
        "action": [0.25], "reward": reward, "energy": 0.5, "comfort": 1.5, **more,
    }  # fmt: skip


def spoken(number: int, reward: float, text: str = '{"power": 0.25}', parsed: str = "json") -> dict[str, Any]:
    return step(
        number, reward, prompt="abc", state=f"state {number}", reply=text, parsed=parsed, fallback=parsed == "failed",
        token_ids=[1, 2], sampled_logprobs=[-0.5, -0.25],
    )  # fmt: skip


def content(controller: str, rewards: dict[int, list[float]], make=step, **more: Any) -> dict[str, Any]:
    """A file whose days have these rewards."""
    episodes = [
        {
            "task": f"task-{day}", "day": day, "hour": 0, "seed": 0, "return": sum(found),
            "steps": [make(i, r) for i, r in enumerate(found)],
        }
        for day, found in rewards.items()
    ]  # fmt: skip
    prompts = {"abc": [{"role": "system", "content": "Heat."}]}
    return {
        "format": 1, "controller": controller, "model": None, "seed": 0, "world": WORLD, "prompts": prompts,
        "episodes": episodes, **more,
    }  # fmt: skip


def file_of(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two files with days 3 and 9 in common: returns -3, -7, -20 and -2, -4."""
    ppo = content("ppo", {9: [-3.0, -4.0], 3: [-1.0, -2.0], 30: [-10.0, -10.0]})
    llm = content("llm", {3: [-1.0, -1.0], 9: [-2.0, -2.0]}, spoken, model={"name": "tiny"})
    llm["episodes"][1]["steps"][1] |= {"parsed": "failed", "fallback": True}
    return [file_of(tmp_path / "ppo.json", ppo), file_of(tmp_path / "llm.json", llm)]


def test_what_is_read_of_a_file():
    problems = Problems()
    found = days(content("llm", {3: [-1.0, -2.0], 9: [-3.0, -4.0]}, spoken), problems)
    assert (found["controller"], found["world"], found["zones"]) == ("llm", "Hut, Hot, uniform", 2)
    first = found["episodes"][0]
    names = ("task", "day", "total", "steps", "energy", "comfort", "replies", "parsed")
    assert {name: first[name] for name in names} == {
        "task": "task-3", "day": 3, "total": -3, "steps": 2, "energy": 0.5, "comfort": 1.5, "replies": 2, "parsed": 2,
    }  # fmt: skip
    # Zones of 20 and 22 degrees, then 21 and 23; outdoors 5, then 4.
    assert first["drawn"] == {
        "step": [0, 1], "reward": [-1, -2], "inside": [21, 22], "low": [20, 21], "high": [22, 23], "outside": [5, 4],
        "power": [0.25, 0.25],
    }  # fmt: skip
    # Means of -1 and -3, and of -2 and -4.
    assert found["by_step"] == {"x": [0, 1], "y": [-2, -3]}
    assert problems.told() == []


def test_what_does_not_fit_is_left_out_and_told():
    problems = Problems()
    data = content("ppo", {3: [-1.0]})
    data["episodes"] += [
        7, {"task": "x"}, {"steps": [3]},
        {"task": ["deep"], "day": "x", "return": float("nan"),
         "steps": [{"reward": 1e400, "observation": "?"}, {"step": 2.5}]},
    ]  # fmt: skip
    found = days(data, problems)
    assert [episode["task"] for episode in found["episodes"]] == ["task-3", '["deep"]']
    broken = found["episodes"][1]
    assert (broken["day"], broken["total"], broken["energy"]) == (None, 0, None)
    assert broken["drawn"]["reward"] == [None, None]
    assert problems.told() == [
        "episode 2: not an object; left out.",
        "episode 3: has no steps; left out.",
        "episode 4: has no steps; left out.",
    ]
    json.dumps(found, allow_nan=False)
    assert len(list(records(data))) == 2


def test_days_beyond_what_a_page_can_draw_keep_their_returns(monkeypatch):
    monkeypatch.setattr(days_module, "STEPS", 4)
    problems = Problems()
    found = days(content("ppo", {day: [-1.0, -1.0] for day in range(5)}), problems)
    # First and last, which are the first of an even spread.
    assert [episode["drawn"] is not None for episode in found["episodes"]] == [True, False, False, False, True]
    assert [episode["total"] for episode in found["episodes"]] == [-2] * 5
    assert problems.told() == ["3 of 5 days have too many steps to be drawn here; their returns are shown."]


def test_episodes_are_trajectories_of_turns():
    record = next(records(content("llm", {3: [-1.0, -2.0]}, spoken)))
    assert record["messages"] == [{"role": "system", "content": "Heat."}]
    assert (record["task"], record["reward"]) == ("task-3", -3.0)
    turn = record["turns"][1]
    assert (turn["prompt"], turn["reply"], turn["reward"], turn["token_ids"]) == (
        "state 1",
        '{"power": 0.25}',
        -2.0,
        [1, 2],
    )
    assert turn["info"]["parsed"] == "json"
    silent = next(records(content("ppo", {3: [-1.0]})))
    assert silent["turns"][0]["reply"] == "[0.25]"
    assert silent["messages"] == []


def test_only_files_of_buildings_are_taken_for_one(tmp_path, two):
    assert is_building(json.loads(two[0].read_text()))
    for other in ([], {}, {"episodes": []}, {"episodes": {}, "world": {}, "controller": "x"}):
        assert not is_building(other)
    replies = file_of(tmp_path / "replies.json", [{"prompt": "a", "reply": "b"}])
    assert [RunFolder(path).building for path in (two[0], replies)] == [True, False]
    state = RunFolder(two[1]).state(final=True)
    assert state["what"] == {"algorithm": "llm", "model": "tiny", "world": "Hut, Hot, uniform", "start": ""}
    assert RunFolder(replies).state()["days"] is None


def test_days_beside_runs_are_refused(tmp_path, two):
    run = make_run(tmp_path / "run", algorithm="sft", steps=3)
    replies = file_of(tmp_path / "replies.json", [{"prompt": "a", "reply": "b"}])
    for other in (run, replies):
        with pytest.raises(StorageError, match=r"ppo\.json has the days of a building, and .* is another kind"):
            write_report([other, two[0]], tmp_path / "x.html")
        with pytest.raises(StorageError, match="another kind"):
            Server([two[0], other])
    assert not (tmp_path / "x.html").exists()


def test_the_count_of_trajectories_is_that_of_episodes(tmp_path, two, capsys):
    assert main(["report", *map(str, two), "--out", str(tmp_path / "x.html")]) == 0
    assert "5 trajectories\n" in capsys.readouterr().out
    written = write_report(two, tmp_path / "y.html", max_samples=4)
    assert (written.taken, written.total) == (4, 5)


def test_the_page_of_two_files(page: Page, tmp_path, two):
    page.open(write_report(two, tmp_path / "days.html").path)
    assert page.texts("#sections a") == ["Summary", "Days", "Samples"]
    assert page.text("#summary-title") == "2 files side by side"
    rows = page.texts("#days-body table tbody tr")
    # -7, -3 and -20: mean -10, s = sqrt((9 + 49 + 100) / 2) = 8.888; 4.303 s / sqrt 3 = 22.08.
    assert rows[0].split("\t")[3:6] == ["3", "\u221210", "\u221232.1 to 12.1"]
    # -2 and -4: mean -3, s = 1.414; 12.706 s / sqrt 2 = 12.706. Of four replies three were read.
    assert rows[1].split("\t")[3:6] == ["2", "\u22123", "\u221215.7 to 9.71"]
    assert rows[1].split("\t")[8:] == ["75.0 %", "25.0 %"]
    # Day 3: -2 + 3 = 1; day 9: -4 + 7 = 3.
    assert rows[2].split("\t") == ["llm.json \u2212 ppo.json", "+2", "\u221210.7 to 14.7", "2", "2", "0"]
    options = page.texts("#days-body select option")
    assert options == [
        "day 3, task-3 (2 of 2 files)", "day 9, task-9 (2 of 2 files)", "day 30, task-30 (1 of 2 files)",
    ]  # fmt: skip
    label = "document.querySelectorAll('#days-body .plot')[2].getAttribute('aria-label')"
    page.js("document.querySelectorAll('#days-body .plot')[2].scrollIntoView()")
    page.until(label)
    assert page.js(label).startswith("Reward. ppo.json: \u22122 at step 1; llm.json: \u22121 at step 1.")
    page.js(
        "(() => { const s = document.querySelector('#days-body select'); s.value = 'task-30';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert page.js(label).startswith("Reward. ppo.json: \u221210 at step 1. Arrow")
    page.click("#runbar button", 0)
    assert page.texts("#days-body select option") == ["day 3, task-3", "day 9, task-9"]
    assert page.js(label).startswith("Reward. llm.json: \u22121 at step 1.")
    assert len(page.texts("#days-body table")) == 1


def test_live_too(page: Page, two):
    with Server(two, port=0) as server:
        server.start()
        page.open(server.url)
        assert page.texts("#sections a") == ["Summary", "Days", "Samples"]
        page.until("document.querySelectorAll('#days-body select option').length === 3")


def test_hostile_texts_do_nothing(page: Page, tmp_path):
    """Every text as controller, task, zone, world, prompt, state, reply and info of a file."""
    page.size(560, 420)
    texts = HOSTILE[::3]
    for first in range(0, len(texts), 10):
        paths = []
        for number, text in enumerate(texts[first : first + 10]):
            data = content(
                text, {3: [-1.0]}, lambda i, r, text=text: spoken(i, r, text) | {"state": text, "parsed": text}
            )
            data["world"] = WORLD | {"building": text, text: text, "zones": [text, text]}
            data["model"] = {"name": text}
            data["prompts"] = {"abc": [{"role": text, "content": text}]}
            data["episodes"][0]["task"] = text
            paths.append(file_of(tmp_path / f"{number}.json", data))
        page.open(write_report(paths, tmp_path / "x.html").path)
        assert page.js(CHECK) == []
        page.js(UNFOLD)
        read = set(page.js(READ.replace("TOTAL", str(len(paths))), timeout=300))
        assert [text for text in texts[first : first + 10] if visible(text) not in read] == []
        page.browser.wait(0.05)
        assert page.js(CHECK) == []
