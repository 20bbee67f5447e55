import numpy as np
import pytest
from pydantic import ValidationError

from sapwood.errors import DataError
from sapwood.plugins import load
from sapwood.rewards.env import EnvReward
from sapwood.rewards.exact_match import ExactMatch
from sapwood.rewards.format import Format
from sapwood.rewards.length import Length
from sapwood.rewards.numeric import Numeric
from sapwood.types import Group, StopReason, Task, Trajectory, Turn


def group(*replies, answer=None, infos=None, lengths=None, rewards=None):
    """One trajectory with these replies."""
    turns = [
        Turn(
            np.zeros(1, np.int64),
            np.zeros(lengths[i] if lengths else 1, np.int64),
            np.zeros(1, np.float32),
            np.zeros(1, np.float32),
            StopReason.EOS,
            text,
            reward=rewards[i] if rewards else 0.0,
            info=infos[i] if infos else {},
        )
        for i, text in enumerate(replies)
    ]
    task = Task("t", answer=answer)
    return Group(task, [Trajectory(task, turns)])


def score(reward, *groups):
    return [member for parts in reward.score(groups) for member in parts]


def test_names_lead_to_the_classes():
    assert [load("reward", n) for n in ("env", "exact_match", "format", "length")] == [
        EnvReward,
        ExactMatch,
        Format,
        Length,
    ]


def test_env_sums_what_the_turns_paid():
    assert score(EnvReward(), group("a", "b", rewards=[1.5, -0.25]), group()) == [{"env": 1.25}, {"env": 0.0}]


@pytest.mark.parametrize(
    ("options", "reply", "answer", "value"),
    [
        ({}, " Paris\n", "paris", 1),
        ({"ignore_case": False}, "Paris", "paris", 0),
        ({}, "It is Paris", "Paris", 0),
        ({"take": "last_line"}, "I think\nParis \n\n", "Paris", 1),
        ({"take": "number"}, "3 apples and 1,234.0 pears", "1234", 1),
        ({"take": "number"}, "so -.5", -0.5, 1),
        ({"take": "number"}, "none", "1", 0),
        ({"take": "number"}, "1", "one", 0),
        ({"pattern": r"answer: (\w+)"}, "answer: a, no, answer: b", "b", 1),
        ({"pattern": r"answer: (\w+)"}, "b", "b", 0),
        ({"pattern": r"x(y)?"}, "x", "y", 0),
        ({}, "b", ["a", "b"], 1),
    ],
)
def test_exact_match(options, reply, answer, value):
    assert score(ExactMatch(**options), group("first", reply, answer=answer)) == [{"exact_match": float(value)}]


def test_format_by_pattern_or_by_how_the_world_parsed():
    replies = group("[1]", "oh [1]", infos=[{"parsed": "json"}, {"parsed": "regex"}])
    assert score(Format(), replies) == [{"format": 0.5}]
    assert score(Format(accept=("json", "regex")), replies) == [{"format": 1.0}]
    assert score(Format(pattern=r"\[\d\]"), replies) == [{"format": 0.5}]
    assert score(Format(), group("x"), group()) == [{"format": 0.0}, {"format": 0.0}]


def test_length_falls_between_free_and_limit():
    reward = Length(free=4, limit=8)
    # 4 tokens are free; 6 are half way: -0.5; 8 and 20 cost the whole
    values = [score(reward, group("x", lengths=[n]))[0]["length"] for n in (0, 4, 6, 8, 20)]
    assert values == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert score(reward, group("x", "y", lengths=[6, 0])) == [{"length": -0.25}]


def test_bad_options():
    with pytest.raises(ValidationError, match="not a regular expression"):
        ExactMatch(pattern="(")
    with pytest.raises(ValidationError, match="not a regular expression"):
        Format(pattern="(")
    with pytest.raises(ValidationError, match="must be below limit"):
        Length(free=8, limit=8)


@pytest.mark.parametrize("reward", [ExactMatch(), Numeric()])
def test_without_any_answer_there_is_nothing_to_compare_with(reward):
    with pytest.raises(DataError, match=r"compares with the task's answer, and task 't' has none; map the field"):
        reward.score([group("5"), group("6")])
    # One that has an answer is judged, beside others that have none.
    scored = reward.score([group("5"), group("6", answer="6")])
    assert [list(parts[0].values()) for parts in scored] == [[0.0], [1.0]]
