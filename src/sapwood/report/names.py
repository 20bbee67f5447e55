"""Where a metric stands in the page, what it is called there and what it means.

Meanings and units are those of `sapwood.metricnames`; a name that nobody knows is shown as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.metricnames import described

GROUPS = (
    "Reward and return",
    "Loss",
    "Policy health",
    "Critic",
    "Preference",
    "Optimiser",
    "Data",
    "Speed",
    "Other",
)
#: Held-out figures that say how good a model is, the first that was measured counts; True where more is better.
HEADLINES: tuple[tuple[str, bool], ...] = (
    ("eval/return", True),
    ("eval/win_rate", True),
    ("eval/accuracy", True),
    ("eval/loss", False),
    ("eval/nll", False),
    ("eval/perplexity", False),
)

_KNOWN: dict[str, dict[str, str]] = {
    "Reward and return": {
        "reward": "Reward, mean",
        "return": "Return",
        "low": "Return, lower bound",
        "high": "Return, upper bound",
        "reward_std": "Reward, spread over the batch",
        "reward_group_std": "Reward, spread within groups",
        "no_signal_share": "Groups of equal rewards",
        "returns": "Returns that the critic learns",
        "win_rate": "Win rate",
        "reward_scale": "Reward scale",
    },
    "Loss": {
        "loss": "Loss",
        "policy_loss": "Policy loss",
        "preference_loss": "Preference loss",
        "nll": "Negative log-likelihood",
        "perplexity": "Perplexity",
    },
    "Policy health": {
        "entropy": "Entropy",
        "entropy_coef": "Entropy coefficient",
        "kl": "KL to the reference",
        "kl_coef": "KL coefficient",
        "kl_penalty": "KL penalty",
        "approx_kl": "KL of the update",
        "js": "Jensen-Shannon term",
        "ratio": "Probability ratio",
        "clip_range": "Clip range",
        "clip_fraction_low": "Clipped below",
        "clip_fraction_high": "Clipped above",
        "clip_fraction_dual": "Clipped twice",
        "gap_k1": "Sampler-trainer gap (k1)",
        "gap_k3": "Sampler-trainer gap (k3)",
        "gap_weight": "Gap correction, mean weight",
        "cut_share": "Replies cut at the token limit",
        "parse_failed_share": "Replies not parsed",
        "fallback_share": "Fallback actions",
        "distinct_replies": "Attempts that differ",
        "distinct_2": "Distinct pairs of tokens",
        "parsed": "Replies parsed",
        "fallback": "Fallback actions",
        "advantages": "Advantages, mean",
        "advantages_std": "Advantages, spread",
    },
    "Critic": {
        "value_loss": "Value loss",
        "values": "Values, mean",
        "explained_variance": "Explained variance",
        "value_clip_fraction": "Values clipped",
    },
    "Preference": {
        "accuracy": "Preference accuracy",
        "margin": "Reward margin",
        "reward_chosen": "Reward of the chosen",
        "reward_rejected": "Reward of the rejected",
        "logprob_chosen": "Log-probability of the chosen",
        "logprob_rejected": "Log-probability of the rejected",
        "nll_chosen": "Negative log-likelihood of the chosen",
        "desirable_share": "Desirable records",
    },
    "Optimiser": {
        "learning_rate": "Learning rate",
        "critic_learning_rate": "Learning rate of the critic",
        "grad_norm": "Gradient norm",
        "updates": "Updates a step",
        "loss_scale": "Loss scale",
        "skipped_updates": "Updates left out",
    },
    "Data": {
        "reply_tokens": "Reply length",
        "epoch": "Epoch",
        "trajectories": "Trajectories",
        "failed_share": "Failed episodes",
        "truncated_share": "Truncated episodes",
        "dropped_records": "Records left out",
        "incomplete_share": "Incomplete records",
    },
    "Speed": {
        "tokens_per_second": "Tokens a second",
        "trained_tokens_per_second": "Trained tokens a second",
        "sampled_tokens": "Sampled tokens",
        "tokens": "Tokens",
        "sampling_seconds": "Sampling",
        "learning_seconds": "Learning",
        "loading_seconds": "Loading",
        "evaluation_seconds": "Evaluation",
        "checkpoint_seconds": "Waiting for checkpoints",
    },
}
_BY_NAME = {name: (group, title) for group, known in _KNOWN.items() for name, title in known.items()}
#: Parts of names of metrics that aren't listed above, in the order in which they are tried.
_HINTS: tuple[tuple[str, str], ...] = (
    ("seconds", "Speed"),
    ("per_second", "Speed"),
    ("memory", "Speed"),
    ("chosen", "Preference"),
    ("rejected", "Preference"),
    ("pass@", "Reward and return"),
    ("win_rate", "Reward and return"),
    ("reward", "Reward and return"),
    ("value", "Critic"),
    ("critic", "Critic"),
    ("loss", "Loss"),
    ("kl", "Policy health"),
    ("entropy", "Policy health"),
    ("clip", "Policy health"),
    ("ratio", "Policy health"),
    ("grad", "Optimiser"),
    ("rate", "Optimiser"),
    ("response_length", "Data"),
    ("distinct", "Data"),
    ("tokens", "Data"),
    ("share", "Data"),
)


#: Units that say more than the title does.
_UNITS = ("nats a token", "nats a reply", "tokens", "tokens/s", "s", "passes")


@dataclass(frozen=True)
class Place:
    """group: one of GROUPS; title: for people; rank: order within the group; unit, meaning, healthy: "" if unknown."""

    group: str
    title: str
    rank: int
    unit: str = ""
    meaning: str = ""
    healthy: str = ""


def place(name: str, speed: bool = False) -> Place:
    """Where a metric belongs; "eval/X" belongs with X. speed: it comes from timing.jsonl."""
    group, title, rank = _standing(name.removeprefix("eval/"))
    info = described(name)
    if info is None:
        return Place("Speed" if speed else group, title, rank)
    unit = info.unit.partition(";")[0]
    shown = unit if unit in _UNITS else ""
    return Place("Speed" if speed else group, title, rank, shown, info.meaning, info.healthy)


def _standing(bare: str) -> tuple[str, str, int]:
    """(group, title, rank) of a name without "eval/"."""
    if bare in _BY_NAME:
        return *_BY_NAME[bare], list(_BY_NAME).index(bare)
    if bare.startswith("reward/"):
        return "Reward and return", f"Reward part {bare.removeprefix('reward/')}", len(_BY_NAME)
    group = next((group for hint, group in _HINTS if hint in bare.lower()), "Other")
    return group, bare, len(_BY_NAME) + 1
