import sys

import pytest
from pydantic import ValidationError
from tests.rewards.test_simple_rewards import group, score

from sapwood.envs.check import GARBAGE
from sapwood.errors import DataError, MissingExtra
from sapwood.rewards import json_schema as module
from sapwood.rewards.json_schema import JsonSchema

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "why": {"type": "object"}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("take", "reply", "valid"),
    [
        ("whole", ' {"n": 1}\n', 1),
        ("whole", '{"n": 1.5}', 0),
        ("whole", '{"n": 1, "m": 2}', 0),
        ("whole", '{"n": NaN}', 0),
        ("whole", 'Sure: {"n": 1}', 0),
        ("whole", "", 0),
        ("last_object", 'Sure: {"n": "x"} no, {"n": 1, "why": {"k": 2}}. {', 1),
        ("last_object", '{"n": 1} and {"n": "x"}', 0),
        ("last_object", "{n} is what {it} is", 0),
        ("fenced", 'First\n```json\n{"n": "x"}\n```\nthen\n```\n{"n": 1}\n```', 1),
        ("fenced", '{"n": 1}', 0),
        ("fenced", "```\n\n```", 0),
    ],
)
def test_where_the_json_is(take, reply, valid):
    assert score(JsonSchema(definition=SCHEMA, take=take), group(reply)) == [{"json_schema": float(valid)}]


def test_share_of_replies():
    assert score(JsonSchema(definition=SCHEMA), group('{"n": 1}', "no"), group()) == [
        {"json_schema": 0.5},
        {"json_schema": 0.0},
    ]


@pytest.mark.parametrize("take", ["whole", "last_object", "fenced"])
def test_no_reply_raises(take):
    reward = JsonSchema(definition=SCHEMA, take=take)
    for reply in (*GARBAGE, "{" * 5000, '{"n":' * 5000):
        assert score(reward, group(reply)) == [{"json_schema": 0.0}]


def test_schema_from_a_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"minimum": 2}}}')
    assert score(JsonSchema(path=path), group("[2, 3]", "[1]")) == [{"json_schema": 0.5}]
    path.write_text("{")
    with pytest.raises(DataError, match=r"schema\.json: can't be read as a JSON schema"):
        JsonSchema(path=path)
    with pytest.raises(DataError, match=r"no.json: can't be read"):
        JsonSchema(path=tmp_path / "no.json")


def test_bad_schemas():
    with pytest.raises(ValidationError, match=r"not a JSON schema: 'nmber' is not valid .* \(at type\)"):
        JsonSchema(definition={"type": "nmber"})
    with pytest.raises(ValidationError, match="give either path"):
        JsonSchema()
    remote = JsonSchema(definition={"$ref": "https://example.org/schema.json"})
    with pytest.raises(DataError, match=r"'https://example.org/schema.json' is not in the schema"):
        remote.score([group("1")])


def test_without_the_package(monkeypatch):
    module._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingExtra, match=r"sapwood\[jsonschema\]"):
        JsonSchema(definition=SCHEMA)
