"""What the guards want to know of the replies themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapwood.types import Group, Ids, StopReason


def reply_metrics(groups: Sequence[Group], sampled: bool = True) -> dict[str, float]:
    """Metrics of a batch's replies, failed trajectories included.

    reply_tokens: mean length; sampled (rollouts): also cut_share, of replies that a token limit ended; distinct_2, of
    distinct bigrams of tokens in all bigrams; distinct_replies, of different attempts at a task, where there are
    several; parse_failed_share and fallback_share, of the replies that the environment parsed.
    """
    turns = [turn for group in groups for trajectory in group.trajectories for turn in trajectory.turns]
    metrics = {"reply_tokens": sum(turn.token_ids.size for turn in turns) / max(len(turns), 1)}
    if not (sampled and turns):
        return metrics
    cut = [turn.stop_reason in (StopReason.LENGTH, StopReason.CONTEXT) for turn in turns]
    metrics["cut_share"] = float(np.mean(cut))
    pairs = np.concatenate([_bigrams(turn.token_ids) for turn in turns])
    if pairs.size:
        metrics["distinct_2"] = len(np.unique(pairs)) / pairs.size
    different = [_different(group) for group in groups if len(group.trajectories) > 1]
    if different:
        metrics["distinct_replies"] = float(np.mean(different))
    parsed = [turn.info["parsed"] == "failed" for turn in turns if "parsed" in turn.info]
    if parsed:
        metrics["parse_failed_share"] = float(np.mean(parsed))
    fallback = [bool(turn.info["fallback"]) for turn in turns if "fallback" in turn.info]
    if fallback:
        metrics["fallback_share"] = float(np.mean(fallback))
    return metrics


def _bigrams(ids: Ids) -> Ids:
    """Each pair of neighbouring tokens as one number."""
    return ids[:-1] << 32 | ids[1:]


def _different(group: Group) -> float:
    """0 where all attempts say the same, 1 where no two do."""
    said = {b"|".join(turn.token_ids.tobytes() for turn in t.turns) for t in group.trajectories}
    return (len(said) - 1) / (len(group.trajectories) - 1)
