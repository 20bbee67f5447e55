"""Guards: a run that watches its own metrics and says, by name, what goes wrong and what to try.

    watch = Watch.of(recipe, algorithm.learns_from)
    for alarm in watch.see(step, metrics):
        run.log_warning(alarm.record())
        if alarm.stop: ...

A pure function of the metrics: no clock, no random number. `state` and `load_state` carry it over a resume, so that a
run that was killed warns as one that wasn't. docs/guards.md describes every warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sapwood.guards._checks import CHECKS, Finding
from sapwood.guards._history import History
from sapwood.guards._remedies import remedies_of
from sapwood.guards._replies import reply_metrics
from sapwood.sections import GuardsSection, WarningName

if TYPE_CHECKING:
    from sapwood.config import Recipe

__all__ = ["AGAIN", "CLEARED", "Alarm", "Watch", "reply_metrics"]

#: A warning that lasts is told again after so many steps.
AGAIN = 100
#: Steps without its cause after which a warning is over, and may be raised anew.
CLEARED = 10


@dataclass(frozen=True)
class Alarm:
    """A named warning of one step. metrics: the values that the message speaks of; stop: the run should end here."""

    step: int
    name: WarningName
    message: str
    remedies: tuple[str, ...]
    metrics: dict[str, float]
    stop: bool = False

    def record(self) -> dict[str, Any]:
        """A line of warnings.jsonl."""
        return {
            "step": self.step,
            "name": self.name,
            "message": self.message,
            "remedies": list(self.remedies),
            "metrics": dict(self.metrics),
        }

    def sentence(self) -> str:
        """One line for the log: name, message and the first remedy."""
        first = f" Try: {self.remedies[0]}." if self.remedies else ""
        return f"{self.name} at step {self.step}: {self.message}{first}"

    def reason_to_stop(self) -> str:
        """The sentence with which a run ends because of it."""
        tried = "; ".join(self.remedies)
        return (
            f"step {self.step}: stopped by guards.stop_on: {self.name}: {self.message} What may help: {tried}. To go "
            f"on all the same, remove {self.name} from guards.stop_on and resume."
        )


class Watch:
    """Sees every step's metrics and raises warnings. options: the recipe's, by dotted name ("optim.max_gap")."""

    def __init__(self, section: GuardsSection, learns_from: str, options: Mapping[str, Any] | None = None) -> None:
        self.section = section
        self._options = dict(options or {})
        self._history = History(learns_from, self._options)
        # By name: the step it was last told at, and the last one at which its cause was there.
        self._raised: dict[str, tuple[int, int]] = {}

    @staticmethod
    def of(recipe: Recipe, learns_from: str) -> Watch:
        """The watch of a recipe whose algorithm learns from this kind of group."""
        return Watch(recipe.guards, learns_from, flat(recipe.model_dump(mode="json")))

    def see(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in a step's metrics, evaluations among them (step 0: those before training); what is newly wrong.

        A warning is told when its cause appears, every AGAIN steps while it lasts, and anew once it was gone for
        CLEARED steps.
        """
        self._history.add(step, metrics)
        alarms = []
        for name, (kinds, check) in CHECKS.items():
            if name in self.section.off or self._history.learns_from not in kinds:
                continue
            finding = check(self._history, self.section.limits)
            if finding is not None and self._tell(name, step):
                alarms.append(self._alarm(step, name, finding))
        return alarms

    def _tell(self, name: str, step: int) -> bool:
        """Whether a cause that is there at this step is to be told."""
        told, there = self._raised.get(name, (step - AGAIN, step - CLEARED - 1))
        due = step - there > CLEARED or step - told >= AGAIN
        self._raised[name] = (step if due else told, step)
        return due

    def _alarm(self, step: int, name: WarningName, finding: Finding) -> Alarm:
        metrics = {key: value for key, value in finding.metrics.items() if math.isfinite(value)}
        remedies = remedies_of(name, self._options)
        return Alarm(step, name, finding.message, remedies, metrics, stop=name in self.section.stop_on)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on watching, as plain values that JSON can hold."""
        return {"history": self._history.state(), "raised": {name: list(at) for name, at in self._raised.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._history.load_state(state["history"])
        self._raised = {name: (int(told), int(there)) for name, (told, there) in state["raised"].items()}


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name: {"optim": {"eps": 1}} as {"optim.eps": 1}."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
