import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from sapwood.errors import ConfigError, DataError
from sapwood.metrics.distinct import Distinct
from sapwood.metrics.pass_at_k import PassAtK, pass_at_k
from sapwood.metrics.response_length import ResponseLength
from sapwood.metrics.reward_parts import RewardParts
from sapwood.metrics.win_rate import WinRate, wilson
from sapwood.plugins import known, load
from sapwood.types import Group, Message, StopReason, Task, Trajectory, Turn


def episode(task, text="x", reward=0.0, tokens=1, stop=StopReason.EOS, error=None, **parts):
    none = np.zeros(0, np.float32)
    turn = Turn(np.zeros(1, np.int64), np.zeros(tokens, np.int64), none, none, stop, text)
    return Trajectory(task, [turn], error=error, reward_parts=parts, reward=reward)


def group(name, *episodes):
    """episodes: keywords of `episode`."""
    task = Task(name, (Message("user", f"question {name}"),))
    return Group(task, [episode(task, **options) for options in episodes])


def test_all_are_plugins():
    assert known("metric") == ["distinct", "pass_at_k", "response_length", "reward_parts", "win_rate"]
    assert [load("metric", name) for name in known("metric")] == [
        Distinct,
        PassAtK,
        ResponseLength,
        RewardParts,
        WinRate,
    ]


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - C(2,2)/C(4,2) = 1 - 1/6
        (10, 3, 4, 5 / 6),  # 1 - C(7,4)/C(10,4) = 1 - 35/210
        (4, 3, 2, 1.0),  # two of four can't both be the one that is wrong
        (4, 0, 4, 0.0),
        (4, 4, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-12)


def test_pass_at_k_is_unbiased():
    # What it estimates, by enumeration: the share of all pairs out of 5 attempts, 2 right, that hold a right one
    right = [True, True, False, False, False]
    pairs = [a or b for a, b in itertools.combinations(right, 2)]
    assert pass_at_k(5, 2, 2) == pytest.approx(sum(pairs) / len(pairs))
    # ... and not 1 - (1 - c/n)^k = .64
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n, c, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="not defined"):
            pass_at_k(n, c, k)


def test_pass_at_k_over_tasks():
    metric = PassAtK(k=(1, 2), n=4)
    assert metric.attempts == 4
    a = group("a", {"reward": 1.0}, {"reward": 0.99}, {}, {})
    b = group("b", {"reward": 1.0}, {"reward": 1.5}, {}, {"reward": 1.0, "error": "crashed"})
    c = group("c", {"reward": 1.0}, {"error": "crashed"})
    # pass@1: (1/4 + 2/3 + 1)/3; pass@2 leaves c out: (1/2 + 1)/2
    assert metric.compute([a, b, c]) == pytest.approx({"pass@1": (1 / 4 + 2 / 3 + 1) / 3, "pass@2": 0.75})
    assert PassAtK(k=(2,)).compute([group("c", {"reward": 1.0})]) == {}
    assert PassAtK(threshold=0.9).compute([group("a", {"reward": 0.95})]) == {"pass@1": 1.0}
    by_part = PassAtK(part="numeric", threshold=0.5)
    assert by_part.compute([group("a", {"reward": 0.0, "numeric": 1.0})]) == {"pass@1": 1.0}
    with pytest.raises(DataError, match="no reward gives a part 'numeric'; the parts are: format"):
        by_part.compute([group("a", {"format": 1.0})])


def test_pass_at_k_options():
    assert (PassAtK(k=8).k, PassAtK(k=8).n, PassAtK(k=[1, 4], n=16).n) == ((8,), 8, 16)  # type: ignore[arg-type]
    assert PassAtK.model_validate(PassAtK(k=8).model_dump()) == PassAtK(k=8)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="raise n"):
        PassAtK(k=(4,), n=2)
    with pytest.raises(ValidationError, match="k must be at least 1"):
        PassAtK(k=(0,))


def test_response_length():
    groups = [
        group("a", {"text": "one two", "tokens": 4}, {"text": "x", "tokens": 8, "stop": StopReason.LENGTH}),
        group("b", {"text": "yes", "tokens": 3}, {"text": "lost", "tokens": 99, "error": "crashed"}),
    ]
    # (4 + 8 + 3)/3 = 5, one of three cut
    assert ResponseLength().compute(groups) == {
        "response_length": 5.0,
        "response_length/max": 8.0,
        "response_length/cut": pytest.approx(1 / 3),
    }
    characters = ResponseLength(unit="characters").compute(groups)
    assert characters["response_length_characters"] == pytest.approx((7 + 1 + 3) / 3)
    assert ResponseLength(unit="words").compute(groups)["response_length_words/max"] == 2.0
    assert ResponseLength().compute([]) == {}


def test_distinct():
    groups = [group("a", {"text": "a b"}, {"text": "a b"}), group("b", {"text": "b c"})]
    # Unigrams: a b a b b c: 3 of 6; bigrams ab ab bc: 2 of 3
    assert Distinct().compute(groups) == {"distinct_1": 0.5, "distinct_2": pytest.approx(2 / 3)}
    # By task: (1/2 + 1)/2
    by_task = Distinct(over="task", order=(2,), n=2)
    assert (by_task.compute(groups), by_task.attempts) == ({"distinct_2/task": 0.75}, 2)
    assert Distinct().compute([]) == {}
    with pytest.raises(ValidationError, match="order must be at least 1"):
        Distinct(order=(0,))


def test_reward_parts():
    groups = [
        group("a", {"reward": 1.0, "numeric": 1.0}, {"reward": 3.0, "numeric": 0.0}),
        group("b", {"reward": 2.0, "numeric": 0.0}, {"reward": 2.0, "numeric": 0.0}),
    ]
    # rewards 1 3 2 2: deviations -1 1 0 0, so sqrt(2/4); best (3 + 2)/2; numeric 1 0 0 0: sqrt(3)/4, best (1 + 0)/2
    found = RewardParts(n=2).compute(groups)
    assert found == pytest.approx(
        {"reward/std": 0.5**0.5, "reward/best": 2.5, "reward/numeric/std": 3**0.5 / 4, "reward/numeric/best": 0.5}
    )
    assert set(RewardParts(parts=()).compute(groups)) == {"reward/std", "reward/best"}
    with pytest.raises(DataError, match="no reward gives a part 'length'"):
        RewardParts(parts=("length",)).compute(groups)
    assert RewardParts().compute([]) == {}


SOURCE = """
def refusals(replies, *, word: str = "sorry"):
    return sum(word in reply for reply in replies) / len(replies)

def gain(rewards, parts, groups):
    return {"mean": sum(rewards) / len(rewards), "tasks": len(set(groups)), "a": parts[0]["a"]}

def breaks(replies):
    return replies[99]

def says(replies):
    return "many"

def unmeasured(replies):
    return {"x": float("nan")}
"""


@pytest.fixture
def function(tmp_path):
    path = tmp_path / "metrics.py"
    path.write_text(SOURCE)
    return lambda name, **options: load("metric", f"{path}:{name}")(**options)


def test_a_function_is_a_metric(function):
    groups = [group("a", {"text": "sorry", "reward": 2.0, "a": 7.0}, {"text": "lost", "error": "crashed"}),
              group("b", {"text": "no"})]  # fmt: skip
    assert function("refusals").compute(groups) == {"refusals": 0.5}
    assert function("refusals", word="no").compute(groups[1:]) == {"refusals": 1.0}
    assert function("gain").compute(groups) == {"gain/mean": 1.0, "gain/tasks": 2.0, "gain/a": 7.0}
    assert function("refusals", n=3).attempts == 3
    for name, sentence in (
        ("breaks", r"metric 'breaks' \(.*line 8\) raised IndexError .* at .*metrics.py line 9; fix it there"),
        ("says", "returned 'many' for 'says'; return a finite number"),
        ("unmeasured", "returned nan for 'unmeasured/x'"),
    ):
        with pytest.raises(DataError, match=sentence):
            function(name).compute(groups)
    with pytest.raises(ConfigError, match="no 'refusal'; did you mean 'refusals'"):
        function("refusal")


JUDGE = """
def shorter(trajectories):
    return [-float(t.turns[-1].token_ids.size) for t in trajectories]
"""


@pytest.fixture
def win_rate(tmp_path):
    """The reply of fewer tokens wins; the tokenizer gives a token a character."""
    (tmp_path / "judge.py").write_text(JUDGE)

    def tokenizer(text, **options):
        return {"input_ids": [ord(character) for character in text]}

    def made(*records, **options):
        path = tmp_path / "theirs.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        metric = WinRate(against=path, judge={"name": f"{tmp_path}/judge.py:shorter"}, **options)
        metric.bind(SimpleNamespace(policy=SimpleNamespace(tokenizer=tokenizer)))
        return metric

    return made


def test_win_rate_against_rollouts_and_generated_replies(win_rate):
    groups = [
        group("a", {"tokens": 2}),
        group("b", {"tokens": 3}, {"tokens": 2}),
        group("c", {"tokens": 4, "stop": StopReason.LENGTH}),
        group("d", {"tokens": 1}),
    ]
    metric = win_rate(
        {"task": "a", "turns": [{"reply": "12"}]},
        {"task": "b", "turns": [{"reply": "no"}]},
        {"task": "e", "turns": []},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "question c"}], "reply": "12"},
    )
    # Theirs have two letters and the end token, 3 in all: a wins; b ties once and wins once: 3/4; c loses.
    # (1 + .75 + 0)/3 = .58333; ties (0 + .5 + 0)/3
    found = metric.compute(groups)
    assert found["win_rate"] == pytest.approx(1.75 / 3)
    assert (found["win_rate/ties"], found["win_rate/tasks"]) == (pytest.approx(1 / 6), 3.0)
    # c alone never ended by itself, so theirs has no end token either: 4 against 2; within a tie of 2
    alone = {"prompt": "question c", "reply": "12"}
    assert win_rate(alone, tie=1.9).compute(groups[2:3])["win_rate"] == 0.0
    assert win_rate(alone, tie=2.0).compute(groups[2:3])["win_rate"] == 0.5


def test_wilsons_interval():
    # p = .5, n = 4: centre .5, half width z sqrt(1/16 + z^2/64) / (1 + z^2/4) with z^2 = 3.8415:
    # 1.96 * sqrt(.0625 + .060023) / 1.960365 = .349964
    assert wilson(0.5, 4) == pytest.approx((0.150036, 0.849964), abs=1e-5)
    # 4 of 4: from 1/(1 + z^2/4) = .510109 to 1
    assert wilson(1.0, 4) == pytest.approx((0.510109, 1.0), abs=1e-5)
    assert wilson(0.0, 4)[0] == 0.0


def test_win_rate_says_what_is_missing(win_rate, tmp_path):
    with pytest.raises(DataError, match=r"theirs.jsonl: none of its replies is to one of the held-out tasks"):
        win_rate({"prompt": "other", "reply": "x"}).compute([group("a", {"text": "1"})])
    with pytest.raises(DataError, match=r"theirs.jsonl line 2: not a reply .*no field 'reply'"):
        win_rate({"prompt": "p", "reply": "x"}, {"prompt": "p"})
    with pytest.raises(DataError, match=r"no.jsonl: can't be read"):
        WinRate(against=tmp_path / "no.jsonl", reward_model="rm").bind(None)
    with pytest.raises(ConfigError, match="has to be bound"):
        WinRate(against=tmp_path / "theirs.jsonl", reward_model="rm").compute([])
    with pytest.raises(ValidationError, match="give either reward_model"):
        WinRate(against=tmp_path / "theirs.jsonl")
    twice = group("a", {"text": "1"})
    twice.trajectories[0].turns *= 2
    with pytest.raises(DataError, match="single replies, but task 'a' has turns"):
        win_rate({"prompt": "question a", "reply": "x"}).compute([twice])
