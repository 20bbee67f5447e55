"""Every shape that people bring becomes the same kind of record; what is wrong with one is said exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sapwood.data import LearnsFrom, Record
from sapwood.data.section import SourceSection
from sapwood.data.shapes import BadRecord, LeftOut, Normaliser, transcript
from sapwood.types import Message


def user(text: str) -> Message:
    return Message("user", text)


def reply(text: str) -> Message:
    return Message("assistant", text)


def read(fields: dict[str, Any], learns_from: LearnsFrom | None = None, **mapping: Any) -> list[Record]:
    return Normaliser(SourceSection(path="x", **mapping), learns_from)(fields)


def one(fields: dict[str, Any], learns_from: LearnsFrom | None = None, **mapping: Any) -> Record:
    (record,) = read(fields, learns_from, **mapping)
    return record


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "hi", "response": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"question": "hi", "answer": "hello"},
        {"problem": "hi", "solution": "hello"},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "output": "hello", "input": None},
        {"input": "hi", "target": "hello"},
        {"messages": CHAT},
        {"conversations": SHAREGPT},
        {"conversations": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, CHAT[1]]},
    ],
)
def test_demonstrations(fields: dict[str, Any]) -> None:
    record = one(fields, "demonstrations")
    assert record.prompt == (user("hi"),)
    assert record.replies == ((reply("hello"),),)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "hi", "chosen": "good", "rejected": "bad"},
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": [_ := {"role": "assistant", "content": "good"}],
         "rejected": [{"role": "assistant", "content": "bad"}]},
        {"chosen": [CHAT[0], _], "rejected": [CHAT[0], {"role": "assistant", "content": "bad"}]},  # implicit prompt
        {"prompt": "hi", "chosen": [CHAT[0], _], "rejected": [CHAT[0], {"role": "assistant", "content": "bad"}]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
        {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " good", "rejected": "bad"},
    ],
)  # fmt: skip
def test_pairs(fields: dict[str, Any]) -> None:
    record = one(fields, "pairs")
    assert record.prompt == (user("hi"),)
    assert [r[0].content.strip() for r in record.replies] == ["good", "bad"]
    assert [r[0].role for r in record.replies] == ["assistant", "assistant"]
    assert record.rewards == (0.0, 0.0)


def test_transcripts_part_where_the_answers_do() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nand more"
    record = one({"chosen": f"{start}\n\nAssistant: d", "rejected": f"{start}\n\nAssistant: e"})
    assert record.prompt == (user("a"), reply("b"), user("c\nand more"))
    assert record.replies == ((reply("d"),), (reply("e"),))
    # They may differ in an earlier question already: the shared answer before it is then part of both replies.
    record = one({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                  "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: x\n\nAssistant: e"})  # fmt: skip
    assert record.prompt == (user("a"),)
    assert record.replies == ((reply("b"), user("c"), reply("d")), (reply("b"), user("x"), reply("e")))
    assert transcript("\n\nHuman: a\n\nAssistant:", "x") == (user("a"),)


@pytest.mark.parametrize(
    ("extra", "rewards"),
    [
        ({"margin": 2}, (2.0, 0.0)),
        ({"margin": "0.5"}, (0.5, 0.0)),
        ({"score_chosen": 8.5, "score_rejected": 3}, (8.5, 3.0)),
        ({"chosen_score": None, "rejected_score": None}, (0.0, 0.0)),  # RLHFlow's hh-rlhf has them empty
    ],
)
def test_margins(extra: dict[str, Any], rewards: tuple[float, ...]) -> None:
    assert one({"prompt": "q", "chosen": "a", "rejected": "b", **extra}).rewards == rewards


@pytest.mark.parametrize(
    ("label", "reward"), [(True, 1.0), (False, -1.0), ("true", 1.0), ("False", -1.0), (1, 1.0), (0, 0.0), (-0.5, -0.5)]
)
def test_labels(label: Any, reward: float) -> None:
    record = one({"prompt": "q", "completion": "a", "label": label}, "labels")
    assert record.rewards == (reward,)  # desirable where positive


def test_conversations_split_before_the_first_reply_and_end_with_the_last() -> None:
    turns = [user("a"), reply("b"), user("c"), reply("d"), user("thanks")]
    messages = [{"role": m.role, "content": m.content} for m in (Message("system", "s"), *turns)]
    record = one({"messages": messages}, "demonstrations")
    assert record.prompt == (Message("system", "s"), user("a"))
    assert record.replies == ((reply("b"), user("c"), reply("d")),)
    task = one({"messages": messages}, "rollouts")
    assert task.prompt == (Message("system", "s"), user("a"), reply("b"), user("c"))
    assert (task.replies, task.answer) == ((), "d")


def test_mapping_by_name() -> None:
    fields = {"problem": "1+1", "why": "because", "solution": "2", "context": "sum", "sys": "Be brief.", "prompt": "no"}
    record = one(fields, "demonstrations", input="problem", output="why", context="context", system="sys")
    assert record.prompt == (Message("system", "Be brief."), user("1+1\n\nsum"))
    assert record.replies == ((reply("because"),),)
    assert record.metadata == {"solution": "2", "prompt": "no"}


def test_instruction_with_input_history_and_system() -> None:
    record = one({"instruction": "Add.", "input": "1 2", "output": "3", "history": [["hi", "ho"]], "system": "S"})
    assert record.prompt == (Message("system", "S"), user("hi"), reply("ho"), user("Add.\n\n1 2"))


@pytest.mark.parametrize(
    ("fields", "answer", "metadata"),
    [
        ({"prompt": "q", "answer": 4, "level": 2}, 4, {"level": 2}),
        ({"prompt": "q", "response": "r", "level": 2}, "r", {"level": 2}),
        ({"problem": "q", "solution": "long", "answer": "4"}, "4", {}),
        ({"prompt": "q", "expected": "x"}, "x", {}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, None, {"chosen": "a", "rejected": "b"}),
        ({"prompt": "q"}, None, {}),
    ],
)
def test_rollouts_know_the_answer(fields: dict[str, Any], answer: Any, metadata: dict[str, Any]) -> None:
    record = one(fields, "rollouts")
    assert record.prompt == (user("q"),)
    assert record.replies == ()
    assert record.answer == answer
    assert record.metadata == metadata


def test_what_a_record_is_used_for() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 3}
    assert one(pair, "demonstrations").replies == ((reply("a"),),)
    good, bad = read(pair, "labels")
    assert (good.replies, good.rewards) == (((reply("a"),),), (1.0,))
    assert (bad.replies, bad.rewards) == (((reply("b"),),), (-1.0,))
    with pytest.raises(LeftOut, match="labelled undesirable"):
        read({"prompt": "q", "completion": "a", "label": False}, "demonstrations")


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
BAD: list[tuple[dict[str, Any], LearnsFrom | None, dict[str, Any], str]] = [
    ({"prompt": " ", "response": "x"}, None, {}, "field 'prompt' is empty; fill it in"),
    ({"prompt": "x", "response": ""}, None, {}, "field 'response' is empty"),
    ({"prompt": "x", "response": math.nan}, None, {}, "field 'response' is nan, a missing value"),
    ({"prompt": {"a": 1}, "response": "x"}, None, {}, "field 'prompt' must be text, not an object"),
    ({"prompt": "x", "answer": math.nan}, "rollouts", {}, "field 'answer' is nan, a missing value"),
    ({**PAIR, "margin": math.nan}, None, {}, "field 'margin' is nan; rewards and margins must be finite"),
    ({**PAIR, "score_chosen": math.inf, "score_rejected": 1}, None, {}, "field 'score_chosen' is inf"),
    ({**PAIR, "margin": "big"}, None, {}, "field 'margin' is 'big', not a number"),
    ({**PAIR, "margin": True}, None, {}, "field 'margin' must be a number, not true or false"),
    ({"prompt": "q", "completion": "a", "label": math.nan}, None, {}, "field 'label' is nan"),
    ({"prompt": "q", "completion": "a", "label": "maybe"}, None, {}, "field 'label' is 'maybe', not a number"),
    ({**PAIR, "rejected": "a"}, None, {}, "chosen and rejected are equal; a pair must differ"),
    ({"chosen": CHAT, "rejected": CHAT}, None, {}, "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "a"}, None, {}, "'chosen' is there without 'rejected'"),
    ({"chosen": "a", "rejected": "b"}, None, {}, "a pair without a prompt"),
    ({**PAIR, "chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant:"}, None, {},
     "field 'rejected': the Assistant's last turn is empty or missing"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}, None, {},
     "share no prompt"),
    ({"messages": [{"content": "hi"}]}, None, {}, "field 'messages', message 0: has no role; give system, user or"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, None, {}, "message 0: role 'tool' is unknown; known are"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, None, {}, "the assistant's content is empty"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, None, {}, "content must be text, not null"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [1]}]}, None, {}, "calls tools"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, None, {},
     "message 0: holds a part of type 'image', and Sapwood trains on text; leave the record out"),
    ({"prompt": "q", "response": "a", "image": {"bytes": b"x", "path": None}}, None, {}, "field 'image' holds media"),
    ({"messages": []}, None, {}, "an empty list of messages"),
    ({"messages": "hi"}, None, {}, "must be a list of messages, not text"),
    ({"messages": CHAT[1:]}, None, {}, "no user's message comes before the assistant's first"),
    ({"prompt": CHAT, "response": "x"}, None, {}, "the prompt ends with the assistant's message"),
    ({"prompt": CHAT[:1], "completion": CHAT}, "demonstrations", {"shape": "preference"}, "needs chosen"),
    ({"text": "x"}, None, {}, "no prompt: none of its fields is one of prompt, question"),
    ({}, None, {}, "the record holds nothing"),
    ({"data": [{"prompt": "x", "response": "y"}]}, None, {},
     "holds records under 'data'; save that list as a file of its own"),
    ({"messages": 3}, None, {}, "must be a list of messages, not a number"),
    ({"prompt": "x", "response": True}, None, {}, "must be text, not true or false"),
    ({"messages": [{"role": "user", "content": [3]}]}, None, {}, "message 0: holds a number as a part, and Sapwood"),
    ({"promt": "x", "response": "y"}, None, {"input": "prompt"},
     "data.input is 'prompt', but the record has no such field; did you mean 'promt'?"),
    ({"prompt": "x"}, "demonstrations", {}, "has no reply to learn from"),
    ({"prompt": "x", "response": "y"}, "pairs", {}, "is no pair; it needs chosen and rejected"),
    ({"prompt": "x", "response": "y"}, "labels", {}, "is not labelled"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "learns_from", "mapping", "problem"), BAD)
def test_bad_records(
    fields: dict[str, Any], learns_from: LearnsFrom | None, mapping: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BadRecord) as caught:
        read(fields, learns_from, **mapping)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
