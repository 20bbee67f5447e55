"""Files that are made to break their reader, and caches that are damaged: sentences, and nothing half-written."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapwood import cli
from sapwood.data import read
from sapwood.data.check import check
from sapwood.data.pairs import write_pairs
from sapwood.data.prepare import prepare
from sapwood.data.tasks import write_tasks
from sapwood.envs.prompts import Prompts
from sapwood.errors import ConfigError, DataError, StorageError
from tests.data.conftest import Lines, records

GOOD = {"prompt": "1+1", "response": "2"}


def bad(path: Path, **options: Any) -> list[str]:
    return check([str(path)], options).bad


# ---- values -------------------------------------------------------------------------------------------------


def test_numbers_beyond_floats(lines: Lines) -> None:
    huge = 10**400  # JSON has it, a float doesn't
    path = lines([{"prompt": huge, "response": "a"}, {"prompt": "a", "completion": "b", "label": huge}])
    assert bad(path) == [f"{path} line 2: field 'label' is inf; rewards and margins must be finite numbers"]


def test_depth_that_could_not_be_read_back(lines: Lines) -> None:
    deep = "[" * 300 + "]" * 300
    record = '{{"prompt": "a", "response": "b", "{}": {}}}'
    path = lines([record.format("x", deep), record.format("ground_truth", deep), json.dumps(GOOD)])
    told = "holds values nested more than 50 deep"
    assert bad(path) == [f"{path} line 1: {told}", f"{path} line 2: {told}"]


def test_a_first_line_of_brackets(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a":' * 1500 + "1" + "}" * 1500 + "\n")
    (told,) = bad(path)
    assert "not usable JSON" in told or "nested" in told


def test_what_a_message_echoes_is_short_and_printable(lines: Lines) -> None:
    role = {"messages": [{"role": "x" * 100_000, "content": "a"}]}
    names = {f"\x1b[2J{i}": 1 for i in range(200)} | {"\ud800": 1}
    told = bad(lines([role, names, {"messages": [{"role": "user", "content": [{"type": "\x1b" * 9999}]}]}]))
    assert len(told) == 3
    assert all(len(sentence) < 1000 and sentence.isprintable() for sentence in told)


def test_a_report_of_surrogates_can_be_printed(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(lines([{"\ud800": 1}]))]) == 1
    capsys.readouterr().out.encode()


# ---- files --------------------------------------------------------------------------------------------------


def test_a_table_without_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf")
    assert bad(path) == [f"{path} line 1: the header names no column; the first line must name them."]


def test_an_archive_that_unpacks_to_one_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_LONGEST", 1 << 20)
    for name in ("a.jsonl.gz", "b.csv.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b'{"prompt": "' + b"x" * (3 << 20)))
        (told,) = bad(path)
        assert told.startswith(f"{path} line 1: is longer than any record")


def test_dates_and_zones_that_python_lacks(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    when = pa.array([0, 2**62, 0], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a"] * 3, "response": ["b"] * 3, "when": when}), path)
    (told,) = bad(path)
    assert told.startswith(f"{path} row 2: holds a value that can't be read")
    zone = pa.array([1], pa.timestamp("us", "No/Where"))
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], "when": zone}), path)
    assert "row 1: holds a value that can't be read" in bad(path)[0]


def test_a_parquet_file_that_speaks_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    content = path.read_bytes()
    for at in range(len(content) - 200, len(content) - 8):
        path.write_bytes(content[:at] + b"\x1f" + content[at + 1 :])
        assert all(sentence.isprintable() for sentence in bad(path))


@pytest.mark.parametrize("name", ["~nobodyhere/x.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl", "/dev/zero"])
def test_paths_that_no_file_can_have(name: str) -> None:
    (told,) = bad(Path(name))
    assert len(told) < 400
    assert any(words in told for words in ("no such file", "no file matches", "is a device or a pipe"))


def test_options_are_echoed_in_part(lines: Lines) -> None:
    with pytest.raises(DataError) as caught:
        check([str(lines([GOOD]))], {"max_samples": "9" * 5000})
    assert len(str(caught.value)) < 400


# ---- the cache ----------------------------------------------------------------------------------------------


def damage_of(name: str, change: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(change(content))

    return damage


def gone(folder: Path) -> None:
    (folder / "records.arrow").unlink()


def a_folder(folder: Path) -> None:
    (folder / "facts.json").unlink()
    (folder / "facts.json").mkdir()


DAMAGES = {
    "facts cut": damage_of("facts.json", lambda content: content[:9]),
    "facts of another type": damage_of("facts.json", lambda _: b"null"),
    "facts of less": damage_of("facts.json", lambda _: b"{}"),
    "facts of more": damage_of("facts.json", lambda content: content.replace(b'"kept": 3', b'"kept": 9')),
    "facts a folder": a_folder,
    "records cut": damage_of("records.arrow", lambda content: content[:-40]),
    "records garbled": damage_of("records.arrow", lambda content: b"\xff" * len(content)),
    "records gone": gone,
    "bad cut": damage_of("bad.jsonl", lambda _: b"x"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_made_again(lines: Lines, cache: Path, name: str) -> None:
    path = lines([GOOD] * 3)
    before = records(path)
    (folder,) = (cache / "data").iterdir()
    DAMAGES[name](folder)
    assert records(path) == before


def test_damage_within_a_record_of_the_cache_is_told(lines: Lines, cache: Path) -> None:
    path = lines([GOOD] * 3)
    records(path)
    (folder,) = (cache / "data").iterdir()
    content = (folder / "records.arrow").read_bytes()
    (folder / "records.arrow").write_bytes(content.replace(b'[[["user"', b'[[[{user"', 1))
    with pytest.raises(DataError, match=r"the cache of .*data\.jsonl is damaged; remove this folder"):
        records(path)


# ---- what is written ----------------------------------------------------------------------------------------

ROLLOUT = {
    "task": "t",
    "group": 0,
    "reward": 1.0,
    "messages": [{"role": "user", "content": "p"}],
    "turns": [{"reply": "r"}],
}
WRONG = [
    {"reward": "high"},
    {"reward": None},
    {"reward": True},
    {"reward": float("nan")},
    {"turns": 3},
    {"turns": [3]},
    {"turns": [{}]},
    {"turns": [{"reply": None}]},
    {"turns": [{"reply": "\ud800"}]},
    {"messages": "hi"},
    {"messages": [{"role": "user"}]},
    {"answer": "\ud800"},
]


@pytest.mark.parametrize("change", WRONG, ids=[str(change)[:30] for change in WRONG])
def test_rollouts_of_other_types(lines: Lines, tmp_path: Path, change: dict[str, Any]) -> None:
    out = tmp_path / "pairs.jsonl"
    out.write_text("precious\n")
    path = lines([ROLLOUT, {**ROLLOUT, **change}], "rollouts.jsonl")
    with pytest.raises(DataError, match="line 2: not a rollout, its"):
        write_pairs(path, out)
    assert out.read_text() == "precious\n"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("raw", ["[" * 100_000, '{"reward": ' + "9" * 5000 + "}"], ids=["deep", "digits"])
def test_rollouts_that_json_does_not_read(lines: Lines, tmp_path: Path, raw: str) -> None:
    with pytest.raises(DataError, match="line 1: not JSON"):
        write_pairs(lines([raw]), tmp_path / "pairs.jsonl")


def test_a_gap_that_is_no_number(lines: Lines, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the gap of their rewards"):
        write_pairs(lines([ROLLOUT]), tmp_path / "pairs.jsonl", min_gap=float("nan"))


def test_tasks_that_fail_leave_nothing(lines: Lines, tmp_path: Path) -> None:
    family = Prompts(path=lines([{"prompt": "a"}, {"prompt": "b"}]), eval_fraction=0)
    out = tmp_path / "tasks.jsonl"
    out.write_text("precious\n")
    with pytest.raises(ConfigError, match="no prompt and answer of its own"):
        write_tasks(family, "train", 2, 0, out)
    assert out.read_text() == "precious\n"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("note", ["[]", '{"x": {"key": 1}}', '{"x": 3}', "{", "[" * 100_000])
def test_notes_of_preparations_that_are_garbled(tmp_path: Path, note: str) -> None:
    source = tmp_path / "belle.json"
    source.write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".prepared.json").write_text(note)
    with pytest.raises(StorageError, match=r"\.prepared\.json: can't be read"):
        prepare("belle", tmp_path / "out", source=source)


@pytest.mark.parametrize("state", ["", "[]", '{"keys": 1}', '{"key": 1, "size": "x"}', "\xff"])
def test_a_garbled_state_of_a_preparation_begins_again(tmp_path: Path, state: str) -> None:
    source = tmp_path / "belle.json"
    source.write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".belle_sft_train.json.part").write_text("[\nrubbish")
    (out / ".belle_sft_train.json.state").write_bytes(state.encode("latin-1"))
    (made,) = prepare("belle", out, source=source)
    assert json.loads(Path(made.path).read_text()) == [{"prompt": "a", "response": "b"}]


def test_a_field_beyond_what_csv_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "response"], ["a", "x" * 500_000]])
    assert len(records(path)[0].replies[0][0].content) == 500_000
