"""Replies and files that are made to break a world: refused, and nothing raises but sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapwood.envs.hvac import parse_reply, read_epw
from sapwood.envs.prompts import Prompts
from sapwood.errors import DataError
from sapwood.rewards.json_schema import JsonSchema


@pytest.mark.parametrize("reply", ['{{"power": {}}}', "[{}]", '{{"power": [{}]}}'])
def test_a_power_beyond_floats_is_refused(reply: str) -> None:
    parsed = parse_reply(reply.format("9" * 400), 1)  # JSON reads it as a whole number, which no float holds
    assert parsed.how == "failed"
    assert parsed.powers == (0.0,)


LINES = {
    "deep": ('{"prompt": "a", "x": ' + "[" * 300 + "]" * 300 + "}", "line 2: values are nested more than 50 deep"),
    "deeper": ("[" * 100_000, "line 2: not usable JSON"),
    "digits": ('{"prompt": ' + "9" * 5000 + "}", "line 2: not usable JSON"),
    "half": ('{"prompt": "\\ud800"}', "holds half of a surrogate pair"),
    "half in a message": (
        '{"prompt": [{"role": "user", "content": "\\udc00"}]}',
        "message 0: holds half of a surrogate pair",
    ),
    "long": (json.dumps({"prompt": ["x" * 100_000]}), "message 0: must be an object"),
    "long prompt": (json.dumps({"prompt": {"x": "y" * 100_000}}), "a prompt must be"),
    "long role": (json.dumps({"prompt": [{"role": "\x1b" * 9999, "content": "a"}]}), "role is "),
}


@pytest.mark.parametrize("name", LINES)
def test_prompts_that_are_refused_with_their_line(tmp_path: Path, name: str) -> None:
    line, expected = LINES[name]
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        Prompts(path=path).tasks("train", 1, 0)
    told = str(caught.value)
    assert told.startswith(f"{path}, line 2")
    assert expected in told
    assert len(told) < 500
    assert told.isprintable()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "/dev/zero", "/"])
def test_prompts_that_are_no_file(name: str) -> None:
    with pytest.raises(DataError, match=r"check env\.path"):
        Prompts(path=Path(name)).tasks("train", 1, 0)


def test_weather_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "a.epw"
    path.write_text("LOCATION,a\n" + "x\n" * 7 + '1,2,"' + "y" * 200_000 + '"\n')
    with pytest.raises(DataError, match="line 9: "):
        read_epw(path)
    path.write_text("LOCATION,a\n" + "x\n" * 7 + ",".join(["1"] * 6 + ["\x1b" * 9000] + ["1"] * 20) + "\n")
    with pytest.raises(DataError) as caught:
        read_epw(path)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
    for name in ("a\0b", "/dev/zero"):
        with pytest.raises(DataError, match="can't be read"):
            read_epw(name)


def test_a_schema_of_brackets(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="can't be read as a JSON schema"):
        JsonSchema(path=path)
