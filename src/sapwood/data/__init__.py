"""Files and hub sets of anyone's making -> records of one shape -> groups.

Whatever a file calls its fields, a `Record` is messages that open a conversation and the replies that it may get: none
(a prompt to roll out), one (a demonstration, or a reply with a label) or two (chosen and rejected).

    section   what a recipe may say about data
    read      files and hub sets -> entries, streamed, each with its line or row
    shapes    entries -> records: fields found by name, roles, transcripts, pairs
    store     records -> an Arrow file in the cache, memory-mapped
    dataset   `open_data`: split by content, mixed by weight, an order for every epoch
    groups    `Grouper`: a record -> tokens, as a rollout would have made them
    prompts   `DataPrompts`: the prompts of records as a world to roll out in
    recordings  a model's own decisions with their tokens and log-probabilities: a file format, and records of it
    check     what `sapwood data check` reports; prepare: what `sapwood data prepare` writes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sapwood.types import Message

#: What a group is made for: rollouts of a task, one demonstration, a (chosen, rejected) pair, one labelled reply, or
#: one recorded decision of a model.
LearnsFrom = Literal["rollouts", "demonstrations", "pairs", "labels", "recordings"]
#: Called as progress(what, done, total); fits `sapwood.progress.Progress.work`.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Record:
    """One example.

    prompt: the messages before the replies (system message included). replies: each a continuation of the prompt that
    ends with the assistant's message; a conversation of several turns is one reply of several messages. rewards: one a
    reply; of a pair, chosen minus rejected is the margin, and a labelled reply is desirable where it is positive.
    answer: what a reward compares with; metadata: all other fields; source: file and line, for messages.
    """

    prompt: tuple[Message, ...]
    replies: tuple[tuple[Message, ...], ...] = ()
    rewards: tuple[float, ...] = ()
    answer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
