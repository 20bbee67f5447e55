import numpy as np
import pytest
from tests.rewards.test_simple_rewards import group, score

from sapwood.rewards.diversity import Diversity, distinct_share
from sapwood.rewards.length import Length
from sapwood.types import Group


def siblings(*replies):
    return Group(group("x").task, [group(reply).trajectories[0] for reply in replies])


def values(reward, *groups):
    return [[parts["diversity"] for parts in members] for members in reward.score(groups)]


def test_siblings():
    # Bigrams: A {ab, bc}, B {ab, bd}, C {xy}. J(A, B) = 1/3, J(A, C) = J(B, C) = 0
    # A: 1 - (1/3 + 0)/2 = 5/6, B the same, C: 1
    [[a, b, c]] = values(Diversity(), siblings("a b c", "A B d", "x y"))
    np.testing.assert_allclose([a, b, c], [5 / 6, 5 / 6, 1.0])
    # Copies earn nothing, nor do two that say nothing, nor one alone; groups don't see each other
    assert values(Diversity(), siblings("a b", "a b"), siblings("", ""), siblings("a b")) == [[0, 0], [0, 0], [0]]
    assert values(Diversity(n=1), siblings("a b", "b c")) == [[1 - 1 / 3, 1 - 1 / 3]]


def test_within_a_reply():
    # a b a b: bigrams ab, ba, ab: 2 distinct of 3; unigrams: 2 of 4
    assert values(Diversity(compare="reply"), siblings("a b a b", "a", "")) == [[2 / 3, 0.0, 0.0]]
    assert values(Diversity(compare="reply", n=1), siblings("a b a b")) == [[0.5]]
    assert values(Diversity(compare="reply", n=1, unit="characters"), siblings("aab")) == [[2 / 3]]
    tokens = group("x", lengths=[3])  # three times token 0
    assert values(Diversity(compare="reply", n=1, unit="tokens"), tokens) == [[1 / 3]]


def test_no_ngram_spans_two_replies():
    assert score(Diversity(compare="reply"), group("a b", "a b")) == [{"diversity": 0.5}]
    assert score(Diversity(compare="reply"), group("a", "b")) == [{"diversity": 0.0}]


def test_distinct_share():
    assert distinct_share([[("a",), ("b",)], [("a",)]]) == 2 / 3
    assert distinct_share([]) == 0.0


def test_length_by_rate():
    # -0.01 * len("hello") = -.05
    assert score(Length(rate=0.01, unit="characters"), group("hello")) == [{"length": -0.05}]
    # 2 and 4 words, of which 1 is free: -(1 + 3)/2 * .5
    assert score(Length(rate=0.5, unit="words", free=1), group("a b", "a b c d")) == [{"length": -1.0}]
    assert score(Length(rate=1.0), group("x", lengths=[7])) == [{"length": -7.0}]
    # soft over characters: (6 - 4) / (8 - 4)
    assert score(Length(free=4, limit=8, unit="characters"), group("sixsix")) == [{"length": -0.5}]


def test_length_options_are_all_used():
    assert Length(rate=0.01).model_dump() == {"weight": 1.0, "rate": 0.01, "free": 0, "limit": None, "unit": "tokens"}
    assert Length.model_validate(Length(rate=0.01).model_dump()) == Length(rate=0.01)
    with pytest.raises(ValueError, match="no meaning with rate"):
        Length(rate=0.01, limit=9)
    with pytest.raises(ValueError, match="limit is null"):
        Length(limit=None)
