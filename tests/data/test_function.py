"""A function as a data source."""

from __future__ import annotations

import sys

import pytest

from sapwood import plugins
from sapwood.data.dataset import open_data
from sapwood.data.section import DataSection
from sapwood.errors import ConfigError, DataError, UnknownPlugin

SOURCE = """\
COUNT = 3
TEXT = "x"
def good():
    return [{"prompt": f"p{i}", "response": "r"} for i in range(COUNT)]
def endless():
    while True:
        yield {"prompt": "p", "response": "r"}
def list_inside():
    yield {"prompt": "p", "response": "r"}
    yield ["p", "r"]
def raises():
    yield {"prompt": "p", "response": "r"}
    raise KeyError("gone")
def nothing():
    return None
def other_keys():
    yield {"prompt": "p", "response": "r"}
    yield {"prompt": "p", "response": "r", "seen": {(1, 2): 3}}
def empty():
    return []
def wants(what):
    return []
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)

    def opened(name, path=file, **source):
        made = {"sources": [{"path": f"{path}:{name}", **source}], "eval_fraction": 0}
        return list(open_data(DataSection.model_validate(made), "demonstrations", 0)[0])

    return opened


def test_it_yields_records(read):
    records = read("good")
    assert [record.prompt[0].content for record in records] == ["p0", "p1", "p2"]
    assert records[2].source.endswith("mine.py:good item 3")
    assert len(read("endless", max_samples=4)) == 4


def test_the_cache_follows_the_records_not_the_file(read, tmp_path, monkeypatch):
    read("good")
    module = sys.modules[plugins.load("data", f"{tmp_path / 'mine.py'}:good").__module__]
    monkeypatch.setattr(module, "COUNT", 5)
    assert len(read("good")) == 5


BAD = [
    ("list_inside", {}, DataError, r"mine.py:list_inside item 2: must be a mapping of fields, not a list"),
    ("raises", {}, DataError, r"mine.py:raises' raised KeyError \('gone'\) at .*line 13; fix it there"),
    ("nothing", {}, DataError, "returned null; yield records"),
    ("empty", {}, DataError, "holds no record"),
    ("other_keys", {}, DataError, r"other_keys item 2: can't be written as JSON \(keys must be str.*keys are text"),
    ("wants", {}, DataError, r"wants' raised TypeError \(.*'what'\), called as it was; check its parameters"),
    ("goood", {}, ConfigError, "has no 'goood'; did you mean 'good'"),
    ("TEXT", {}, DataError, "is no function"),
    ("good", {"split": "train"}, DataError, "split, subset and revision are for files"),
]


@pytest.mark.parametrize(("name", "source", "error", "problem"), BAD)
def test_what_is_wrong_is_told(read, name, source, error, problem):
    with pytest.raises(error, match=problem):
        read(name, **source)


def test_a_missing_file_or_module_is_told(read):
    with pytest.raises(UnknownPlugin, match=r"there is no file 'none\.py'"):
        read("good", path="none.py")
    with pytest.raises(UnknownPlugin, match="no module 'no_such_module'"):
        read("good", path="no_such_module")
