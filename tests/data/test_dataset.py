"""Splits by content, mixtures by weight, orders by seed, and a cache that is mapped, never loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood.data.dataset import Dataset, open_data
from sapwood.data.section import DataSection
from sapwood.errors import DataError, StorageError
from sapwood.types import Message
from tests.data.conftest import Lines, opened

ROWS = [{"prompt": f"q{i}", "response": f"a{i}", "n": i} for i in range(100)]


def both(data: Any, seed: int = 0, **options: Any) -> tuple[Dataset, Dataset]:
    section = DataSection.model_validate({**(data if isinstance(data, dict) else {"path": str(data)}), **options})
    return open_data(section, "demonstrations", seed)


def prompts(data: Dataset) -> list[str]:
    return [record.prompt[-1].content for record in data]


def test_the_split_is_by_prompt_and_seed(lines: Lines) -> None:
    # Every prompt comes three times with different replies.
    path = lines([{"prompt": f"q{i % 100}", "response": f"a{i}"} for i in range(300)])
    train, held = both(path, eval_fraction=0.1)
    assert len(set(prompts(held))) == 10  # a tenth of the distinct prompts
    assert len(held) == 30
    assert not set(prompts(train)) & set(prompts(held))
    assert len(train) == 270
    again, other = both(path, eval_fraction=0.1)[1], both(path, seed=1, eval_fraction=0.1)[1]
    assert prompts(again) == prompts(held)
    assert set(prompts(other)) != set(prompts(held))


def test_a_split_moves_little_when_records_are_added(lines: Lines) -> None:
    before = set(prompts(both(lines(ROWS), eval_fraction=0.2)[1]))
    more = [*ROWS, {"prompt": "new", "response": "x"}]
    after = set(prompts(both(lines(more, "more.jsonl"), eval_fraction=0.2)[1]))
    assert len(before - after) <= 1


def test_few_records_still_leave_one_to_each_side(lines: Lines) -> None:
    train, held = both(lines(ROWS[:2]))
    assert (len(train), len(held)) == (1, 1)
    train, held = both(lines(ROWS[:1], "one.jsonl"))
    assert (len(train), len(held)) == (1, 0)
    train, held = both(lines(ROWS, "all.jsonl"), eval_fraction=0)
    assert (len(train), len(held)) == (100, 0)


def test_held_out_files_take_their_prompts_away_from_training(lines: Lines) -> None:
    held_out = [{"prompt": f"q{i}", "response": "other"} for i in range(5)]
    train, held = both({"sources": [str(lines(ROWS))], "eval_sources": [str(lines(held_out, "held.jsonl"))]})
    assert (len(train), len(held), train.report.in_eval) == (95, 5, 5)
    assert "5 records have a prompt of eval_sources" in "\n".join(train.report.lines())
    with pytest.raises(DataError, match="no record is left to learn from, all prompts are held out"):
        both({"sources": [str(lines(ROWS))], "eval_sources": [str(lines(ROWS, "same.jsonl"))]})


def test_an_epoch_is_every_record_once_in_its_own_order(lines: Lines) -> None:
    data = opened(lines(ROWS))
    first, second = data.order(0), data.order(1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first.tolist() != second.tolist() != list(range(100))
    assert opened(lines(ROWS)).order(0).tolist() == first.tolist()
    assert opened(lines(ROWS), seed=1).order(0).tolist() != first.tolist()
    assert opened(lines(ROWS), shuffle=False).order(3).tolist() == list(range(100))


def test_weights_are_shares_of_an_epoch(lines: Lines) -> None:
    small, large = lines(ROWS[:10], "small.jsonl"), lines(ROWS, "large.jsonl")
    sources = [{"path": str(small), "weight": 3}, {"path": str(large), "weight": 1}]
    data = opened({"sources": sources})
    # 110 records an epoch, three quarters of the small source: 82.5 and 27.5, the remainder to the first.
    assert data.shares() == [83, 27]
    drawn = [Counter((data.order(epoch) < 10).tolist()) for epoch in range(3)]
    assert drawn == [{True: 83, False: 27}] * 3
    # Over epochs each source goes on where it stopped: 4 x 27 = 108 draws are all 100 records, 8 of them twice.
    of_large = Counter(i for epoch in range(4) for i in data.order(epoch).tolist() if i >= 10)
    assert len(of_large) == 100
    assert Counter(of_large.values()) == {1: 92, 2: 8}
    # The same is drawn whoever asks first.
    assert opened({"sources": sources}).order(2).tolist() == data.order(2).tolist()


def test_without_shuffling_weights_interleave(lines: Lines) -> None:
    small, large = lines(ROWS[:10], "small.jsonl"), lines(ROWS[:30], "large.jsonl")
    sources = [{"path": str(small), "weight": 1}, {"path": str(large), "weight": 1}]
    order = opened({"sources": sources}, shuffle=False).order(0)
    assert (order < 10).sum() == 20
    assert abs((order[:10] < 10).sum() - 5) <= 1


def test_max_samples_reads_no_further(lines: Lines) -> None:
    path = lines([*ROWS[:10], "{broken"])
    assert prompts(opened(path, max_samples=10)) == [f"q{i}" for i in range(10)]
    with pytest.raises(DataError, match="line 11: not JSON"):
        opened(path, max_samples=11)
    data = opened({"sources": [str(path), {"path": str(lines(ROWS, "b.jsonl")), "max_samples": 2}]}, max_samples=8)
    assert data.shares() == [4, 2]  # half of 8 each, and of the second at most 2


def test_the_system_prompt_is_put_where_there_is_none(lines: Lines) -> None:
    own = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}
    data = opened(lines([ROWS[0], own]), system="Be kind.")
    assert data[0].prompt == (Message("system", "Be kind."), Message("user", "q0"))
    assert data[1].prompt[0] == Message("system", "system")


def test_the_cache_is_used_and_follows_the_file(lines: Lines, cache: Path) -> None:
    path = lines(ROWS)
    seen: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append(what)

    section = DataSection.model_validate(str(path))
    open_data(section, "demonstrations", 0, progress)
    assert seen
    seen.clear()
    open_data(section, "demonstrations", 0, progress)
    assert not seen  # mapped, not read
    lines(ROWS[:50])
    assert sum(map(len, open_data(section, "demonstrations", 0, progress))) == 50
    assert seen
    assert not list((cache / "data").glob(".making-*"))


def test_metadata_survives_whatever_it_is(lines: Lines) -> None:
    fields = {"list": [1, {"a": None}], "text": "é\n", "truth": True, "id": 2**60}
    record = opened(lines([{**ROWS[0], **fields}]))[0]
    assert record.metadata == {"n": 0, **fields}
    assert record.source.endswith("data.jsonl line 1")


def test_duplicates_are_counted(lines: Lines) -> None:
    report = opened(lines([*ROWS, ROWS[3], ROWS[3], {**ROWS[4], "n": "other metadata"}])).report
    assert report.duplicates == 3
    assert report.to_json()["sources"][0]["duplicates"] == 3


def test_labels_left_out_are_counted(lines: Lines) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i < 3} for i in range(10)]
    data = opened(lines(rows))
    assert len(data) == 3
    assert "7 left out: labelled undesirable" in "\n".join(data.report.lines())


def test_records_are_not_in_memory(lines: Lines, tmp_path: Path) -> None:
    # 160 MB of records; opening, mapping and going through them holds some 15, of them or of 40 MB alike.
    path = lines([{"prompt": f"{i} {'x' * 20000}", "response": "y" * 20000} for i in range(4000)])
    code = f"""
import re, pathlib
from sapwood.data.dataset import open_data
from sapwood.data.section import DataSection
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text()).group(1)) / 1024
open_data(DataSection.model_validate({str(lines([ROWS[0], ROWS[1]], "warm.jsonl"))!r}), "demonstrations", 0)
before = own()
train, _ = open_data(DataSection.model_validate({str(path)!r}), "demonstrations", 0)
train, _ = open_data(DataSection.model_validate({str(path)!r}), "demonstrations", 0)
total = sum(len(train[i].replies[0][0].content) for i in train.order(0).tolist())
assert total == 3800 * 20000, total
print(own() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert float(done.stdout) < 60, done.stdout


def test_a_folder_that_can_not_be_written(lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"can't write the data cache .* or set SAPWOOD_CACHE"):
        opened(lines(ROWS))


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(lines: Lines, cache: Path) -> None:
    path = lines([{"prompt": f"q{i}", "response": "a"} for i in range(9000)])
    code = f"""
import os, signal
from sapwood.data.dataset import open_data
from sapwood.data.section import DataSection
def progress(what, done, total):
    if done > 40: os.kill(os.getpid(), signal.SIGKILL)
open_data(DataSection.model_validate({str(path)!r}), "demonstrations", 0, progress)
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == -9
    assert list((cache / "data").glob(".making-*"))
    assert not list((cache / "data").glob("[!.]*"))
    train, held = both(path)
    assert len(train) + len(held) == 9000


def test_torch_is_not_imported() -> None:
    code = "import sapwood.data.dataset, sapwood.data.prompts, sapwood.data.check, sapwood.data.prepare, sys;"
    code += "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_report_holds_every_bad_record(lines: Lines) -> None:
    data = opened(lines([ROWS[0], *["{" for _ in range(9)]]), on_bad_record="skip")
    assert len(json.loads(json.dumps(data.report.to_json()))["sources"][0]["bad"]) == 9
    assert data.report.lines(show=2)[-1] == "data: and 7 more bad records"


def test_indices_beyond_the_end(lines: Lines) -> None:
    data = opened(lines(ROWS))
    with pytest.raises(IndexError, match="record 100 of 100"):
        data[100]
    assert isinstance(data.order(0), np.ndarray)
