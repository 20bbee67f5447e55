"""Files and hub sets of anyone's making -> records of one shape -> groups.

Whatever a file calls its fields, a `Record` is messages that open a conversation and the replies that it may get: none
(a prompt to roll out), one (a demonstration, or a reply with a label) or two (chosen and rejected).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sapwood.types import Message


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
