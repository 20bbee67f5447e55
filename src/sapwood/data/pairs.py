"""Scored rollouts -> preference pairs: what a model did best and worst on the same task.

sapwood rollout recipe.yaml --split train --tasks 500 --out rollouts.jsonl
sapwood data pairs rollouts.jsonl --out pairs.jsonl
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.errors import ConfigError, DataError, StorageError
from sapwood.paths import replacing


@dataclass(frozen=True)
class PairCounts:
    """tasks: groups read; pairs: written; even: groups whose rewards don't differ enough to say what is better."""

    tasks: int
    pairs: int
    even: int


def write_pairs(
    rollouts: Path,
    out: Path,
    *,
    per_task: int = 1,
    min_gap: float = 0.0,
    answers: bool = False,
    shuffle: bool = False,
    seed: int = 0,
) -> PairCounts:
    """Write {prompt, chosen, rejected, chosen_reward, rejected_reward} lines, at most `per_task` of a group.

    The first pair of a group is a reply of the highest reward and one of the lowest, drawn by the seed among equals;
    further pairs are drawn from all whose rewards differ by more than min_gap. Equal texts are never paired.

    answers: the task's own answer joins the replies, with a reward of 1. shuffle: which of the two is chosen is a
    coin's throw, for the twin of an experiment, from which nothing can be learnt. Raises DataError for a line that
    isn't a single-turn rollout, StorageError where `out` can't be written.
    """
    if per_task < 1 or not 0 <= min_gap < math.inf:
        raise ConfigError("pairs of a task must be at least 1, and the gap of their rewards not negative.")
    rng = np.random.default_rng(seed)
    tasks = pairs = even = 0
    try:
        with replacing(out) as file:
            for _, members in groupby(_rollouts(rollouts), key=lambda record: (record["group"], record["task"])):
                tried = list(members)
                if answers and tried[0].get("answer") is not None:
                    tried.append(
                        {**tried[0], "reward": 1.0, "error": None, "turns": [{"reply": str(tried[0]["answer"])}]}
                    )
                found = _pairs(tried, per_task, min_gap, rng)
                if shuffle:
                    found = [_swapped(pair) if rng.random() < 0.5 else pair for pair in found]
                tasks, pairs, even = tasks + 1, pairs + len(found), even + (not found)
                file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found)
    except OSError as error:
        raise StorageError(f"{out}: can't be written ({error.strerror or error}).") from error
    return PairCounts(tasks, pairs, even)


def _rollouts(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _rollout(line, f"{path} line {number}")
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror or error}); give a file of `sapwood rollout`."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; give a file of `sapwood rollout`.") from error


def _rollout(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter, and numbers of thousands of digits, aren't damage
        said = getattr(error, "msg", None) or str(error)
        raise DataError(f"{where}: not JSON ({said}); give a file of `sapwood rollout`.") from error
    if not isinstance(record, dict) or not {"group", "task", "reward", "turns", "messages"} <= record.keys():
        raise DataError(f"{where}: not a rollout (a rollout has task, group, reward, messages and turns).")
    problem = _wrong(record)
    if problem is not None:
        raise DataError(f"{where}: not a rollout, {problem}; give a file of `sapwood rollout`.")
    if len(record["turns"]) > 1 or not record["messages"]:
        raise DataError(
            f"{where}: only single-turn rollouts on given prompts can be paired; this one is of another kind."
        )
    return record


def _wrong(record: Mapping[str, Any]) -> str | None:
    """What in a rollout isn't of its type, or None."""
    reward, turns, messages = record["reward"], record["turns"], record["messages"]
    if record.get("error") is None and not _is_finite(reward):
        return "its reward is no number"
    if not isinstance(turns, list) or not all(isinstance(t, dict) and _is_text(t.get("reply")) for t in turns):
        return "its turns are no list of replies"
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content")) for m in messages
    ):
        return "its messages have no role and content"
    if isinstance(record.get("answer"), list | dict | str) and not _is_text(str(record["answer"])):
        return "its answer is no text"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_text(value: Any) -> bool:
    """Whether it can be written as UTF-8: half of a surrogate pair can't."""
    return isinstance(value, str) and (value.isascii() or value.encode("utf-8", "ignore").decode() == value)


def _pairs(
    members: Sequence[dict[str, Any]], per_task: int, min_gap: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    valid = [m for m in members if m.get("error") is None and m["turns"]]
    order = [valid[i] for i in rng.permutation(len(valid))]
    by_reward = sorted(order, key=lambda m: -m["reward"])
    found: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    extremes = [(by_reward[0], by_reward[-1])] if by_reward else []
    for better, worse in [*extremes, *((a, b) for a in order for b in reversed(order))]:
        texts = better["turns"][0]["reply"], worse["turns"][0]["reply"]
        if better["reward"] - worse["reward"] <= min_gap or texts[0] == texts[1] or texts in seen:
            continue
        if not (texts[0].strip() and texts[1].strip()):
            continue
        seen.add(texts)
        rewards = {"chosen_reward": better["reward"], "rejected_reward": worse["reward"]}
        found.append({"prompt": better["messages"], "chosen": texts[0], "rejected": texts[1], **rewards})
        if len(found) == per_task:
            break
    return found


def _swapped(pair: dict[str, Any]) -> dict[str, Any]:
    sides = {"chosen": "rejected", "rejected": "chosen"}
    sides |= {f"{a}_reward": f"{b}_reward" for a, b in sides.items()}
    return {**pair, **{a: pair[b] for a, b in sides.items()}}
