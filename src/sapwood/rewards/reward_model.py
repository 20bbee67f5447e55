"""A trained reward model as a reward: its score of the whole conversation, prompt and replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from sapwood.chat import Chat
from sapwood.errors import DataError, ModelError
from sapwood.models.load import vocabulary_difference
from sapwood.models.roles import Models
from sapwood.models.scorer import Scorer, load_scorer
from sapwood.rewards import Reward
from sapwood.types import Group, Ids, Row, StopReason, Trajectory


class RewardModel(Reward):
    """(score - center) * scale, clipped to [-clip, clip] where given. path: a run, checkpoint, model folder or hub id.

    It reads the tokens that were sampled, end token included. retokenize: the text instead, with the chat template and
    tokenizer of the reward model, for one of another family; only for conversations of one turn whose prompt is the
    task's. dtype, quantize: of a base of its own; "auto" shares the policy's base where it is the reward model's too.
    A trajectory whose history was dropped on the way is several conversations, and gets the mean of their scores.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["auto", "none", "8bit", "4bit"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    token_budget: int = Field(default=8192, ge=1, description="distinct tokens scored at a time")
    retokenize: bool = False
    center: float = 0.0
    scale: float = 1.0
    clip: float | None = Field(default=None, gt=0)
    trust_remote_code: bool = False
    cache_dir: Path | None = None

    _scorer: Scorer | None = PrivateAttr(default=None)
    _chat: Chat | None = PrivateAttr(default=None)

    def bind(self, models: Models) -> None:
        """Load it, on the policy's base where that is its own. Raises ModelError for another tokenizer."""
        self._open(models)
        assert self._scorer is not None
        difference = vocabulary_difference(self._scorer.tokenizer, models.policy.tokenizer)
        if difference is not None and not self.retokenize:
            raise ModelError(
                f"rewards: the reward model {self.path} has another tokenizer than the policy ({difference}); set "
                "retokenize: true to give it the text in its own chat template."
            )

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"reward_model": score}. Loads the model by itself where nothing was bound."""
        if self._scorer is None:
            self._open(None)
        assert self._scorer is not None
        rows: list[Row] = []
        owner: list[tuple[int, int]] = []
        for g, group in enumerate(groups):
            for i, trajectory in enumerate(group.trajectories):
                for ids in self._conversations(trajectory):
                    rows.append(Row(ids, np.zeros(ids.size, bool), np.zeros(0, np.int32), group=g, member=i))
                    owner.append((g, i))
        raw = self._scorer.score(rows, self.token_budget) if rows else np.zeros(0, np.float32)
        found: dict[tuple[int, int], list[float]] = {}
        for key, value in zip(owner, raw.tolist(), strict=True):
            found.setdefault(key, []).append(value)
        return [
            [{"reward_model": self._shaped(found.get((g, i), []))} for i in range(len(group.trajectories))]
            for g, group in enumerate(groups)
        ]

    def _open(self, models: Models | None) -> None:
        self._scorer = load_scorer(
            self.path,
            None if models is None else models.policy,
            dtype=self.dtype,
            quantize=self.quantize,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            cache_dir=self.cache_dir,
        )
        title = f"the chat template of the reward model {self.path}"
        self._chat = Chat(self._scorer.tokenizer, title=title) if self.retokenize else None

    def _shaped(self, scores: Sequence[float]) -> float:
        if not scores:
            return 0.0  # an attempt without a single token
        value = (float(np.mean(scores)) - self.center) * self.scale
        return value if self.clip is None else min(max(value, -self.clip), self.clip)

    def _conversations(self, trajectory: Trajectory) -> list[Ids]:
        """Tokens of every unbroken conversation of the trajectory, in the reward model's vocabulary."""
        if self._chat is not None:
            return [self._rendered(trajectory, self._chat)]
        parts: list[list[Any]] = []
        for turn in trajectory.turns:
            if turn.restart or not parts:
                parts.append([])
            parts[-1] += [turn.prompt_ids, turn.token_ids]
        whole = [np.concatenate(part) for part in parts]
        return [ids for ids in whole if ids.size]

    def _rendered(self, trajectory: Trajectory, chat: Chat) -> Ids:
        task, turns = trajectory.task, trajectory.turns
        if len(turns) != 1 or not task.prompt:
            what = f"{len(turns)} turns" if task.prompt else "a prompt that its environment wrote"
            raise DataError(
                f"rewards: reward_model with retokenize: true scores one reply to a task's prompt, and task "
                f"{task.id!r} has {what}; use a reward model with the policy's tokenizer."
            )
        reply = chat.reply(turns[0].text)
        if turns[0].stop_reason is StopReason.LENGTH:
            reply = reply[:-1]  # the policy didn't end its turn either
        return np.concatenate([chat.start(task.prompt), reply])


PLUGIN = RewardModel
