"""Steps, episodes and micro-batches that a plan takes as samples."""

from __future__ import annotations

import numpy as np
import pytest

from sapwood.engines import Request, Sampling
from sapwood.envs import Env, EnvFamily, Observation
from sapwood.envs import Step as Answer
from sapwood.plan.workload import Packer, Played, RandomReplies, Step, common_prefix, copies, nodes, played
from sapwood.rollout import collect
from sapwood.tree import distinct_tokens
from sapwood.types import Message, Row, Task


def row(prompt, reply, group=0, member=0) -> Row:
    ids = np.array([*prompt, *reply], np.int64)
    return Row(ids, np.arange(len(ids)) >= len(prompt), np.zeros(len(reply), np.int32), group=group, member=member)


def replies(agree: float, first: int = 0, count: int = 8, tokens: int = 6) -> list[list[int]]:
    engine = RandomReplies(1000, 100, avoid=(0, 1), agree=agree)
    sampling = Sampling(max_new_tokens=tokens)
    for i in range(count):
        engine.submit(Request(i, np.array([5, 6, 7]), sampling, seed=first + i, episode=str(i)))
    return [completion.token_ids.tolist() for completion in engine.step()]


def test_replies_are_as_long_as_they_may_be_and_the_same_every_time():
    first = replies(0.5)
    assert first == replies(0.5)
    assert {len(reply) for reply in first} == {6}
    assert not {0, 1} & {token for reply in first for token in reply}


def test_a_reply_ends_where_the_context_does():
    engine = RandomReplies(1000, 10)
    engine.submit(Request(0, np.arange(7), Sampling(max_new_tokens=6), seed=0, episode="a"))
    (completion,) = engine.step()
    assert len(completion.token_ids) == 3
    assert engine.step() == []


def test_replies_agree_always_or_never_or_at_first():
    def distinct(agree: float, first: int = 0) -> int:
        return distinct_tokens([np.array(reply) for reply in replies(agree, first)])

    assert distinct(1.0) == 6
    assert distinct(0.0) == 8 * 6
    # With 8 replies: sum over depths d of (1 - (1 - 0.75^d)^8) / 0.75^d = 1.3 + 1.8 + 2.3 + 3.0 + 3.7 + 4.5
    assert np.mean([distinct(0.75, first) for first in range(0, 400, 10)]) == pytest.approx(16.6, abs=1.5)


def test_replies_to_other_prompts_share_nothing():
    engine = RandomReplies(10_000, 100, agree=1.0)
    for i in range(2):
        engine.submit(Request(i, np.array([i]), Sampling(max_new_tokens=4), seed=3 + i, episode=str(i)))
    one, other = engine.step()
    assert one.token_ids.tolist() != other.token_ids.tolist()


def test_common_prefix():
    assert common_prefix([np.array([1, 2, 3]), np.array([1, 2, 4, 5])]) == 2
    assert common_prefix([np.array([1, 2, 3]), np.array([1, 2])]) == 2
    assert common_prefix([np.array([1]), np.array([2])]) == 0


def test_copies_share_the_trunk_and_nothing_else():
    rows = [row([1, 2, 3], [4, 5], 0, 0), row([1, 2, 3], [4, 6], 0, 1), row([1, 2, 9], [4, 5], 1, 0)]
    # 1 2, then 3 4 5 / 6 and 9 4 5: nine nodes
    assert nodes(rows) == 9
    made = copies(rows, 2, 4, 10_000)
    assert [r.group for r in made] == [0, 0, 1, 2, 2, 3]
    assert nodes(made) == 2 + 2 * 7  # the trunk once, all else again
    assert copies(rows, 2, 2, 10_000) is rows


def test_a_packer_deals_as_the_loop_does():
    rows = [row([1, 2, group], [7, 8], group) for group in range(6)]
    packer = Packer(token_budget=8, atomic=False, max_groups=None, updates=2, seed=0)
    step = packer.step(rows, [row([50], [51], 0, 1)], 1)
    assert [sum(map(len, update)) for update in step.updates] == [3, 3]
    # Two shared tokens and three of each row: two rows are 8.
    assert [[nodes(micro) for micro in update] for update in step.updates] == [[8, 5], [8, 5]]
    assert sum(map(len, step.scoring)) == 7
    assert nodes(step.largest) == 8
    assert Step([], []).largest == []


class _Chat:
    """Ten tokens for every prompt; the last one tells prompts apart."""

    end_token_ids = (3,)

    def start(self, messages):
        return np.array([*range(10, 19), 100 + len(messages[0].content)])

    def extend(self, reply, ended, messages):
        return np.array([20, 21])

    def ended(self, reply):
        return False

    def decode(self, ids, skip_special_tokens=True):
        return "0"


class Ask(EnvFamily):
    """One question, longer for every task."""

    def tasks(self, split, count, seed):
        return [Task(f"{split}-{i}", (Message("user", "a" * i),)) for i in range(count)]

    def make(self, task):
        return _Asked(task)


class _Asked(Env):
    def __init__(self, task):
        self.task = task

    def start(self):
        return Observation(self.task.prompt)

    def step(self, reply):
        return Answer(None, 0.0, terminated=True)


def play(family, tasks, members, tokens=5):
    sampling = Sampling(max_new_tokens=tokens)
    engine = RandomReplies(10_000, 1000, avoid=range(1000), agree=0.0)
    return collect(family, family.tasks("train", tasks, 0), members, engine, _Chat(), sampling, 0), sampling  # type: ignore[arg-type]


def test_single_turns_keep_prompts_and_replies():
    groups, sampling = play(Ask(), 2, 4)
    found = played(groups, 4, sampling)
    assert (found.episodes, found.replies, found.reply_tokens, found.distinct) == (16, 16, 80, 80)
    # nine tokens that all share, and one of each of the four prompts
    assert (found.first, found.prompt_tokens, found.below, found.suffix) == (13, 13, 0, 0)
    # four readers share each prompt, so nothing of it is copied into a row's five columns
    assert found.shared(64, 10**6) == 13
    assert (found.tails(64), found.tails(8)) == (16 * 5, 8 * 5)


def test_a_prompt_of_few_readers_is_copied_beside_its_row():
    groups, sampling = play(Ask(), 2, 1)
    found = played(groups, 2, sampling)
    assert found.suffix == 1
    assert (found.shared(64, 10**6), found.tails(64)) == (11, 2 * (1 + 5))


def test_turns_of_a_conversation_grow_and_those_that_restart_do_not():
    from tests.worlds import Guess

    groups, sampling = play(Guess(limit=3), 1, 2)
    found = played(groups, 1, sampling)
    # ten of the prompt; two replies of five with two tokens after each, then the third
    assert (found.first, found.below, found.replies) == (10, 2 * (5 + 2), 6)
    groups, sampling = play(Guess(limit=3, restart=True), 1, 2)
    found = played(groups, 1, sampling)
    assert (found.below, found.replies) == (0, 6)


def test_idle_episodes_give_way_to_the_budget_and_rows_do_not():
    found = Played(episodes=10, replies=20, first=100, below=30, limit=8)
    assert found.shared(max_batch=4, budget=10**6) == 100 + 6 * 30
    assert found.shared(max_batch=4, budget=150) == 150
    assert found.tails(max_batch=4) == 4 * 38


def test_nothing_played_keeps_nothing():
    assert Played().shared(64, 65536) == Played().tails(64) == 0
    assert played([], 4, Sampling()) == Played()


@pytest.mark.parametrize("length", [300, 1000])
def test_columns_ahead_are_bounded(length):
    assert Played(episodes=1, limit=length).tails(64) == 256
