"""A bonus for replies that differ: from the other replies to the same task, or within themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from sapwood.rewards import Reward
from sapwood.types import Group, Trajectory

_Gram = tuple[str | int, ...]


class Diversity(Reward):
    """How little of a reply is repeated, 0..1, over n-grams of its units (all replies of an episode in one).

    among "siblings": 1 minus the mean Jaccard similarity |A & B| / |A | B| of its set of n-grams with that of each
    other reply to the task; 0 for a reply that has no sibling. within "reply": distinct n-grams over all n-grams
    (distinct-n, arXiv 1510.03055); 0 for a reply shorter than n. Give it a small weight beside a reward for being
    right, as gibberish is diverse.
    """

    compare: Literal["siblings", "reply"] = "siblings"
    n: int = Field(default=2, ge=1)
    unit: Literal["words", "characters", "tokens"] = "words"

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"diversity": 0..1}."""
        return [[{"diversity": value} for value in self._values(group)] for group in groups]

    def _values(self, group: Group) -> list[float]:
        grams = [ngrams(trajectory, self.n, self.unit) for trajectory in group.trajectories]
        if self.compare == "reply":
            return [distinct_share([own]) for own in grams]
        sets = [set(own) for own in grams]
        return [_novelty(own, sets[:i] + sets[i + 1 :]) for i, own in enumerate(sets)]


def ngrams(trajectory: Trajectory, n: int, unit: str) -> list[_Gram]:
    """All n-grams of an episode's replies, none across two of them. Words are lower-cased, cut at white space."""
    grams: list[_Gram] = []
    for turn in trajectory.turns:
        text = turn.text.lower()
        units = turn.token_ids.tolist() if unit == "tokens" else text.split() if unit == "words" else list(text)
        grams += [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return grams


def distinct_share(grams: Sequence[Sequence[_Gram]]) -> float:
    """Distinct n-grams over all n-grams of several texts; 0 where there is none."""
    total = sum(len(own) for own in grams)
    return len({gram for own in grams for gram in own}) / total if total else 0.0


def _novelty(own: set[_Gram], others: Sequence[set[_Gram]]) -> float:
    if not others:
        return 0.0
    similarities = [len(own & other) / len(own | other) if own | other else 1.0 for other in others]
    return 1.0 - sum(similarities) / len(similarities)


PLUGIN = Diversity
