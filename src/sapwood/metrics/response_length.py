"""How long the replies are, and how many were cut off."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.metrics import Metric, finished
from sapwood.rewards.length import Unit, length_of
from sapwood.types import Group, StopReason


class ResponseLength(Metric):
    """Length of the replies in tokens (the end token included), characters or words."""

    unit: Unit = "tokens"

    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """{"response_length": mean, ".../max": largest, ".../cut": share that a token limit ended}; {} without a reply.

        In other units than tokens the name is "response_length_UNIT".
        """
        turns = [turn for group in finished(groups) for t in group.trajectories for turn in t.turns]
        if not turns:
            return {}
        lengths = [length_of(turn, self.unit) for turn in turns]
        cut = sum(turn.stop_reason in (StopReason.LENGTH, StopReason.CONTEXT) for turn in turns)
        name = "response_length" + ("" if self.unit == "tokens" else f"_{self.unit}")
        return {
            name: sum(lengths) / len(lengths),
            f"{name}/max": float(max(lengths)),
            f"{name}/cut": cut / len(turns),
        }


PLUGIN = ResponseLength
