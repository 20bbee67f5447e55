"""The public fake: an engine that says what it is told, for tests of worlds, rewards and training loops.

engine = ScriptedEngine(tokenizer, ["[0.5]", "[0.1]"])  # an episode's replies, turn by turn
engine = ScriptedEngine(tokenizer, lambda prompt, request: "guess " + prompt[-1])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sapwood.engines import Completion, Engine, Request
from sapwood.errors import BudgetError, EngineError
from sapwood.types import Floats, Ids, StopReason

Reply = Callable[[str, Request], str] | Sequence[str]


class OPTIONS(BaseModel):
    """The options that a recipe can give."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    reply: tuple[str, ...] = Field(default=("",), min_length=1)
    tokens_per_step: int | None = Field(default=None, ge=1)
    logprob: float = Field(default=-1.0, le=0.0)


class ScriptedEngine(Engine):
    """Replies from a script, by the full contract of an engine.

    reply: a function of the prompt's text (special tokens included) and the request, or the replies of an episode's
    turns in order (the last one is repeated). An end token follows each reply; with `ignore_eos` the reply is
    repeated up to max_new_tokens instead. tokens_per_step: how many tokens of each running request one `step` gives,
    None for all. logprob: the log-probability claimed for every token. max_context: prompt tokens allowed.
    policies: what `load` was given, in order.
    """

    def __init__(
        self,
        tokenizer: Any,
        reply: Reply,
        *,
        tokens_per_step: int | None = None,
        logprob: float = -1.0,
        max_context: int | None = None,
    ) -> None:
        if isinstance(reply, str) or (not callable(reply) and not reply):
            raise EngineError("a script is a function or a list with at least one reply")
        if tokens_per_step is not None and tokens_per_step < 1:
            raise EngineError(f"tokens_per_step must be at least 1, not {tokens_per_step}")
        self._tokenizer = tokenizer
        self._reply = reply
        self._tokens_per_step = tokens_per_step
        self._logprob = logprob
        self._max_context = max_context
        self._running: list[_Running] = []
        self._turns: dict[str, int] = {}
        self.policies: list[Any] = []

    def submit(self, request: Request) -> None:
        """Queue a request. Raises BudgetError for a prompt longer than max_context."""
        size = request.token_ids.size
        if self._max_context is not None and size > self._max_context:
            raise BudgetError(f"request {request.id}: its prompt of {size} tokens exceeds {self._max_context}")
        ids, reason = self._script(request)
        self._running.append(_Running(request.id, request.episode, ids, reason))

    def step(self) -> list[Completion]:
        """Advance every request by `tokens_per_step` tokens; the finished ones in order of submission."""
        for running in self._running:
            running.given = running.ids.size
            if self._tokens_per_step is not None:
                running.taken += self._tokens_per_step
                running.given = min(running.given, running.taken)
        finished = [r for r in self._running if r.given == r.ids.size]
        self._running = [r for r in self._running if r.given < r.ids.size]
        return [
            Completion(r.request_id, r.ids, self._claimed(r.ids), np.zeros(r.ids.size, np.float32), r.reason)
            for r in finished
        ]

    def close(self, episode: str) -> None:
        """Forget how many turns the episode had, and drop its unfinished requests."""
        self._turns.pop(episode, None)
        self._running = [running for running in self._running if running.episode != episode]

    def load(self, policy: Any) -> None:
        """Note the policy; a script doesn't depend on it."""
        self.policies.append(policy)

    def _claimed(self, ids: Ids) -> Floats:
        return np.full(ids.size, self._logprob, np.float32)

    def _script(self, request: Request) -> tuple[Ids, StopReason]:
        """The whole reply, cut where the request's options end it."""
        turn = self._turns.get(request.episode, 0)
        self._turns[request.episode] = turn + 1
        if callable(self._reply):
            text = self._reply(self._tokenizer.decode(request.token_ids.tolist()), request)
        else:
            text = self._reply[min(turn, len(self._reply) - 1)]
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        sampling, eos = request.sampling, self._tokenizer.eos_token_id
        if sampling.ignore_eos:
            tokens = (tokens or [eos]) * sampling.max_new_tokens
        elif not tokens or tokens[-1] != eos:
            tokens.append(eos)
        for count in range(1, min(len(tokens), sampling.max_new_tokens) + 1):
            if tokens[count - 1] == eos and not sampling.ignore_eos:
                return np.array(tokens[:count], np.int64), StopReason.EOS
            if tokens[count - 1] in sampling.stop_token_ids or self._says(tokens[:count], sampling.stop):
                return np.array(tokens[:count], np.int64), StopReason.STOP
        return np.array(tokens[: sampling.max_new_tokens], np.int64), StopReason.LENGTH

    def _says(self, tokens: list[int], stop: Sequence[str]) -> bool:
        return bool(stop) and any(s in self._tokenizer.decode(tokens, skip_special_tokens=True) for s in stop)


@dataclass
class _Running:
    request_id: int
    episode: str
    ids: Ids
    reason: StopReason
    taken: int = 0
    given: int = 0


class RecipeScript(ScriptedEngine):
    """A script from a recipe: {name: scripted, reply: ["[0.5]", "[0.1]"]}. The policy says nothing."""

    def __init__(self, policy: Any, tokenizer: Any, *, options: OPTIONS) -> None:
        super().__init__(tokenizer, options.reply, tokens_per_step=options.tokens_per_step, logprob=options.logprob)
        self.load(policy)


PLUGIN = RecipeScript
