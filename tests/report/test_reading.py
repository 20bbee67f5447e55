"""Reading what a killed, running or foreign run left."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from sapwood.report.reading import (
    Damaged,
    Problems,
    Tail,
    finite,
    lines,
    parse_line,
    read_json,
    read_yaml,
    regular,
    shorter,
    whole,
)


def test_tail_gives_what_came_since_and_waits_for_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = Tail(tmp_path, "m.jsonl")
    assert tail.read() == (False, [])
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"st')
    assert tail.read() == (False, [{"step": 1}, {"step": 2}])
    assert tail.torn
    assert tail.read() == (False, [])
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"step":3}\n')
    assert tail.read() == (False, [{"step": 3}])
    assert not tail.torn


def test_a_last_line_without_an_end_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}')
    tail = Tail(tmp_path, "m.jsonl")
    assert tail.read() == (False, [{"step": 1}, {"step": 2}])
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"step":3}\n')
    assert tail.read() == (False, [{"step": 3}])


@pytest.mark.parametrize("rest", [b'{"step":9}\n', b'{"step":9}\n' * 40], ids=["shorter", "longer than before"])
def test_tail_starts_again_where_a_file_was_cut_as_resuming_does(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":1}\n' + b'{"step":2}\n' * 5)
    tail = Tail(tmp_path, "m.jsonl")
    tail.read()
    path.write_bytes(b'{"step":1}\n' + rest)
    again, records = tail.read()
    assert again
    assert records[:2] == [{"step": 1}, {"step": 9}]
    path.unlink()
    assert tail.read() == (True, [])


def test_bad_lines_are_told_with_their_number_and_left_out(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    (tmp_path / "m.jsonl").write_bytes(b'{"step":1}\nnot json\n[1]\n\xff\xfe\n' + deep + b'\n{"step":2}\n')
    tail = Tail(tmp_path, "m.jsonl")
    assert tail.read() == (False, [{"step": 1}, {"step": 2}])
    assert tail.problems.told() == [f"m.jsonl line {n}: not a JSON record; left out." for n in (2, 3, 4, 5)]


def packed(*texts: str) -> bytes:
    return b"".join(gzip.compress(text.encode(), mtime=0) for text in texts)


def test_lines_of_plain_text_and_of_gzip_with_several_members(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\ntwo\nthree")
    assert list(lines(tmp_path / "a")) == [b"one", b"two", b"three"]
    (tmp_path / "b").write_bytes(packed("one\ntw", "o\n", "three\n") + b"\0" * 512)
    assert list(lines(tmp_path / "b")) == [b"one", b"two", b"three"]
    (tmp_path / "c").write_bytes(b"")
    assert list(lines(tmp_path / "c")) == []


def test_a_gzip_file_that_is_cut_or_damaged_gives_the_lines_before(tmp_path: Path) -> None:
    rng = os.urandom(40_000).hex()
    whole_file = packed("".join(f"{i} {rng[i * 80 : i * 80 + 80]}\n" for i in range(1000)))

    def read(content: bytes) -> tuple[list[bytes], str]:
        (tmp_path / "x").write_bytes(content)
        found: list[bytes] = []
        with pytest.raises(Damaged) as caught:
            found.extend(lines(tmp_path / "x"))
        return found, str(caught.value)

    found, told = read(whole_file[: len(whole_file) // 2])
    assert told == "the file is cut short"
    assert 400 < len(found) < 600
    assert [int(line.split()[0]) for line in found] == list(range(len(found)))
    assert all(len(line.split()[1]) == 80 for line in found)
    middle = len(whole_file) // 2
    found, told = read(whole_file[:middle] + b"\0" * 64 + whole_file[middle + 64 :])
    assert told == "the gzip data is damaged"
    assert len(found) < 600


def test_only_plain_files_of_the_folder_are_read(tmp_path: Path) -> None:
    run, problems = tmp_path / "run", Problems()
    run.mkdir()
    (tmp_path / "secret.json").write_text('{"a": 1}')
    (run / "evaluation.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(run / "recipe.yaml")
    (run / "environment.json").mkdir()
    assert read_json(run, "evaluation.json", problems) is None
    assert read_yaml(run, "recipe.yaml", problems) == {}
    assert regular(run, "environment.json", problems) is None
    assert regular(run, "nothing.json", problems) is None
    assert problems.told() == [
        "evaluation.json: a link that leads out of the run folder; left out.",
        "recipe.yaml: not a plain file; left out.",
        "environment.json: not a plain file; left out.",
    ]


@pytest.mark.parametrize(
    "text", ["a: [1", "- 1\n- 2\n", "a: 2026-99-99", "!!python/object/apply:os.system ['true']", "&a [*a]"]
)
def test_a_recipe_that_is_no_plain_mapping_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    problems = Problems()
    assert read_yaml(tmp_path, "recipe.yaml", problems) == {}
    assert len(problems.told()) == 1


def test_numbers() -> None:
    assert [finite(x) for x in (1, 2.5, True, None, "3", float("nan"), float("inf"), 10**400)] == [
        1.0,
        2.5,
        *[None] * 6,
    ]
    assert [whole(x) for x in (3, 3.0, 3.5, 2**60, True)] == [3, 3, None, None, None]
    assert shorter(0.123456789) == 0.1234568
    assert json.dumps(shorter(7.0)) == "7"
    assert shorter(None) is None
    assert parse_line(b'{"a": NaN}') is not None


def test_problems_are_told_once_and_counted_beyond_the_limit() -> None:
    problems = Problems(limit=2)
    for sentence in ("a", "b", "a", "c", "d"):
        problems.add(sentence)
    assert problems.told() == ["a", "b", "2 further problems of this kind are not listed."]
