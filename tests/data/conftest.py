"""A cache of its own for every test, and files written in a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sapwood.data import LearnsFrom, Record
from sapwood.data.dataset import Dataset, open_data
from sapwood.data.section import DataSection

Lines = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAPWOOD_CACHE", str(folder))
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """Write objects (or raw lines) as a JSONL file."""

    def write(items: Iterable[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items), encoding="utf-8")
        return path

    return write


def opened(data: Any, learns_from: LearnsFrom = "demonstrations", seed: int = 0, **options: Any) -> Dataset:
    """All records, in file order."""
    section = DataSection.model_validate({"eval_fraction": 0, **_mapping(data), **options})
    return open_data(section, learns_from, seed)[0]


def records(data: Any, learns_from: LearnsFrom = "demonstrations", **options: Any) -> list[Record]:
    return list(opened(data, learns_from, **options))


def _mapping(data: Any) -> dict[str, Any]:
    return dict(data) if isinstance(data, dict) else {"path": str(data)}
