"""Records as groups: the tokens of a rollout that said the same, and nothing cut without being counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapwood.chat import Chat
from sapwood.data import Record
from sapwood.data.groups import Grouper
from sapwood.data.prompts import DataPrompts
from sapwood.data.section import DataSection
from sapwood.engines import Sampling
from sapwood.engines.scripted import ScriptedEngine
from sapwood.envs import Env, EnvFamily, Observation, Step
from sapwood.errors import ConfigError, DataError
from sapwood.rollout import collect, to_rows
from sapwood.types import Group, Message, StopReason, Task
from tests.chats import CHATML, LLAMA, QWEN, STRICT, tokenizer
from tests.data.conftest import Lines, opened

TALK = ("the lamp is", " on the table\n", "I guess 7")  # what the model says, turn by turn
ANSWERS = ("too low", "and?")  # what it is answered
OPENING = (Message("system", "you are in a room"), Message("user", "look"))


def conversation() -> Record:
    reply = [Message("assistant", TALK[0])]
    for answer, said in zip(ANSWERS, TALK[1:], strict=True):
        reply += [Message("user", answer), Message("assistant", said)]
    return Record(OPENING, (tuple(reply),), source="talk.jsonl line 1")


def grouper(template: str = CHATML, **options: Any) -> Grouper:
    return Grouper(Chat(tokenizer(template)), DataSection.model_validate({"path": "x", **options}))


def group(record: Record, made: Grouper | None = None) -> Group:
    found = (made or grouper()).group(record, 3)
    assert found is not None
    return found


class Talk(EnvFamily):
    """Answers what the conversation's user said next."""

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        return [Task("talk")]

    def make(self, task: Task) -> Env:
        return _Talk()


class _Talk(Env):
    said = 0

    def start(self) -> Observation:
        return Observation(OPENING)

    def step(self, reply: str) -> Step:
        self.said += 1
        if self.said > len(ANSWERS):
            return Step(None, 0.0, terminated=True)
        return Step(Observation((Message("user", ANSWERS[self.said - 1]),)), 0.0)


@pytest.mark.parametrize("template", [CHATML, LLAMA, QWEN])
def test_a_record_has_the_tokens_of_a_rollout_that_said_the_same(template: str) -> None:
    made = tokenizer(template, "<|eot_id|>" if template == LLAMA else "<|im_end|>")
    chat = Chat(made)
    engine = ScriptedEngine(made, TALK)
    rollout = collect(Talk(), [Task("talk")], 1, engine, chat, Sampling(max_new_tokens=64), seed=0)
    from_data = Grouper(chat, DataSection.model_validate("x")).group(conversation(), 0)
    assert from_data is not None
    (ours,), (theirs,) = to_rows([from_data], 1.0), to_rows(rollout, 1.0)
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert ours.loss_mask.tolist() == theirs.loss_mask.tolist()
    assert ours.turn.tolist() == theirs.turn.tolist()
    assert ours.sampled_logprobs is None
    assert theirs.sampled_logprobs is not None


def test_a_group_says_where_it_comes_from() -> None:
    record = Record((Message("user", "q"),), ((Message("assistant", "a"),), (Message("assistant", "b"),)), (2.0, 0.5),
                    metadata={"n": 1}, source="f line 9")  # fmt: skip
    found = group(record)
    assert found.task.metadata == {"n": 1, "index": 3, "source": "f line 9"}
    assert [t.reward for t in found.trajectories] == [2.0, 0.5]
    assert all(t.terminated and not t.truncated for t in found.trajectories)
    chosen, rejected = (t.turns[0] for t in found.trajectories)
    assert np.array_equal(chosen.prompt_ids, rejected.prompt_ids)
    assert (chosen.text, chosen.sampled_logprobs.size, chosen.kept_logmass.size) == ("a", 0, 0)
    assert group(Record((Message("user", "q"),))).trajectories == []  # a prompt alone is a task


def test_only_the_last_turn_is_learnt_on_request() -> None:
    whole = to_rows([group(conversation())], 1.0)[0]
    last = to_rows([group(conversation(), grouper(train_on="last"))], 1.0)[0]
    assert last.token_ids.tolist() == whole.token_ids.tolist()  # the same conversation
    said = Chat(tokenizer()).reply(TALK[-1])
    assert last.token_ids[last.loss_mask].tolist() == said.tolist()
    assert whole.scored == sum(Chat(tokenizer()).reply(text).size for text in TALK)


def record_of(prompt: int = 1, reply: int = 1, turns: int = 0) -> Record:
    """A record whose messages are runs of one-token letters."""
    history = tuple(m for _ in range(turns) for m in (Message("user", "z" * 20), Message("assistant", "y" * 20)))
    opening = (Message("system", "s"), *history, Message("user", "q" * prompt))
    return Record(opening, ((Message("assistant", "a" * reply),),), source="f.jsonl line 7")


def sizes(found: Group | None) -> tuple[int, int]:
    assert found is not None
    turn = found.trajectories[0].turns[0]
    return turn.prompt_ids.size, turn.token_ids.size


def test_length_policies() -> None:
    prompt, reply = sizes(group(record_of(30, 10)))
    assert reply == 11  # ten letters and the end of the turn
    for policy, count in (("drop", "dropped for a long prompt"), ("drop_turns", "dropped for a long prompt")):
        made = grouper(max_prompt_length=prompt - 1, long_prompt=policy)
        assert made.group(record_of(30, 10), 0) is None
        assert made.counts == {count: 1}
    made = grouper(max_prompt_length=prompt - 4, long_prompt="cut_start")
    found = group(record_of(30, 10), made)
    assert sizes(found) == (prompt - 4, 11)
    whole = group(record_of(30, 10)).trajectories[0].turns[0].prompt_ids
    assert found.trajectories[0].turns[0].prompt_ids.tolist() == whole[4:].tolist()  # the end, with its header, stays
    assert made.counts == {"prompts cut": 1}

    assert grouper(max_length=prompt + reply).group(record_of(30, 10), 0) is not None
    made = grouper(max_length=prompt + reply - 1)
    assert made.group(record_of(30, 10), 0) is None
    assert made.counts == {"dropped for a long reply": 1}
    made = grouper(max_length=prompt + 5, long_reply="cut_end")
    found = group(record_of(30, 10), made)
    assert sizes(found) == (prompt, 5)
    turn = found.trajectories[0].turns[0]
    assert (turn.text, turn.stop_reason, found.trajectories[0].truncated) == ("aaaaa", StopReason.LENGTH, True)
    assert made.counts == {"replies cut": 1}


def test_oldest_turns_go_first_and_the_system_message_stays() -> None:
    short, _ = sizes(group(record_of(3, turns=1)))
    made = grouper(max_prompt_length=short, long_prompt="drop_turns")
    found = group(record_of(3, turns=4), made)
    assert found.task.prompt == record_of(3, turns=1).prompt
    assert sizes(found)[0] == short
    assert made.counts == {"prompts cut": 1}


@pytest.mark.parametrize(("option", "limit"), [("long_prompt", {"max_prompt_length": 20}), ("long_reply", {})])
def test_lengths_can_be_errors(option: str, limit: dict[str, int]) -> None:
    prompt, reply = sizes(group(record_of(30, 10)))
    made = grouper(**{option: "error", "on_bad_record": "skip", **(limit or {"max_length": prompt + reply - 1})})
    with pytest.raises(DataError, match=r"f.jsonl line 7: .* tokens, and at most \d+ are allowed; raise data.max_"):
        made.group(record_of(30, 10), 0)


def test_pairs_that_cutting_made_equal_are_dropped() -> None:
    reply = ((Message("assistant", "aaaa good"),), (Message("assistant", "aaaa bad"),))
    record = Record((Message("user", "q"),), reply, (0.0, 0.0))
    prompt = group(record).trajectories[0].turns[0].prompt_ids.size
    made = grouper(max_length=prompt + 3, long_reply="cut_end")
    assert made.group(record, 0) is None
    assert made.counts["equal after cutting"] == 1


def test_a_template_that_fails_names_the_record() -> None:
    record = Record(OPENING, ((Message("assistant", "a"),),), source="chat.json line 12")
    with pytest.raises(DataError, match=r"^chat.json line 12: the chat template refuses .*must alternate"):
        grouper(STRICT).group(record, 0)
    made = grouper(STRICT, on_bad_record="skip")
    assert made.group(record, 0) is None
    assert made.counts == {"refused by the template": 1}
    assert made.refused[0].startswith("chat.json line 12: the chat template refuses")


def test_prompts_of_data_are_a_world(lines: Lines) -> None:
    train = opened(lines([{"question": f"q{i}", "answer": i, "level": i % 2} for i in range(6)]), "rollouts")
    held = opened(lines([{"question": "held", "answer": "x"}], "held.jsonl"), "rollouts")
    family = DataPrompts(train=train, held_out=held)
    tasks = family.tasks("train", 15, 7)
    assert [t.id for t in tasks] == [t.id for t in family.tasks("train", 15, 7)]
    for lap in range(2):  # every prompt once before any comes again
        assert {t.metadata["index"] for t in tasks[6 * lap : 6 * lap + 6]} == set(range(6))
    assert len({t.id for t in tasks}) == 15
    assert [t.id for t in family.walk(4, 5, 7)] == [t.id for t in tasks[4:9]]
    first = tasks[0]
    assert first.prompt == (Message("user", f"q{first.metadata['index']}"),)
    assert (first.answer, first.metadata["level"]) == (first.metadata["index"], first.metadata["index"] % 2)
    assert family.tasks("eval", 1, 0)[0].prompt == (Message("user", "held"),)
    with pytest.raises(ConfigError, match=r"data holds out 1 prompts, but 2 are asked for: lower eval.tasks"):
        family.tasks("eval", 2, 0)
    assert family.describe().startswith("prompts from ")
    step = family.make(first).step("whatever")
    assert (step.observation, step.terminated, step.reward) == (None, True, 0.0)
