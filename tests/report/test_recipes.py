"""Recipes as flat lists, and which options are not at their defaults."""

from __future__ import annotations

import pytest

from sapwood import plugins
from sapwood.report.recipes import OPTIONS, algorithm_defaults, flatten, options


def test_flat() -> None:
    recipe = {"a": {"b": 1, "c": {}}, "list": [1, 2], "items": [{"x": None}, "y"], "t": "text", "f": 1e-8, "ok": True}
    assert flatten(recipe) == [
        ["a.b", "1"],
        ["a.c", "{}"],
        ["list", "[1, 2]"],
        ["items.0.x", "null"],
        ["items.1", "y"],
        ["t", "text"],
        ["f", "1e-08"],
        ["ok", "true"],
    ]


def test_what_would_never_end_or_never_fit_is_cut() -> None:
    ring: dict = {"a": 1}
    ring["ring"] = ring
    assert dict(map(tuple, flatten(ring)))["a"] == "1"
    assert flatten({"long": "x" * 10_000})[0][1].endswith("... (10,000 characters)")
    bomb: list = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    assert len(flatten({"bomb": bomb})) == OPTIONS + 1


def test_options_that_differ_from_the_default_carry_it() -> None:
    recipe = {
        "optim": {"learning_rate": 3e-4, "warmup_steps": 0, "betas": [0.9, 0.999]},
        "model": {"lora": {"rank": 8, "alpha": 16.0}},
        "algorithm": {"name": "grpo", "group_size": 4, "clip_high": 0.2, "no_such": 1},
    }
    found = {key: usual for key, _, usual in options(recipe) if usual is not None}
    assert found == {"optim.learning_rate": "0.0001", "model.lora.rank": "16", "algorithm.group_size": "8"}


@pytest.mark.parametrize("name", plugins.known("algorithm"))
def test_defaults_that_are_read_as_text_are_those_of_the_class(name: str) -> None:
    fields = plugins.load("algorithm", name).model_fields
    read = algorithm_defaults(name)
    assert set(read) <= set(fields)
    for key, value in read.items():
        usual = fields[key].get_default(call_default_factory=True)
        assert value == (list(usual) if isinstance(usual, tuple) else usual), key
    plain = [key for key, field in fields.items() if isinstance(field.default, int | float | str)]
    assert len([key for key in plain if key in read]) >= 0.8 * len(plain)


def test_a_foreign_recipe_runs_nothing() -> None:
    for name in ("file.py:Bad", "../x", "os", "__init__", "_policy", "no_such"):
        assert algorithm_defaults(name) == {}
