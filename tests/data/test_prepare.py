"""`sapwood data prepare`: public sets from a local copy, whole or not at all, going on after a kill."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from sapwood import cli
from sapwood.data.prepare import prepare
from sapwood.errors import DataError, StorageError
from tests.data.conftest import records


def hh(folder: Path, count: int = 30) -> Path:
    """A copy of hh-rlhf: entry 5 has equal answers, entry 6 is no transcript."""
    for name, size in (("helpful-base/train", count), ("helpful-base/test", 4), ("harmless-base/train", 3)):
        path = folder / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            for i in range(size):
                start = f"\n\nHuman: question {i}\n\nAssistant: yes?\n\nHuman: go on\n\nAssistant:"
                entry = {"chosen": f"{start} good {i}", "rejected": f"{start} {'good 5' if i == 5 else 'bad'}"}
                file.write(json.dumps({"chosen": "what", "rejected": "no"} if i == 6 else entry) + "\n")
    return folder


def belle(path: Path, count: int = 20) -> Path:
    """BELLE's way: JSON lines in a file called .json."""
    rows = [{"instruction": f"问题{i}", "input": "数据" if i % 2 else "", "output": f"回答{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_hh_rlhf(tmp_path: Path) -> None:
    made = prepare("hh-rlhf", tmp_path / "data", source=hh(tmp_path / "hh"))
    assert [Path(file.path).name for file in made] == [
        "hh_rlhf_helpful-base_train.json",
        "hh_rlhf_helpful-base_test.json",
        "hh_rlhf_harmless-base_train.json",
    ]
    assert [(file.entries, file.records, file.bad) for file in made] == [(30, 28, 2), (4, 4, 0), (3, 3, 0)]
    assert made[0].problems[0].endswith("train.jsonl.gz line 6: chosen and rejected are equal; a pair must differ")
    first = json.loads(Path(made[0].path).read_text())[0]  # a JSON array, as the ending says
    assert first == {
        "prompt": [
            {"role": "user", "content": "question 0"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "go on"},
        ],
        "chosen": [{"role": "assistant", "content": "good 0"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    assert len(records(made[0].path, "pairs")) == 28


def test_instruction_sets(tmp_path: Path) -> None:
    source = belle(tmp_path / "Belle.train.json")
    (made,) = prepare("belle", tmp_path / "data", source=source, max_samples=5)
    assert Path(made.path).name == "belle_sft_train.json"
    found = json.loads(Path(made.path).read_text(encoding="utf-8"))
    assert found[:2] == [
        {"prompt": "问题0", "response": "回答0"},
        {"prompt": "问题1\n\n数据", "response": "回答1"},
    ]
    assert len(found) == 5
    (made,) = prepare("alpaca-chinese", tmp_path / "data", source=source)
    assert (Path(made.path).name, made.records) == ("alpaca_chinese_sft_train.json", 20)


def test_what_is_complete_is_left_alone_and_nothing_is_overwritten(tmp_path: Path) -> None:
    source = belle(tmp_path / "belle.json")
    (first,) = prepare("belle", tmp_path / "data", source=source)
    before = Path(first.path).stat().st_mtime_ns
    (again,) = prepare("belle", tmp_path / "data", source=source)
    assert (first.already, again.already, again.records) == (False, True, 20)
    assert Path(first.path).stat().st_mtime_ns == before
    with pytest.raises(StorageError, match=r"belle_sft_train.json is there already and was made from other data or"):
        prepare("belle", tmp_path / "data", source=source, max_samples=3)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    source = hh(tmp_path / "hh", 400)
    (whole,) = prepare("hh-rlhf", tmp_path / "whole", source=source, splits=["train"], subsets=["helpful-base"])
    code = f"""
import os, signal
from pathlib import Path
from sapwood.data import prepare as module
module._EVERY = 50
noted = module._write_json
def kill(path, data):
    noted(path, data)
    if data.get("entries") == 200: os.kill(os.getpid(), signal.SIGKILL)
module._write_json = kill
module.prepare("hh-rlhf", Path({str(tmp_path / "cut")!r}), source=Path({str(source)!r}), splits=["train"],
               subsets=["helpful-base"])
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == -9
    cut = tmp_path / "cut"
    assert not list(cut.glob("*.json"))  # no file until it is whole
    with (cut / ".hh_rlhf_helpful-base_train.json.part").open("ab") as part:
        part.write(b',\n{"half')  # what a kill in the middle of a write leaves
    (made,) = prepare("hh-rlhf", cut, source=source, splits=["train"], subsets=["helpful-base"])
    assert (made.entries, made.records, made.bad) == (400, 398, 2)
    assert Path(made.path).read_bytes() == Path(whole.path).read_bytes()
    assert sorted(path.name for path in cut.iterdir()) == [".prepared.json", "hh_rlhf_helpful-base_train.json"]


def test_a_part_of_other_data_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapwood.data.prepare._EVERY", 4)
    calls = iter(range(10))

    def stop(what: str, done: int, total: int) -> None:
        if done == total and next(calls) == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("belle", tmp_path / "data", source=belle(tmp_path / "a.json"), progress=stop)
    assert (tmp_path / "data" / ".belle_sft_train.json.state").is_file()
    (made,) = prepare("belle", tmp_path / "data", source=belle(tmp_path / "b.json", 7), progress=stop)
    assert len(json.loads(Path(made.path).read_text())) == made.records == 7


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(path: str, /, **options: Any) -> Any:
        asked.append((path, options))
        if options.get("name") is not None:
            raise ValueError(f"BuilderConfig {options['name']!r} not found")
        pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
        return datasets.Dataset.from_list([pair])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (made,) = prepare("hh-rlhf", tmp_path, splits=["test"], subsets=["helpful-online"])
    assert made.records == 1
    assert asked[-1] == ("Anthropic/hh-rlhf", {"data_dir": "helpful-online", "split": "test", "revision": None})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "hh"}, "'hh' is no set that can be prepared; known are hh-rlhf, belle, alpaca-chinese"),
        ({"name": "belle", "splits": ["test"]}, "--split test: belle has train"),
        ({"name": "hh-rlhf", "subsets": ["helpfull"]}, "--subset helpfull: hh-rlhf has helpful-base"),
        ({"name": "belle", "source": Path("/nowhere")}, "--input /nowhere: no such file or folder"),
        ({"name": "hh-rlhf", "source": Path("/usr")}, "holds no folder helpful-base or"),
    ],
)
def test_what_is_not_there(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        prepare(output=tmp_path, **arguments)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--input", str(hh(tmp_path / "hh")), "--output", str(tmp_path / "data"), "--split", "train"]
    assert cli.main(["data", "prepare", "hh-rlhf", *options]) == 0
    out = capsys.readouterr().out
    assert "hh_rlhf_helpful-base_train.json: 28 records, 2 bad left out; the first: " in out
    assert cli.main(["data", "prepare", "all", *options]) == 1
    assert "--input is a copy of one set" in capsys.readouterr().err
    assert cli.main(["data", "prepare", "nothing"]) == 2
