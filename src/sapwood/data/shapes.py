"""Entries -> records: fields found by their usual names or as mapped, messages, transcripts, pairs.

What a record is for (`learns_from`) decides what it must have: a pair serves as a demonstration of its chosen reply or
as two labelled ones, a demonstration as a prompt whose answer is known.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sapwood.data import LearnsFrom, Record
from sapwood.data.section import PARTS, Shape, SourceSection
from sapwood.data.words import described
from sapwood.errors import printable
from sapwood.types import Message

Messages = tuple[Message, ...]

#: Names under which a part is found where it isn't mapped, the first that a record has.
NAMES: dict[str, tuple[str, ...]] = {
    "input": ("prompt", "question", "problem", "query", "instruction", "input"),
    "output": ("response", "completion", "output", "solution", "reply", "target", "answer", "expected"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog"),
    "answer": ("answer", "expected", "ground_truth"),
    "label": ("label",),
    "margin": ("margin",),
    "score_chosen": ("score_chosen", "chosen_score", "chosen_rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected_rating"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_NEEDS: dict[Shape, tuple[str, ...]] = {
    "auto": (),
    "prompt": ("input",),
    "prompt_response": ("input", "output"),
    "instruction": ("input", "output"),
    "conversation": ("messages",),
    "preference": ("chosen", "rejected"),
    "transcript_pair": ("chosen", "rejected"),
    "label": ("output", "label"),
}
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_SHOWN = 20  # fields that a message lists
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class BadRecord(ValueError):
    """What is wrong with one record, as the end of a sentence that begins with its place."""


class LeftOut(Exception):
    """A good record that the algorithm has no use for; the reason is counted."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which field is which part, for records with the same fields.

    rest: the fields that become metadata; media: those that may hold pictures or sound.
    """

    parts: Mapping[str, str]
    rest: tuple[str, ...]
    shape: Shape
    media: tuple[str, ...]


class Normaliser:
    """Turns the entries of one source into records.

    learns_from: None takes whatever a record is, to check it. shapes: how many records had which shape.
    """

    def __init__(self, source: SourceSection, learns_from: LearnsFrom | None) -> None:
        self._source = source
        self._mapping = source.mapping()
        self._learns_from: LearnsFrom | None = learns_from
        self._plans: dict[tuple[str, ...], Plan] = {}
        self.shapes: Counter[str] = Counter()

    def __call__(self, fields: Mapping[str, Any]) -> list[Record]:
        """The records of an entry: one, or two where a pair becomes labelled replies.

        Raises BadRecord for what is wrong, LeftOut for what isn't used.
        """
        present = tuple([name for name, value in fields.items() if value is not None])
        plan = self._plans.get(present)
        if plan is None:
            try:
                plan = self._plans.setdefault(present, self._plan(present))
            except BadRecord as error:
                inside = next((name for name in present if _are_records(fields[name])), None)
                if inside is None:
                    raise
                raise BadRecord(f"holds records under {inside!r}; save that list as a file of its own") from error
        for name in plan.media:
            if fields[name] and not isinstance(fields[name], str):
                raise BadRecord(f"the field {name!r} holds media, and Sapwood trains on text; leave the record out")
        rest = {name: fields[name] for name in plan.rest}
        record = _READERS[plan.shape](_Fields(fields, plan.parts, rest))
        self.shapes[plan.shape] += 1
        return adapt(record, self._learns_from)

    def _plan(self, present: tuple[str, ...]) -> Plan:
        """Parts of records with these fields. Raises BadRecord where one is missing."""
        parts: dict[str, str] = {}
        mapped = set(self._mapping.values())
        for part, name in self._mapping.items():
            if name in present:
                parts[part] = name
            elif part not in ("context", "system", "margin", "answer", "score_chosen", "score_rejected"):
                raise BadRecord(f"data.{part} is {name!r}, but the record has no such field; {_fields(present, name)}")
        for part in NAMES:
            if part not in self._mapping:
                free = (name for name in NAMES[part] if name in present and name not in mapped)
                if (name := next(free, None)) is not None:
                    parts[part] = name
        if "context" not in parts and parts.get("input") == "instruction" and "input" in present:
            parts["context"] = "input"
        if parts.get("output") in (parts.get("input"), parts.get("context")):
            parts.pop("output", None)
        shape = self._shape(parts, present)
        used = set(_USED[shape])
        taken = {name for part, name in parts.items() if part in used}
        rest = tuple(name for name in present if name not in taken)
        return Plan(parts, rest, shape, tuple(name for name in present if name in _MEDIA))

    def _shape(self, parts: Mapping[str, str], present: tuple[str, ...]) -> Shape:
        asked = self._source.shape
        for part in _NEEDS[asked]:
            if part not in parts:
                names = ", ".join(NAMES[part])
                raise BadRecord(
                    f"data.shape is {asked}, which needs {part}, but the record has none of {names}; "
                    f"{_fields(present)}, so map it with data.{part}"
                )
        if asked != "auto":
            return asked
        if "chosen" in parts and "rejected" in parts:
            return "preference"
        for part, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if part in parts:
                raise BadRecord(f"{parts[part]!r} is there without {other!r}; a pair needs both ({_fields(present)})")
        if "output" in parts and "label" in parts and ("input" in parts or "messages" in parts):
            return "label"
        if "messages" in parts:
            return "conversation"
        if "input" in parts and "output" in parts:
            return "prompt_response" if parts["input"] != "instruction" else "instruction"
        if "input" in parts:
            return "prompt"
        if not present:
            raise BadRecord("the record holds nothing; fill it in or remove it")
        raise BadRecord(
            f"no prompt: none of its fields is one of {', '.join(NAMES['input'] + NAMES['messages'])}; "
            f"{_fields(present)}, so map it by name, e.g. data.input"
        )


def _are_records(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages."""
    return type(value) is list and bool(value) and type(value[0]) is dict and not {"role", "from"} & set(value[0])


def _fields(present: Sequence[str], wanted: str | None = None) -> str:
    near = difflib.get_close_matches(wanted, present, n=1) if wanted else []
    shown = [printable(name, 60) for name in present[:_SHOWN]] + ["..."] * (len(present) > _SHOWN)
    known = f"its fields are {', '.join(shown)}" if present else "it has no field with a value"
    return f"did you mean {near[0]!r}? ({known})" if near else known


# ---- parts of a record ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Fields:
    """An entry's values, read by part. rest: what becomes metadata."""

    values: Mapping[str, Any]
    parts: Mapping[str, str]
    rest: Mapping[str, Any]

    def name(self, part: str) -> str:
        return self.parts[part]

    def get(self, part: str) -> Any:
        name = self.parts.get(part)
        return None if name is None else self.values[name]

    def text(self, part: str) -> str:
        return text(self.get(part), f"field {self.parts[part]!r}")


def text(value: Any, where: str) -> str:
    """A text that isn't empty; numbers are written out. Raises BadRecord."""
    if type(value) is str:
        if not value or value.isspace():
            raise BadRecord(f"{where} is empty; fill it in or remove the record")
        return value
    if type(value) in (int, float):
        if value - value != 0:  # NaN or infinite; a whole number may be too large for a float
            raise BadRecord(f"{where} is {value}, a missing value; fill it in or remove the record")
        return str(value)
    raise BadRecord(f"{where} must be text, not {described(value)}")


def number(value: Any, where: str) -> float:
    """A finite number; text that says one is read. Raises BadRecord."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadRecord(f"{where} is {value[:40]!r}, not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(f"{where} must be a number, not {described(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise BadRecord(f"{where} is {value}; rewards and margins must be finite numbers")
    return value


def messages(value: Any, where: str) -> Messages:
    """A list of {role, content} or {from, value} objects. Raises BadRecord."""
    if type(value) is not list:
        raise BadRecord(f"{where} must be a list of messages, not {described(value)}")
    if not value:
        raise BadRecord(f"{where} is an empty list of messages")
    return tuple([_message(item, where, index) for index, item in enumerate(value)])


def _message(item: Any, where: str, index: int) -> Message:
    if type(item) is not dict:
        raise BadRecord(f"{where}, message {index}: must be an object with role and content, not {described(item)}")
    role = item.get("role")
    if role is None:
        role = item.get("from")
    if role is None:
        raise BadRecord(f"{where}, message {index}: has no role; give system, user or assistant")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRecord(
            f"{where}, message {index}: role {printable(repr(role), 60)} is unknown; known are system, user, "
            "assistant, human and gpt"
        )
    content = item.get("content")
    if content is None:
        content = item.get("value")
    if type(content) is list:
        content = _joined(content, where, index)
    if content is None and item.get("tool_calls"):
        raise BadRecord(f"{where}, message {index}: calls tools, which a text record can't hold; leave the record out")
    if type(content) is not str:
        raise BadRecord(f"{where}, message {index}: content must be text, not {described(content)}")
    if not content or content.isspace():
        raise BadRecord(f"{where}, message {index}: the {known}'s content is empty; fill it in or remove the record")
    return Message(known, content)


def _joined(parts: list[Any], where: str, index: int) -> str:
    """The text of content that is a list of parts."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            what = f"a part of type {printable(repr(kind), 60)}" if kind else f"{described(part)} as a part"
            raise BadRecord(f"{where}, message {index}: holds {what}, and Sapwood trains on text; leave the record out")
    return "".join(texts)


def transcript(value: str, where: str) -> Messages:
    """Messages of a text such as "\\n\\nHuman: hi\\n\\nAssistant: hello" (hh-rlhf's). Raises BadRecord.

    A last turn without words is left away where it is the Assistant's: it only asks for the reply.
    """
    found = list(_SPEAKER.finditer(value))
    if not found or value[: found[0].start()].strip():
        raise BadRecord(f"{where} is no transcript: it must begin with a line 'Human:' or 'Assistant:'")
    turns = []
    for index, speaker in enumerate(found):
        end = found[index + 1].start() if index + 1 < len(found) else len(value)
        content = value[speaker.end() : end].strip()
        role = "user" if speaker.group(1) == "Human" else "assistant"
        if not content:
            if index + 1 == len(found) and role == "assistant":
                break
            raise BadRecord(f"{where}, turn {index}: the {speaker.group(1)} says nothing")
        turns.append(Message(role, content))
    return tuple(turns)


def is_transcript(value: Any) -> bool:
    """Whether a text is a conversation written out as hh-rlhf does."""
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in value


# ---- shapes -----------------------------------------------------------------------------------------------


def _prompt(fields: _Fields) -> Messages:
    """The messages before the replies."""
    opening: Messages = ()
    if "input" in fields.parts:
        value, where = fields.get("input"), f"field {fields.name('input')!r}"
        if type(value) is list:
            opening = messages(value, where)
        elif is_transcript(value):
            opening = transcript(value, where)
        else:
            opening = (Message("user", _with_context(text(value, where), fields)),)
    elif "messages" in fields.parts:
        opening = messages(fields.get("messages"), f"field {fields.name('messages')!r}")
    if "history" in fields.parts:
        opening = _history(fields.get("history"), fields.name("history")) + opening
    if opening and opening[-1].role == "assistant":
        name = fields.parts.get("input") or fields.parts["messages"]
        raise BadRecord(f"field {name!r}: the prompt ends with the assistant's message; it must end with the user's")
    return _with_system(opening, fields)


def _with_context(prompt: str, fields: _Fields) -> str:
    context = fields.get("context")
    if context is None or context == "":
        return prompt
    return prompt + "\n\n" + text(context, f"field {fields.name('context')!r}")


def _with_system(opening: Messages, fields: _Fields) -> Messages:
    system = fields.get("system")
    if system is None or system == "" or (opening and opening[0].role == "system"):
        return opening
    return (Message("system", text(system, f"field {fields.name('system')!r}")), *opening)


def _history(value: Any, name: str) -> Messages:
    """Earlier turns, as [[question, answer], ...]."""
    turns: list[Message] = []
    for index, pair in enumerate(value or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRecord(f"field {name!r}, turn {index}: must be a pair [question, answer]")
        turns.append(Message("user", text(pair[0], f"field {name!r}, turn {index}")))
        turns.append(Message("assistant", text(pair[1], f"field {name!r}, turn {index}")))
    return tuple(turns)


def _reply(fields: _Fields, part: str) -> Messages:
    """A reply: text, one message, or a list of messages."""
    value, where = fields.get(part), f"field {fields.name(part)!r}"
    if type(value) is dict:
        value = [value]
    if type(value) is not list:
        return (Message("assistant", text(value, where)),)
    found = messages(value, where)
    if found[-1].role != "assistant":
        raise BadRecord(f"{where}: the last message is the {found[-1].role}'s; a reply ends with the assistant's")
    return found


def _read_prompt(fields: _Fields) -> Record:
    return Record(_prompt(fields), answer=_answer(fields), metadata=fields.rest)


def _read_reply(fields: _Fields) -> Record:
    return Record(_prompt(fields), (_reply(fields, "output"),), (), _answer(fields), fields.rest)


def _answer(fields: _Fields) -> Any:
    answer = fields.get("answer")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise BadRecord(f"field {fields.name('answer')!r} is {answer}, a missing value; fill it in")
    if answer == "":
        raise BadRecord(f"field {fields.name('answer')!r} is empty; fill it in or remove the record")
    return answer


def _read_label(fields: _Fields) -> Record:
    record = _read_reply(fields)
    return replace(record, rewards=(_label(fields.get("label"), f"field {fields.name('label')!r}"),))


def _label(value: Any, where: str) -> float:
    """1 or -1 of a truth value, or the number that it is."""
    if isinstance(value, str):
        value = {"true": True, "yes": True, "false": False, "no": False}.get(value.strip().lower(), value)
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    return number(value, where)


def _read_conversation(fields: _Fields) -> Record:
    where = f"field {fields.name('messages')!r}"
    found = _with_system(messages(fields.get("messages"), where), fields)
    first = next((i for i, message in enumerate(found) if message.role == "assistant"), len(found))
    if all(message.role == "system" for message in found[:first]):
        raise BadRecord(f"{where}: no user's message comes before the assistant's first")
    last = max((i + 1 for i, message in enumerate(found) if message.role == "assistant"), default=first)
    replies = (found[first:last],) if last > first else ()
    return Record(found[:first], replies, (), _answer(fields), fields.rest)


def _read_pair(fields: _Fields) -> Record:
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    explicit = "input" in fields.parts or "messages" in fields.parts
    if is_transcript(chosen) and is_transcript(rejected):
        return _read_transcripts(fields)
    if not explicit and not (type(chosen) is list and type(rejected) is list):
        raise BadRecord(
            f"a pair without a prompt: give one, or make {fields.name('chosen')!r} and {fields.name('rejected')!r} "
            "lists of messages or transcripts that begin with it"
        )
    opening = _prompt(fields) if explicit else ()
    replies = (_reply(fields, "chosen"), _reply(fields, "rejected"))
    bare = tuple(message for message in opening if message.role != "system")
    if all(reply[: len(bare)] == bare for reply in replies):  # both repeat the prompt that is also given by itself
        replies = (replies[0][len(bare) :], replies[1][len(bare) :])
    if any(reply[0].role != "assistant" for reply in replies if reply):
        if explicit:
            raise BadRecord("chosen and rejected must begin with the assistant's message, or both with the prompt")
        opening, replies = _shared(replies)
        opening = _with_system(opening, fields)
    return _pair(opening, replies, fields)


def _read_transcripts(fields: _Fields) -> Record:
    both = []
    for part in ("chosen", "rejected"):
        where = f"field {fields.name(part)!r}"
        value = fields.get(part)
        if not isinstance(value, str):
            raise BadRecord(f"{where} must be a transcript, not {described(value)}")
        turns = transcript(value, where)
        if turns[-1:] == () or turns[-1].role != "assistant":
            raise BadRecord(f"{where}: the Assistant's last turn is empty or missing")
        both.append(turns)
    opening, replies = _shared((both[0], both[1]))
    return _pair(_with_system(opening, fields), replies, fields)


def _shared(replies: tuple[Messages, Messages]) -> tuple[Messages, tuple[Messages, Messages]]:
    """Split two conversations into what they share and what follows, from an assistant's message on."""
    chosen, rejected = replies
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise BadRecord("chosen and rejected are equal; a pair must differ")
    while shared > 0 and not all(len(reply) > shared and reply[shared].role == "assistant" for reply in replies):
        shared -= 1
    if all(message.role == "system" for message in chosen[:shared]):
        raise BadRecord("chosen and rejected share no prompt that ends before an assistant's message")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def _pair(opening: Messages, replies: tuple[Messages, Messages], fields: _Fields) -> Record:
    if not all(replies):
        raise BadRecord("chosen or rejected holds nothing but the prompt")
    if replies[0] == replies[1]:
        raise BadRecord("chosen and rejected are equal; a pair must differ")
    if "score_chosen" in fields.parts and "score_rejected" in fields.parts and "margin" not in fields.parts:
        parts = ("score_chosen", "score_rejected")
        rewards = tuple(number(fields.get(part), f"field {fields.name(part)!r}") for part in parts)
    elif "margin" in fields.parts:
        rewards = (number(fields.get("margin"), f"field {fields.name('margin')!r}"), 0.0)
    else:
        rewards = (0.0, 0.0)
    return Record(opening, replies, rewards, metadata=fields.rest)


_READERS = {
    "prompt": _read_prompt,
    "prompt_response": _read_reply,
    "instruction": _read_reply,
    "label": _read_label,
    "conversation": _read_conversation,
    "preference": _read_pair,
    "transcript_pair": _read_transcripts,
}
_OPENING = ("input", "context", "system", "history")
_USED: dict[str, tuple[str, ...]] = {
    "prompt": (*_OPENING, "answer"),
    "prompt_response": (*_OPENING, "output", "answer"),
    "instruction": (*_OPENING, "output", "answer"),
    "label": (*_OPENING, "messages", "output", "label", "answer"),
    "conversation": ("messages", "system", "answer"),
    "preference": (*_OPENING, "messages", "chosen", "rejected", "margin", "score_chosen", "score_rejected"),
    "transcript_pair": ("system", "chosen", "rejected", "margin", "score_chosen", "score_rejected"),
}
assert set(PARTS) <= {part for used in _USED.values() for part in used}


# ---- purposes ---------------------------------------------------------------------------------------------


def adapt(record: Record, learns_from: LearnsFrom | None) -> list[Record]:
    """The record as an algorithm of this kind takes it. Raises BadRecord where it can't serve, LeftOut where unused."""
    count = len(record.replies)
    if learns_from is None:
        return [record]
    if learns_from == "rollouts":
        return [_as_prompt(record)]
    if learns_from == "demonstrations":
        if count == 0:
            raise BadRecord("has no reply to learn from; give one (response, output ...) or map data.output")
        if count == 1 and record.rewards and record.rewards[0] <= 0:
            raise LeftOut("labelled undesirable")
        return [record if count == 1 else replace(record, replies=record.replies[:1], rewards=())]
    if learns_from == "pairs":
        if count != 2:
            raise BadRecord("is no pair; it needs chosen and rejected (or map data.chosen and data.rejected)")
        return [record]
    if count == 2:
        return [
            replace(record, replies=(reply,), rewards=(reward,))
            for reply, reward in zip(record.replies, (1.0, -1.0), strict=True)
        ]
    if count == 0 or not record.rewards:
        raise BadRecord("is not labelled; it needs a reply and a label of true or false (or map data.label)")
    return [record]


def _as_prompt(record: Record) -> Record:
    """The record without its replies; the reply of a demonstration is the answer unless one is given."""
    if not record.replies:
        if not record.prompt:
            raise BadRecord("has no prompt")
        return record
    metadata = dict(record.metadata)
    if len(record.replies) == 2:
        metadata |= {"chosen": record.replies[0][-1].content, "rejected": record.replies[1][-1].content}
        return Record(record.prompt, answer=record.answer, metadata=metadata)
    reply = record.replies[0]
    if record.rewards:
        metadata["label"] = record.rewards[0]
    answer = reply[-1].content if record.answer is None else record.answer
    return Record(record.prompt + reply[:-1], answer=answer, metadata=metadata)
