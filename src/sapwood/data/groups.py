"""`Grouper`: a record -> a group of trajectories, tokenised as a rollout would have made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sapwood.chat import Chat
from sapwood.data import Record
from sapwood.data.section import DataSection
from sapwood.errors import DataError
from sapwood.types import Group, Ids, Message, StopReason, Task, Trajectory, Turn

T = TypeVar("T")
_NO_FLOATS = np.zeros(0, np.float32)


class _Dropped(Exception):
    """The record doesn't fit; the message is the count that it raises."""


class _TooLong(DataError):
    """The record doesn't fit, and the policy for that is to stop."""


@dataclass
class Grouper:
    """Makes groups of records: one turn for every assistant message that is learnt.

    History is never tokenised twice: the prompt comes from `Chat.start`, every reply from `Chat.reply` and what
    follows it from `Chat.extend`, which gives the tokens of a rollout in which the model had said the same. Assistant
    messages that aren't learnt are part of the next turn's prompt.

    counts: how often a prompt or a reply was cut or a record dropped, over all calls. refused: index -> why the chat
    template doesn't take the record, where bad records are skipped.
    """

    chat: Chat
    section: DataSection

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: dict[int, str] = {}
        limit = self.section.max_length
        limits = [self.section.max_prompt_length, None if limit is None else limit - 1]
        self._prompt_limit = min((value for value in limits if value is not None), default=None)

    def group(self, record: Record, index: int) -> Group | None:
        """The record's group, or None where the length policy drops it.

        Raises DataError, naming the record's file and line, where the chat template refuses the conversation or where
        the policy for lengths is "error".
        """
        return self._told(self._group, record, index)

    def prompt(self, record: Record, index: int) -> tuple[Message, ...] | None:
        """The messages of a record to roll out, within the limit on prompts; None and errors as of `group`."""
        return self._told(lambda record, _: self._opening(record)[0], record, index)

    def _told(self, make: Callable[[Record, int], T], record: Record, index: int) -> T | None:
        """What `make` makes of the record; what doesn't fit is counted, what is refused names its line."""
        try:
            return make(record, index)
        except _Dropped as dropped:
            self.counts[str(dropped)] += 1
            return None
        except DataError as error:
            problem = f"{record.source}: {error}"
            if self.section.on_bad_record == "error" or isinstance(error, _TooLong):
                raise DataError(problem) from error
            self.counts["refused by the template"] += 1
            self.refused[index] = problem
            return None

    def _group(self, record: Record, index: int) -> Group:
        messages, opening = self._opening(record)
        metadata = {**record.metadata, "index": index, "source": record.source}
        task = Task(f"data-{index}", messages, record.answer, metadata)
        rewards = record.rewards or (0.0,) * len(record.replies)
        trajectories = []
        for reply, reward in zip(record.replies, rewards, strict=True):
            turns, cut = self._fitted(self._turns(opening, reply), record)
            trajectories.append(Trajectory(task, turns, terminated=not cut, truncated=cut, reward=reward))
        if len(trajectories) == 2 and _same(trajectories[0], trajectories[1]):
            raise _Dropped("equal after cutting")
        return Group(task, trajectories)

    def _opening(self, record: Record) -> tuple[tuple[Message, ...], Ids]:
        """The prompt's messages and tokens, within the limit."""
        messages, ids, limit = record.prompt, self.chat.start(record.prompt), self._prompt_limit
        if limit is None or ids.size <= limit:
            return messages, ids
        policy = self.section.long_prompt
        if policy == "error":
            raise _TooLong(
                f"the prompt has {ids.size} tokens, and at most {limit} are allowed; raise data.max_prompt_length or "
                "data.max_length, or set data.long_prompt"
            )
        if policy == "cut_start":
            self.counts["prompts cut"] += 1
            return messages, ids[ids.size - limit :]
        if policy == "drop_turns":
            while (shorter := _without_oldest(messages)) is not None:
                messages = shorter
                if (ids := self.chat.start(messages)).size <= limit:
                    self.counts["prompts cut"] += 1
                    return messages, ids
        raise _Dropped("dropped for a long prompt")

    def _turns(self, opening: Ids, reply: tuple[Message, ...]) -> list[Turn]:
        """The turns of one reply; what is not learnt is part of the prompt of the turn after it."""
        last = len(reply) - 1
        turns: list[Turn] = []
        prompt, at = [opening], 0
        while at <= last:
            ids = self.chat.reply(reply[at].content)
            following = at + 1
            while following <= last and reply[following].role != "assistant":
                following += 1
            if self.section.train_on == "all" or at == last:
                turns.append(_turn(np.concatenate(prompt), ids, reply[at].content))
                prompt = []
            else:
                prompt.append(ids)
            if following <= last:
                prompt.append(self.chat.extend(ids, True, reply[at + 1 : following]))
            at = following
        return turns

    def _fitted(self, turns: list[Turn], record: Record) -> tuple[list[Turn], bool]:
        """The turns within max_length, and whether any token was cut."""
        limit = self.section.max_length
        total = sum(turn.prompt_ids.size + turn.token_ids.size for turn in turns)
        if limit is None or total <= limit:
            return turns, False
        if self.section.long_reply == "error":
            raise _TooLong(
                f"prompt and reply have {total} tokens, and at most {limit} are allowed; raise data.max_length or set "
                "data.long_reply"
            )
        if self.section.long_reply == "drop":
            raise _Dropped("dropped for a long reply")
        kept: list[Turn] = []
        for turn in turns:
            room = limit - turn.prompt_ids.size
            if room <= 0:
                break
            ids = turn.token_ids[:room]
            whole = ids.size == turn.token_ids.size
            kept.append(turn if whole else _turn(turn.prompt_ids, ids, self.chat.decode(ids), StopReason.LENGTH))
            limit = room - ids.size
        if not kept:  # the earlier turns, which aren't learnt, already fill it
            raise _Dropped("dropped for a long prompt")
        self.counts["replies cut"] += 1
        return kept, True


def _turn(prompt: Ids, ids: Ids, text: str, stop: StopReason = StopReason.EOS) -> Turn:
    return Turn(prompt, ids, _NO_FLOATS, _NO_FLOATS, stop, text)


def _without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Without the oldest exchange; None where only the last message (and the system's) is left."""
    head = messages[:1] if messages and messages[0].role == "system" else ()
    rest = messages[len(head) + 1 :]
    while rest and rest[0].role != "user":
        rest = rest[1:]
    return (*head, *rest) if rest else None


def _same(one: Trajectory, other: Trajectory) -> bool:
    return len(one.turns) == len(other.turns) and all(
        np.array_equal(a.prompt_ids, b.prompt_ids) and np.array_equal(a.token_ids, b.token_ids)
        for a, b in zip(one.turns, other.turns, strict=True)
    )
