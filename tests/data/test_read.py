"""Files of every format give the same records, and a damaged one gives a sentence with file, line and fix."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sapwood.data import read
from sapwood.data.read import FileInput, resolve
from sapwood.data.section import SourceSection
from sapwood.errors import DataError
from tests.data.conftest import Lines, opened, records

ROWS = [{"prompt": f"question {i}", "response": f'answer, {i}\nand "more" {chr(0x4E00 + i)}'} for i in range(7)]
TEXTS = [(row["prompt"], row["response"]) for row in ROWS]


def write(folder: Path, name: str) -> Path:
    path = folder / name
    kind, zipped = name.split(".")[1], name.endswith(".gz")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if zipped else path.open("w", encoding="utf-8", newline="") as file:
        if kind in ("csv", "tsv"):
            writer = csv.DictWriter(file, ["prompt", "response"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
        elif kind == "json":
            json.dump(ROWS, file, ensure_ascii=False, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return path


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.ndjson", "a.csv", "a.tsv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz"]
)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    found = records(path)
    assert [(r.prompt[0].content, r.replies[0][0].content) for r in found] == TEXTS
    # A record of a pretty-printed array begins on its brace: "[" is line 1, each takes 4 lines. A row of the CSV
    # has a line break in its second column, so it takes 2 lines after the header.
    places = {"json": "line 6", "jsonl": "line 2", "ndjson": "line 2", "csv": "line 4", "tsv": "line 4"}
    assert found[1].source == f"{path} {places.get(name.split('.')[1], 'row 2')}"


def test_json_comes_in_many_dresses(tmp_path: Path) -> None:
    dresses = {
        "lines.json": "\n".join(json.dumps(row) for row in ROWS),  # BELLE calls JSON lines .json
        "array.jsonl": json.dumps(ROWS),
        "pretty.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
        "bom.json": "\ufeff" + json.dumps(ROWS),
        "bom.jsonl": "\ufeff" + "\n".join(json.dumps(row) for row in ROWS),
        "crlf.jsonl": "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n",
    }
    for name, text in dresses.items():
        (tmp_path / name).write_bytes(text.encode())
        assert [r.prompt[0].content for r in records(tmp_path / name)] == [prompt for prompt, _ in TEXTS], name


def test_an_array_is_read_in_small_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Windows of 5 bytes cut characters, escapes, numbers and words everywhere.
    values = [{"n": 1234567, "t": True, "x": None, "u": "€\\\u1234", "f": -1.5e10}, {"n": [1, {"a": "]"}]}, {}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False))
    monkeypatch.setattr(read, "_CHUNK", 5)
    assert [fields for _, fields, _ in FileInput(path).read()] == values


def test_folders_globs_and_splits(tmp_path: Path) -> None:
    for name in ("helpful/train.jsonl", "helpful/test.jsonl", "harmless/train-00001.jsonl", ".git/x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ROWS[0]))

    def names(**options: Any) -> list[str]:
        found = resolve(SourceSection(**{"path": str(tmp_path), **options}))
        return [str(Path(item.name).relative_to(tmp_path)) for item in found]

    assert names(split="train") == ["harmless/train-00001.jsonl", "helpful/train.jsonl"]
    assert names(split="test", subset="helpful") == ["helpful/test.jsonl"]
    assert names(path=f"{tmp_path}/*/train*.jsonl") == ["harmless/train-00001.jsonl", "helpful/train.jsonl"]
    with pytest.raises(DataError, match=r"several splits .test, train., and learning from all .* set split"):
        names()
    with pytest.raises(DataError, match=r"no subfolder 'helpfull'; there are .git, harmless, helpful"):
        names(subset="helpfull")
    with pytest.raises(DataError, match=r"no file is named after the split 'dev'"):
        names(split="dev")
    with pytest.raises(DataError, match=r"split chooses among the files of a folder"):
        names(path=str(tmp_path / "helpful/test.jsonl"), split="test")


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}")
    for path, sentence in {
        f"{tmp_path}/pair.jsonl": r"pair.jsonl: no such file or folder; did you mean '.*pairs.jsonl'\?",
        f"{tmp_path}/nowhere/x.jsonl": "there is no folder",
        f"{tmp_path}/*.csv": "no file matches",
    }.items():
        with pytest.raises(DataError, match=sentence):
            resolve(SourceSection(path=path))
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"the ending tells no format .* rename it or set format"):
        resolve(SourceSection(path=str(tmp_path / "data.xlsx")))


def test_a_hub_set_by_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = records({"path": str(folder), "format": "hub", "split": "test"})
    assert [r.prompt[0].content for r in found] == [prompt for prompt, _ in TEXTS]
    assert found[2].source == f"{folder} (test) row 3"
    with pytest.raises(DataError, match=r"can't be opened as a hub set .*check the id, subset, split and network"):
        records({"path": str(folder), "format": "hub", "split": "dev"})


def test_a_hub_id_that_can_not_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as caught:
        records("nobody/nothing")
    assert str(caught.value) == (
        "nobody/nothing: can't be opened as a hub set (Couldn't reach 'nobody/nothing' on the Hub); check the id, "
        "subset, split and network, or give a local file."
    )


GOOD = json.dumps(ROWS[0]).encode()
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "blank.jsonl": (b"\n \n", "the file is empty"),
    "broken.jsonl": (GOOD + b'\n{"prompt": "x", \n', "line 2: not JSON .* column"),
    "array.jsonl": (GOOD + b"\n[1, 2]\n", "line 2: must be a JSON object with named fields, not a list"),
    "number.json": (b"[3]", "line 1: must be a JSON object with named fields, not a number"),
    "latin.jsonl": (GOOD + '\n{"prompt": "caf\xe9"}'.encode("latin-1"), r"line 2: byte 16 \(0xe9\) is not UTF-8; save"),
    "latin.json": ('[{"a": 1},\n{"prompt": "caf\xe9"}]'.encode("latin-1"), "line 2: 0xe9 is not UTF-8; save"),
    "latin.csv": ("prompt,response\na,b\ncaf\xe9,d\n".encode("latin-1"), r"line 3: byte 4 \(0xe9\) is not UTF-8"),
    "wide.csv": ("prompt,response\na,b\n".encode("utf-16"), "not UTF-8 text .UTF-16"),
    "cut.json": (json.dumps(ROWS, indent=1).encode()[:-30], "cut short"),
    "open.json": (b'[{"prompt": "a", "response": "b"}', "line 1: the array has no end"),
    "comma.json": (b"[" + GOOD + b"\n" + GOOD + b"]", "line 2: not JSON .a comma is missing"),
    "after.json": (b"[" + GOOD + b"] x", "text after the end of the array"),
    "wrong.json": (b"[" + GOOD + b',\n{"prompt": oops, "b": "' + b"x" * 99 + b'"}]', "line 2: not JSON .Expecting"),
    "ragged.csv": (b"prompt,response\na,b\nc,d,e\n", "line 3: 3 columns where the header has 2; quote"),
    "twice.csv": (b"prompt,prompt\na,b\n", "the column 'prompt' is there twice"),
    "quote.csv": (b'prompt,response\na,b\n"c,d\n', "line 3: the row that begins here can't be read as CSV"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 999)[:-40], "cut.jsonl.gz: the gzip archive is damaged or cut short"),
    "short.parquet": (b"PAR1" + b"x" * 40, "short.parquet: not a readable Parquet file, or one that is cut short"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid x", "a pointer of Git LFS, not the data; run `git"),
    "half.jsonl": (b'{"prompt": "\\ud83d", "response": "b"}', "line 1: holds half of a surrogate pair"),
    "digits.jsonl": (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1: not usable JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_sentence(tmp_path: Path, name: str) -> None:
    content, sentence = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        records(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut short .*copy it again"):
        records(path)


def test_a_parquet_row_whose_text_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "latin.parquet"
    unchecked = pc.cast(pa.array([b"one", "Gr\u00fc\u00dfe".encode("latin-1"), b"three"]), pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": unchecked, "response": ["a", "b", "c"]}), path)
    with pytest.raises(DataError, match=r"latin\.parquet row 2: byte 3 \(0xfc\) is not UTF-8; save the file as UTF-8"):
        records(path)
    data = opened(path, on_bad_record="skip")
    assert [data[i].prompt[0].content for i in sorted(data.order(0))] == ["one", "three"]


def test_bad_lines_are_counted_and_listed_on_request(lines: Lines) -> None:
    path = lines([ROWS[0], "{oops", ROWS[1], {"prompt": "", "response": "x"}, ROWS[2]])
    data = opened(path, on_bad_record="skip")
    assert len(data) == 3
    assert (data.report.read, data.report.bad) == (5, 2)
    first, second = data.report.bad_records()
    assert first.startswith(f"{path} line 2: not JSON")
    assert second == f"{path} line 4: field 'prompt' is empty; fill it in or remove the record"
    assert any(line.endswith("2 bad, skipped") for line in data.report.lines())
    # The cache that skipping made is no way around strictness.
    with pytest.raises(DataError, match=r"line 2: not JSON.*on_bad_record=skip leaves them out"):
        opened(path)


def test_nothing_good_is_an_error_even_when_skipping(lines: Lines) -> None:
    with pytest.raises(DataError, match=r"of 2 records none is good; the first: .* line 1: no prompt"):
        opened(lines([{"text": "a"}, {"text": "b"}]), on_bad_record="skip")
