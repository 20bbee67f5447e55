"""Where things are."""

from __future__ import annotations

from pathlib import Path

from sapwood.paths import expanded


def test_the_home_of_nobody_stays_as_it_is(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/models") == Path("/home/me/models")
    assert expanded("~nobody-at-all/models") == Path("~nobody-at-all/models")
