"""The page of trackers has every one of them, with every option."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sapwood import plugins
from sapwood.trackers import _hub

PAGE = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", plugins.known("tracker"))
def test_every_option_is_on_the_page(name: str) -> None:
    [row] = re.findall(rf"^\| `{name}` \|.*", PAGE, re.M)
    for option in plugins.load("tracker", name).model_fields:
        assert f"`{option}`" in row


def test_the_numbers_on_the_page_are_those_of_the_code() -> None:
    assert f"a queue of {_hub.WAITING:,} records" in PAGE
    assert f"isn't ready after {_hub.START_SECONDS:g} s" in PAGE
    assert "tried again after 1, 5, 30 and 60 s" in PAGE
    assert _hub.PAUSES == (1, 5, 30, 60)
    assert (_hub.LOST_IN_A_ROW, _hub.FINISH_SECONDS, _hub.STOP_SECONDS) == (5, 30, 3)
    assert "five records in a row" in PAGE
    assert "30 s to send what waits, 3 s where it was stopped" in PAGE


def test_the_tracker_on_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(# curve\.py.*?)```", PAGE, re.S)
    (tmp_path / "curve.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    cls = plugins.load("tracker", "curve.py:Curve")
    tracker = cls(every=5)
    for step in (4, 5):
        tracker.scalars(step, {"reward": 0.25})
    assert Path("curve.txt").read_text() == "5 0.25\n"
