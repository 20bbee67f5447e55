"""The nouns of Sapwood, from the world to the loss. Read this first.

    Task -> Env x Engine -> Trajectory -> Group -> (credit) -> Row -> TokenTree -> forward -> loss

A `Task` is a frozen question. One attempt at it is a `Trajectory`, made of `Turn`s; attempts at the same task
form a `Group`. A preference pair is a group of two and a demonstration a group of one, so every algorithm starts
from groups. `to_rows` (sapwood.rollout) flattens trajectories to `Row`s: one token sequence each, ready for
training, carrying only per-token arrays of its *scored* tokens. Nothing here knows of padding or of torch.

Axis letters in the docstrings: L tokens of a row, S scored (trained) tokens of a row, G trajectories of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Task:
    """A frozen question put to the model.

    id: unique within its family; prompt: opening messages (may be empty where the environment writes them);
    answer: what a reward compares with; metadata: whatever the environment or reward needs (JSON-serialisable);
    seed: the only source of randomness of the environment made from this task.
    """

    id: str
    prompt: tuple[Message, ...] = ()
    answer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


class StopReason(StrEnum):
    """Why sampling of a turn ended."""

    EOS = "eos"  # an end token of the model
    STOP = "stop"  # a stop string or stop token of the request
    LENGTH = "length"  # max_new_tokens
    CONTEXT = "context"  # the model's context is full


@dataclass(frozen=True)
class Turn:
    """One exchange: prompt tokens, then tokens that the model sampled.

    prompt_ids [P]: tokens appended since the end of the previous turn, or the whole prompt if `restart`.
    token_ids [T], sampled_logprobs [T] (of the distribution actually sampled), kept_logmass [T] (log of the
    probability mass that truncation kept; 0 without truncation): the reply, its end token included if sampled.
    text: the reply decoded without special tokens; reward: what the environment paid for it.
    restart: the conversation before this turn was dropped, so the turn starts a row of its own.
    """

    prompt_ids: Ids
    token_ids: Ids
    sampled_logprobs: Floats
    kept_logmass: Floats
    stop_reason: StopReason
    text: str
    reward: float = 0.0
    restart: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Trajectory:
    """One attempt at a task.

    terminated: the task ended; truncated: a budget (turns, tokens, context) ended it; error: the environment
    failed (the trajectory is data all the same, and is left out of training).
    reward_parts: named parts before weighting; reward: their weighted total. temperature: what it was sampled at, where
    that isn't the source's (a recording).
    """

    task: Task
    turns: list[Turn] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    error: str | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    temperature: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def env_return(self) -> float:
        """Undiscounted sum of the turns' environment rewards."""
        return float(sum(turn.reward for turn in self.turns))


@dataclass
class Group:
    """Trajectories of one task: G rollouts, a preference pair (2) or a demonstration (1)."""

    task: Task
    trajectories: list[Trajectory]


@dataclass
class Row:
    """One flat token sequence ready for training.

    token_ids [L]; loss_mask [L] bool: the tokens that are scored (the model's own). All other arrays are packed
    over the S scored tokens, in order: entry s belongs to token_ids[flatnonzero(loss_mask)[s]], and a log-probability
    is that of this token given everything before it in the row.

    turn [S]: index of the trajectory's turn that each scored token belongs to.
    sampled_logprobs [S], kept_logmass [S]: from the engine. old_logprobs [S]: the trainer's policy before the update.
    reference_logprobs [S], values [S], returns [S], advantages [S]: filled by scoring and credit where needed.
    logprobs [S]: the policy's in the last update that saw the row, where samples are kept.
    group, member: which trajectory of which group of the batch; reward: that trajectory's total.
    bootstrap: the critic's value of the state after the row's last token, for rows that a budget cut short.
    temperature: logits are divided by it in every training-side log-probability.
    """

    token_ids: Ids
    loss_mask: NDArray[np.bool_]
    turn: NDArray[np.int32]
    sampled_logprobs: Floats | None = None
    kept_logmass: Floats | None = None
    old_logprobs: Floats | None = None
    logprobs: Floats | None = None
    reference_logprobs: Floats | None = None
    values: Floats | None = None
    advantages: Floats | None = None
    returns: Floats | None = None
    group: int = 0
    member: int = 0
    reward: float = 0.0
    bootstrap: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_mask.shape != self.token_ids.shape:
            raise ValueError(f"loss_mask {self.loss_mask.shape} and token_ids {self.token_ids.shape} differ in shape")
        if self.loss_mask.size and self.loss_mask[0]:
            raise ValueError("the first token of a row has no prefix, so it can't be scored")

    @property
    def scored(self) -> int:
        """S, the number of scored tokens."""
        return int(self.loss_mask.sum())
