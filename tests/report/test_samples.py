"""Trajectories: the index, the chunks, and which are taken where there are too many."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

from sapwood.report.reading import Problems
from sapwood.report.samples import (
    CUT,
    ERROR,
    FALLBACK,
    PARSE_FAILED,
    TRUNCATED,
    Packed,
    SampleFile,
    choose,
    list_samples,
    pack_file,
    spread,
)
from tests.report.synthetic import make_run, record, write_samples


def packed(tmp_path: Path, records: list[dict[str, Any]], most: int | None = None) -> Packed:
    return pack_file(SampleFile(write_samples(tmp_path / "step_000007.jsonl.gz", records), "step", 7), most)


def opened(found: Packed, number: int = 0) -> tuple[dict[str, Any], list[Any]]:
    chunk = found.chunks[number]
    return json.loads(gzip.decompress(chunk.texts)), json.loads(gzip.decompress(chunk.tokens))


def test_a_row_of_the_index(tmp_path: Path) -> None:
    found = packed(tmp_path, [record("t", "yes  it\nis", ["yes", " it", "\nis"], 0.25, group=3, member=1, step=7)])
    assert found.tasks == ["t"]
    assert found.rows == [[0, 3, 1, 0.25, 1, 3, 0, 7, "yes it is"]]


def test_flags(tmp_path: Path) -> None:
    plain = {"parsed": "json", "fallback": False}
    cases = {
        0: {"turn_info": plain},
        PARSE_FAILED: {"turn_info": {"parsed": "failed"}},
        PARSE_FAILED | FALLBACK: {"turn_info": {"parsed": "failed", "fallback": True}},
        ERROR: {"error": "it broke", "turn_info": plain},
        TRUNCATED: {"truncated": True, "turn_info": {}},
        CUT: {"turn_stop_reason": "length", "turn_info": None},
    }
    found = packed(tmp_path, [record("t", "x", ["x"], **given) for given in cases.values()])
    assert [row[6] for row in found.rows] == list(cases)


def test_a_trajectory_comes_back_from_its_chunk(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "same question"}]
    given = [record("t", f"reply {i}", ["reply", f" {i}"], i / 10, messages=messages, answer="4") for i in range(130)]
    found = packed(tmp_path, given)
    assert [chunk.first for chunk in found.chunks] == [0, 48, 96]
    texts, tokens = opened(found, 1)
    strings = texts["strings"]
    one = texts["records"][2]  # the 50th
    turn = one["turns"][0]
    assert strings[turn["reply"]] == "reply 50"
    assert strings[one["answer"]] == "4"
    assert one["messages"] == [["user", strings.index("same question")]]
    assert one["parts"] == [["env", 5], ["format", 1]]
    assert strings.count("same question") == 1  # once a chunk, however often it is asked
    assert tokens[2][0]["tokens"] == ["reply", " 50"]
    original = given[50]["turns"][0]
    for name in ("advantages", "ratios", "logprobs", "sampled_logprobs"):
        for got, sent in zip(tokens[2][0][name], original[name], strict=True):
            assert math.isclose(got, sent, rel_tol=6e-4)
    assert tokens[2][0]["ids"] == original["token_ids"]


def test_numbers_that_json_has_not_and_columns_that_do_not_fit(tmp_path: Path) -> None:
    found = packed(
        tmp_path,
        [
            record(
                "t",
                "ab",
                ["a", "b"],
                math.nan,
                turn_advantages=[math.nan, 1.5],
                turn_ratios=[math.inf, None],
                turn_logprobs=None,
                turn_sampled_logprobs=[-1.0],
            )
        ],
    )
    _, tokens = opened(found)
    assert found.rows[0][3] is None
    assert tokens[0][0]["advantages"] == [None, 1.5]
    assert tokens[0][0]["ratios"] == [None, None]
    assert "logprobs" not in tokens[0][0]
    assert "sampled_logprobs" not in tokens[0][0]


def test_records_of_older_and_foreign_files(tmp_path: Path) -> None:
    odd: list[Any] = [
        {},
        {"task": 7, "turns": "none", "messages": 3, "reward": "high", "reward_parts": [1]},
        {"task": "x", "turns": [None, {"reply": None, "info": [1], "tokens": 5, "token_ids": "abc"}]},
        {"prompt": [{"role": "user"}], "reply": "as sapwood generate writes it", "stop_reason": "eos", "tokens": 6},
        {"task": {"a": 1}, "step": 3.5, "group": True, "answer": [1, {"b": 2}], "error": {"kind": "x"}},
    ]
    found = packed(tmp_path, odd)
    assert len(found.rows) == 5
    assert found.problems == []
    texts, tokens = opened(found)
    assert found.rows[3][8] == "as sapwood generate writes it"
    assert texts["strings"][texts["records"][4]["answer"]] == '[1, {"b": 2}]'
    assert len(tokens) == 5


def test_files_of_prompts_and_replies_and_json_arrays(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "short"}, {"role": "user", "content": "how many?"}]
    (tmp_path / "g.jsonl").write_text(
        json.dumps({"prompt": talk, "reply": "three", "stop_reason": "eos", "tokens": 1, "sample": 2})
        + "\n"
        + json.dumps({"prompt": "why?", "reply": "so", "stop_reason": "length", "tokens": 1})
        + "\n"
    )
    found = pack_file(SampleFile(tmp_path / "g.jsonl", "file", 0))
    assert found.tasks == ["how many?", "why?"]
    assert [(row[2], row[6], row[8]) for row in found.rows] == [(2, 0, "three"), (None, CUT, "so")]
    texts, _ = opened(found)
    assert [role for role, _ in texts["records"][0]["messages"]] == ["system", "user"]
    assert texts["records"][0]["turns"][0]["prompt"] is None
    for name, content in (
        ("a.json", [record("t", "x", ["x"])]),
        ("b.json", {"version": 1, "steps": [record("t", "x", [])]}),
    ):
        (tmp_path / name).write_text(json.dumps(content, indent=2))
        assert len(pack_file(SampleFile(tmp_path / name, "file", 0)).rows) == 1
    for content, told in (("[{", "not JSON, or cut short"), ("3", "holds no array of records")):
        (tmp_path / "c.json").write_text(content)
        [problem] = pack_file(SampleFile(tmp_path / "c.json", "file", 0)).problems
        assert told in problem


def test_texts_that_utf8_has_no_bytes_for_and_huge_ones(tmp_path: Path) -> None:
    huge = "x" * 1_000_000
    found = packed(
        tmp_path, [record("\ud800", "\x00\u2028\ud83d", ["\x00"]), record("t", huge, []), record("t", huge * 5, [])]
    )
    texts, _ = opened(found)
    assert texts["strings"][texts["records"][0]["turns"][0]["reply"]] == "\x00\u2028\ud83d"
    everything = [text for n in range(len(found.chunks)) for text in opened(found, n)[0]["strings"]]
    assert huge in everything
    assert any(text.endswith("... (cut here: 5,000,000 characters in the file)") for text in everything)
    assert len(found.chunks) == 2  # the texts fill a chunk long before 48 of them


def test_a_damaged_file_gives_what_stands_before_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=20, samples_every=10)
    path = run / "samples" / "step_000010.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found = pack_file(SampleFile(path, "step", 10))
    assert 0 < len(found.rows) < 16
    assert found.problems == [
        f"step_000010.jsonl.gz: the file is cut short after line {len(found.rows)}; what stands before is shown."
    ]
    path.write_bytes(b"\x1f\x8bnonsense")
    assert pack_file(SampleFile(path, "step", 10)).problems == [
        "step_000010.jsonl.gz: the gzip data is damaged after line 0; what stands before is shown."
    ]
    path.write_bytes(b"no json\n" * 5 + b"{}\n")
    found = pack_file(SampleFile(path, "step", 10))
    assert len(found.rows) == 1
    assert found.problems[-1] == "step_000010.jsonl.gz: 2 further lines are not JSON records; left out."


def test_which_files_are_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=20, samples_every=10, eval_every=20)
    folder, problems = run / "samples", Problems()
    (folder / "step_000030.jsonl.gz.part").write_bytes(b"being written")
    (folder / "<img src=x>.jsonl.gz").write_bytes(b"")
    (folder / "step_000040.jsonl.gz").symlink_to("/etc/hostname")
    os.mkfifo(folder / "step_000050.jsonl.gz")
    names = [file.name for file in list_samples(run, problems)]
    assert names == [f"{name}.jsonl.gz" for name in ("eval_000000", "eval_000020", "step_000010", "step_000020")]
    assert len(problems.told()) == 2


def test_spread_begins_with_the_ends_and_the_middle_and_has_everything_once() -> None:
    assert spread(9)[:5] == [0, 8, 4, 2, 6]
    for n in (0, 1, 2, 3, 7, 100, 1001):
        assert sorted(spread(n)) == list(range(n))


def test_choosing_takes_whole_steps_evenly_and_shares_with_held_out_tasks(tmp_path: Path) -> None:
    files = []
    for step in range(1, 12):  # 11 steps of 10, 3 evaluations of 10
        path = write_samples(tmp_path / f"step_{step:06d}.jsonl.gz", [record("t", "x", ["x"])] * 10)
        files.append(SampleFile(path, "step", step))
    for step in (0, 5, 10):
        path = write_samples(tmp_path / f"eval_{step:06d}.jsonl.gz", [record("t", "x", ["x"])] * 10)
        files.append(SampleFile(path, "eval", step))
    assert choose(files, 140).sentence == ""
    choice = choose(files, 60)
    assert (choice.total, choice.taken) == (140, 60)
    assert choice.sentence == "80 of 140 trajectories are left out of this page"
    assert [(file.kind, file.step, part) for file, part in choice.kept] == [
        ("step", 1, None),
        ("step", 6, None),
        ("step", 11, None),
        ("eval", 0, None),
        ("eval", 5, None),
        ("eval", 10, None),
    ]
    # A file that doesn't fit is cut, and what one kind leaves goes to the other.
    assert [(file.step, part) for file, part in choose(files[:11], 25).kept] == [(1, None), (6, 5), (11, None)]
    assert choose(files[11:], 100).taken == 30
    assert choose(files, 0).taken == 0
