"""The contract of a sampling engine: a scheduler of requests.

`submit` queues a request, `step` advances all running ones by at least one token and returns those that finished,
`close` frees what is kept for an episode, `load` takes the policy's current weights and forgets every cache.
`generate` is the loop over them. Requests are admitted in order of submission and each draws from its own seed, so
results don't depend on who else was in the batch (beyond float noise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sapwood.types import Floats, Ids, StopReason


class Sampling(BaseModel):
    """Sampling options, in the order they are applied. temperature 0 is greedy (logprobs then use temperature 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(1.0, ge=0.0)
    top_k: int = Field(0, ge=0, description="keep the k most probable tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="keep the smallest set of tokens with this mass")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="drop tokens below this share of the top probability")
    max_new_tokens: int = Field(32, ge=1)
    stop: tuple[str, ...] = Field((), description="end the reply once its text contains one of these (kept)")
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """token_ids [P]: the whole prompt, history included. episode: KV is kept under this name until `close`."""

    id: int
    token_ids: Ids
    sampling: Sampling
    seed: int
    episode: str


@dataclass(frozen=True)
class Completion:
    """token_ids [T], logprobs [T] of the sampled distribution, kept_logmass [T] (log mass kept by truncation)."""

    request_id: int
    token_ids: Ids
    logprobs: Floats
    kept_logmass: Floats
    stop_reason: StopReason


class Engine(ABC):
    """A scheduler of sampling requests."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineError for options it can't honour and BudgetError for a prompt too long."""

    @abstractmethod
    def step(self) -> list[Completion]:
        """Advance all running requests; the finished ones, in order of submission. [] when nothing is queued.

        An exception drops every request; the engine stays usable.
        """

    @abstractmethod
    def close(self, episode: str) -> None:
        """Free what is kept for the episode; unknown names are ignored."""

    @abstractmethod
    def load(self, policy: Any) -> None:
        """Take the policy's current weights; every cache is invalidated."""

    def shrink(self) -> bool:
        """Take less memory from here on, after a `step` or `load` that ran out of it; False where that can't be.

        Requests, episodes and caches are dropped. What is sampled from then on is the same, rounding apart.
        """
        return False

    def state(self) -> dict[str, Any]:
        """What `shrink` has changed, to checkpoint; {} where nothing was."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (optional hook)
        """Take up what `state` gave."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample all requests; completions in the order of the requests. Their episodes are closed."""
        for request in requests:
            self.submit(request)
        done: dict[int, Completion] = {}
        while len(done) < len(requests):
            for completion in self.step():
                done[completion.request_id] = completion
        for request in requests:
            self.close(request.episode)
        return [done[request.id] for request in requests]
