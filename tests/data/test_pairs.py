"""Scored rollouts become pairs of what was better and worse."""

from __future__ import annotations

import json

import pytest

from sapwood.data.pairs import PairCounts, write_pairs
from sapwood.errors import ConfigError, DataError

PROMPT = [{"role": "user", "content": "1+1="}]


def rollout(group, reward, reply, **changes):
    turns = [{"reply": reply}]
    return {"task": f"t{group}", "messages": PROMPT, "group": group, "reward": reward, "turns": turns, **changes}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs_of(tmp_path, records, **options):
    out = tmp_path / "pairs.jsonl"
    counts = write_pairs(write(tmp_path / "rollouts.jsonl", records), out, **options)
    return counts, [json.loads(line) for line in out.read_text().splitlines()]


def test_best_and_worst_of_a_task(tmp_path):
    records = [
        rollout(0, 0.5, "b"),
        rollout(0, 1.0, "2"),
        rollout(0, 0.0, "3"),
        rollout(1, 1.0, "2"),
        rollout(1, 1.0, "x"),
    ]
    counts, pairs = pairs_of(tmp_path, records)
    assert counts == PairCounts(tasks=2, pairs=1, even=1)
    assert pairs == [{"prompt": PROMPT, "chosen": "2", "rejected": "3", "chosen_reward": 1.0, "rejected_reward": 0.0}]


def test_more_pairs_of_a_task_never_repeat_and_keep_the_gap(tmp_path):
    records = [rollout(0, 1.0, "2"), rollout(0, 1.0, "2"), rollout(0, 0.6, "b"), rollout(0, 0.0, "3")]
    counts, pairs = pairs_of(tmp_path, records, per_task=9, min_gap=0.5)
    # 2 > 3 (by 1), b > 3 (by .6); 2 > b is a gap of .4 only, and the second "2" would repeat the first.
    assert {(p["chosen"], p["rejected"]) for p in pairs} == {("2", "3"), ("b", "3")}
    assert counts.pairs == 2


def test_failed_and_empty_replies_are_left_out(tmp_path):
    records = [rollout(0, 1.0, "2"), rollout(0, -1.0, "3", error="boom"), rollout(0, -2.0, " "), rollout(0, 0.0, "4")]
    _, pairs = pairs_of(tmp_path, records, per_task=5)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("2", "4")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1: not JSON"),
        ('{"prompt": "x"}', "line 1: not a rollout"),
        (json.dumps(rollout(0, 1.0, "a", turns=[{"reply": "a"}, {"reply": "b"}])), "line 1: only single-turn"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, told):
    path = tmp_path / "r.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=told):
        write_pairs(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_file_and_bad_options(tmp_path):
    with pytest.raises(DataError, match="can't be read"):
        write_pairs(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ConfigError):
        write_pairs(tmp_path / "none.jsonl", tmp_path / "out.jsonl", per_task=0)


def test_the_shuffled_twin_swaps_about_half(tmp_path):
    records = [rollout(g, r, f"{r}") for g in range(200) for r in (0.0, 1.0)]
    _, plain = pairs_of(tmp_path, records)
    _, twin = pairs_of(tmp_path, records, shuffle=True)
    assert all(pair["chosen"] == "1.0" for pair in plain)
    swapped = [pair for pair in twin if pair["chosen"] == "0.0"]
    assert 70 < len(swapped) < 130  # 100 +- 4 standard deviations of 7
    assert all(pair["chosen_reward"] < pair["rejected_reward"] for pair in swapped)


def test_the_answer_of_the_task_joins_the_replies(tmp_path):
    records = [rollout(0, 0.0, "3", answer=2), rollout(0, 0.0, "4", answer=2)]
    assert pairs_of(tmp_path, records)[1] == []
    _, pairs = pairs_of(tmp_path, records, answers=True)
    assert [(p["chosen"], p["chosen_reward"]) for p in pairs] == [("2", 1.0)]
