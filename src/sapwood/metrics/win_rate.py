"""How often a reward model prefers the policy's reply to an opponent's: the win rate on held-out tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from sapwood import plugins
from sapwood.errors import ConfigError, DataError
from sapwood.metrics import Metric, finished
from sapwood.rewards import Reward
from sapwood.types import Group, Ids, StopReason, Task, Trajectory, Turn

_Z = 1.959963984540054  # the normal distribution's 0.975 quantile


class WinRate(Metric):
    """Share of comparisons that the policy wins against an opponent's replies to the same tasks, ties counted half.

    against: a JSONL file of the opponent's replies, as `sapwood generate` writes them (matched by the text of the
    prompt's last message) or `sapwood rollout` (matched by task). reward_model: the path of the reward model that
    judges; or judge: any entry as under `rewards` ({name: "judge.py:shorter"}). Where a task has several replies on a
    side, every pair is compared. n: the policy's attempts a task. tie: scores closer than this are a tie.
    """

    against: Path
    reward_model: str | None = None
    judge: dict[str, Any] | None = None
    n: int = Field(default=1, ge=1)
    tie: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    _judge: Reward | None = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_judge(self) -> WinRate:
        if (self.reward_model is None) == (self.judge is None):
            raise ValueError("give either reward_model (a path) or judge (a reward: {name: ...})")
        if self.judge is not None and not isinstance(self.judge.get("name"), str):
            raise ValueError("judge must name a reward: {name: ..., options}")
        return self

    @property
    def attempts(self) -> int:
        """n."""
        return self.n

    def bind(self, models: Any) -> None:
        """Load the judge. Raises ConfigError or ModelError where it can't be loaded, DataError for a bad file."""
        _read(self.against)
        options = {"name": "reward_model", "path": self.reward_model} if self.judge is None else dict(self.judge)
        cls = plugins.load("reward", options.pop("name"))
        if not (isinstance(cls, type) and issubclass(cls, Reward)):
            raise ConfigError("eval.metrics win_rate: judge does not name a reward.")
        try:
            self._judge = cls.model_validate(options)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"eval.metrics win_rate: the judge's options: {said}.") from error
        self._judge.bind(models)
        self._tokenizer = models.policy.tokenizer

    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """{"win_rate": 0..1, ".../lo", ".../hi": its 95 % interval, ".../ties": share, ".../tasks": number compared}.

        The interval is Wilson's, over tasks. Raises DataError where no task has an opponent's reply.
        """
        if self._judge is None:
            raise ConfigError("win_rate has to be bound to the run's models (bind) before it can compare.")
        ours, theirs = [], []
        by_task, by_prompt = _read(self.against)
        end = _end_of_turn(groups)
        for group in finished(groups):
            replies = by_task.get(group.task.id) or by_prompt.get(_question(group.task)) or ()
            if replies:
                ours.append(group)
                theirs.append(self._opponent(group, replies, end))
        if not ours:
            raise DataError(
                f"{self.against}: none of its replies is to one of the held-out tasks: make it on the same tasks, with "
                "the same seed, by `sapwood rollout` or `sapwood generate`."
            )
        results = [
            self._results(_totals(a), _totals(b))
            for a, b in zip(self._judge.score(ours), self._judge.score(theirs), strict=True)
        ]
        rate = float(np.mean([wins.mean() for wins in results]))
        low, high = wilson(rate, len(results))
        ties = float(np.mean([(wins == 0.5).mean() for wins in results]))
        return {
            "win_rate": rate,
            "win_rate/lo": low,
            "win_rate/hi": high,
            "win_rate/ties": ties,
            "win_rate/tasks": float(len(results)),
        }

    def _opponent(self, group: Group, replies: Sequence[str], end: Ids) -> Group:
        """The opponent's replies as trajectories after the same prompt tokens; end [0 or 1]: closes their turns."""
        prompts = [t.turns[0].prompt_ids for t in group.trajectories if len(t.turns) == 1]
        if len(prompts) != len(group.trajectories):
            raise DataError(f"eval.metrics win_rate compares single replies, but task {group.task.id!r} has turns.")
        return Group(group.task, [Trajectory(group.task, [self._turn(prompts[0], text, end)]) for text in replies])

    def _turn(self, prompt_ids: Ids, text: str, end: Ids) -> Turn:
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        none = np.zeros(0, np.float32)
        return Turn(prompt_ids, np.concatenate([np.array(ids, np.int64), end]), none, none, StopReason.EOS, text)

    def _results(self, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """[ours x theirs]: 1 won, 0.5 tied, 0 lost."""
        margin = ours[:, None] - theirs[None, :]
        return np.where(np.abs(margin) <= self.tie, 0.5, (margin > 0).astype(float))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent trials (1927); ties make it wider than need be."""
    spread = _Z * math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))
    centre, scale = rate + _Z**2 / (2 * n), 1 + _Z**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _totals(members: Sequence[Mapping[str, float]]) -> np.ndarray:
    return np.array([sum(parts.values()) for parts in members])


def _question(task: Task) -> str | None:
    return task.prompt[-1].content if task.prompt else None


def _end_of_turn(groups: Sequence[Group]) -> Ids:
    """The token that ended a reply of the policy, [1]; [0] where none ended by itself."""
    turns = (turn for group in groups for t in group.trajectories for turn in t.turns)
    ended = (turn.token_ids[-1:] for turn in turns if turn.stop_reason is StopReason.EOS and turn.token_ids.size)
    return next(ended, np.zeros(0, np.int64))


def _read(path: Path) -> tuple[dict[str, list[str]], dict[str | None, list[str]]]:
    """Replies by task id and by the prompt's last message. Raises DataError naming the line."""
    by_task: dict[str, list[str]] = {}
    by_prompt: dict[str | None, list[str]] = {}
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}; check win_rate's against.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "turns" in record:
                # An episode that failed before its first reply has none to compare.
                by_task.setdefault(record["task"], []).extend(str(turn["reply"]) for turn in record["turns"][-1:])
            else:
                prompt = record["prompt"]
                last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                by_prompt.setdefault(last, []).append(str(record["reply"]))
        except (ValueError, LookupError, TypeError) as error:
            said = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{path} line {number}: not a reply as `sapwood generate` or `sapwood rollout` writes it "
                f"({said}); make the file by one of them."
            ) from error
    return by_task, by_prompt


PLUGIN = WinRate
