"""Messages to tokens, without ever tokenising history twice.

A conversation grows by deltas: `Chat.start` gives the tokens of the opening messages and `Chat.extend` those that
follow a sampled reply. What the model sampled is kept as it was sampled, so a row reproduces exactly what the engine
saw, whatever the tokenizer would make of the decoded text.

Control tokens come from the chat template only. A special token that is spelled out in a message ("<|im_end|>" in an
observation, say) is tokenised as plain text, because what an environment or a user writes is not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np

from sapwood.errors import DataError
from sapwood.types import Ids, Message

# Stands for the sampled reply when a continuation is rendered. Letters only: no template strips or rewrites them.
_REPLY = "SAPWOODREPLYPLACEHOLDER"
# Bracket the number of a special token that a message spells out, while the template runs (private use area).
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_SURROGATE = re.compile("[\ud800-\udfff]")

_Messages = tuple[Message, ...]


class Chat:
    """Renders conversations with a tokenizer's chat template; the only place where text becomes prompt tokens.

    tokenizer: any object with the Hugging Face tokenizer interface (`apply_chat_template`, `__call__`, `decode`,
    `added_tokens_decoder`, `eos_token_id`). template: a Jinja chat template in place of the tokenizer's own. title:
    what errors call the template. variables: further variables of the template, such as enable_thinking=False.

    Returned arrays are shared between callers and read-only. Raises DataError where there is no template, or where
    the template refuses a conversation.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, title: str = "the chat template", **variables: Any
    ) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{title}: the tokenizer has no chat template; choose an instruction-tuned model, or give a Jinja file "
                "as model.chat_template."
            )
        self._tokenizer = tokenizer
        self._title = title
        self._template = template
        self._variables = variables
        self._specials = {
            token.content: int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._start = lru_cache(4096)(self._start_uncached)
        self._continuation = lru_cache(4096)(self._continuation_uncached)
        self._plain = lru_cache(65536)(self._plain_uncached)
        self._turn_end = self._find_turn_end()

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn: the template's end-of-turn token and the tokenizer's eos, ascending."""
        eos = self._tokenizer.eos_token_id
        ids = set(eos) if isinstance(eos, list | tuple) else {eos}
        if self._turn_end is not None:
            ids.add(self._specials[self._turn_end])
        return tuple(sorted(int(i) for i in ids if i is not None))

    def start(self, messages: Sequence[Message]) -> Ids:
        """Tokens [P] of the opening messages, the generation prompt included."""
        return self._start(tuple(messages))

    def extend(self, reply_ids: Ids, ended: bool, messages: Sequence[Message]) -> Ids:
        """Tokens [D] to append after a sampled reply: what closes its turn, `messages`, the generation prompt.

        ended: the reply closed its turn itself (see `ended`); otherwise the end-of-turn tokens that it lacks come
        first. The result depends on `reply_ids` in no other way: history is not read, let alone tokenised.
        """
        if ended and not self.ended(reply_ids):
            raise ValueError(f"a reply that ended must end with one of {self.end_token_ids}")
        closing, following = self._continuation(tuple(messages))
        return following if ended else _frozen(np.concatenate([closing, following]))

    def reply(self, text: str) -> Ids:
        """Tokens [T] of an assistant's reply that was not sampled (a demonstration), its end-of-turn token included.

        They are what sampling the same text would have given: the reply is tokenised by itself, after the prompt.
        """
        closing = [self._specials[self._turn_end]] if self._turn_end is not None else list(self.end_token_ids[:1])
        ids = self._ids(_whole(text), split_special_tokens=True)
        return np.concatenate([np.array(ids, np.int64), np.array(closing)])

    def ended(self, reply_ids: Ids) -> bool:
        """Whether the sampled tokens [T] close the assistant's turn themselves."""
        return reply_ids.size > 0 and int(reply_ids[-1]) in self.end_token_ids

    def decode(self, ids: Ids, skip_special_tokens: bool = True) -> str:
        """Text of the tokens [T]."""
        return self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _find_turn_end(self) -> str | None:
        """The special token that the template puts after an assistant message; None if it puts none."""
        tail = self._after_reply((), generation_prompt=False)
        found = self._special_pattern.search(tail)
        return found.group() if found else None

    def _start_uncached(self, messages: _Messages) -> Ids:
        spelled: list[str] = []
        text = self._render([self._conceal(m, spelled) for m in messages], generation_prompt=True)
        return self._encode(text, spelled)

    def _continuation_uncached(self, messages: _Messages) -> tuple[Ids, Ids]:
        """Tokens that close the assistant's turn, and tokens that follow."""
        spelled: list[str] = []
        tail = self._after_reply(tuple(self._conceal(m, spelled) for m in messages), generation_prompt=True)
        cut = tail.find(self._turn_end) + len(self._turn_end) if self._turn_end and self._turn_end in tail else 0
        return self._encode(tail[:cut], spelled), self._encode(tail[cut:], spelled, previous=self._turn_end or "")

    def _after_reply(self, messages: _Messages, generation_prompt: bool) -> str:
        """What the template writes after a reply that `messages` follow."""
        text = self._render([Message("user", "x"), Message("assistant", _REPLY), *messages], generation_prompt)
        at = text.find(_REPLY)
        if at < 0:
            raise DataError(
                f"{self._title} drops the assistant's reply, so it can't hold a conversation of turns; let it write "
                "every message, or give another one as model.chat_template."
            )
        return text[at + len(_REPLY) :]

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            said = str(error.message or error).rstrip(".")
            raise DataError(f"{self._title}, line {error.lineno}: {said}; mend the template.") from error
        except Exception as error:  # the boundary to a template, which is code that isn't ours
            roles = ", ".join(m.role for m in messages) or "no message"
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise DataError(
                f"{self._title} refuses a conversation of [{roles}]: {kind}{str(error).rstrip('.')}. Change the roles "
                "that the environment or data gives, or give another template as model.chat_template."
            ) from error

    def _conceal(self, message: Message, spelled: list[str]) -> Message:
        """Replace special tokens spelled out in the content by numbered marks; `spelled` collects them."""
        message = Message(message.role, _whole(message.content))
        if not self._special_pattern.search(message.content):
            return message

        def mark(found: re.Match[str]) -> str:
            spelled.append(found.group())
            return f"{_OPEN}{len(spelled) - 1}{_CLOSE}"

        return Message(message.role, self._special_pattern.sub(mark, message.content))

    def _encode(self, text: str, spelled: list[str], previous: str = "") -> Ids:
        """Token ids of rendered text. Cut at special tokens, where no tokenizer merges across, and memoised.

        previous: the special token before the text, which some tokenizers let eat the white space after it.
        """
        parts: list[Ids] = []
        at = 0
        for found in self._special_pattern.finditer(text):
            parts.append(self._segment(previous, text[at : found.start()], found.group(), spelled))
            parts.append(np.array([self._specials[found.group()]], np.int64))
            previous, at = found.group(), found.end()
        parts.append(self._segment(previous, text[at:], "", spelled))
        return _frozen(np.concatenate(parts))

    def _segment(self, before: str, text: str, after: str, spelled: list[str]) -> Ids:
        if not spelled or _OPEN not in text:
            return self._plain(before, text, after)

        def reveal(found: re.Match[str]) -> str:
            number = int(found.group(1))
            return spelled[number] if number < len(spelled) else found.group()

        text = re.sub(f"{_OPEN}([0-9]{{1,9}}){_CLOSE}", reveal, text)
        return np.array(self._ids(text, split_special_tokens=True), np.int64)

    def _plain_uncached(self, before: str, text: str, after: str) -> Ids:
        """Ids of text between two special tokens (or the ends), tokenised together with them as in a whole string."""
        if not text:
            return np.zeros(0, np.int64)
        ids = self._ids(before + text + after)
        return _frozen(np.array(ids[bool(before) : len(ids) - bool(after)], np.int64))

    def _ids(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]


def _whole(text: str) -> str:
    """The text with halves of surrogate pairs, which no tokenizer reads, as U+FFFD; two halves that fit are joined."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _frozen(ids: Ids) -> Ids:
    ids = ids.astype(np.int64, copy=False)
    ids.flags.writeable = False
    return ids
