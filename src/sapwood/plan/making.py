"""`plan`: from a recipe to what its run needs, whether that fits, and what to change where it doesn't."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sapwood.config import Recipe
from sapwood.models.forward import causal_lm
from sapwood.models.load import outlines, pick_device
from sapwood.models.role import recompute_contexts
from sapwood.parts import Parts, build
from sapwood.plan.machine import Room, resident, room
from sapwood.plan.memory import Memory, Parameters, Sizes, passes_of, sizes
from sapwood.plan.passes import Pass, Passes
from sapwood.plan.timing import Time, estimate
from sapwood.plan.workload import Workload, nodes, workload
from sapwood.progress import Progress

#: An estimate within this share of the room may be wrong either way.
MARGIN = 0.15


@dataclass(frozen=True)
class Survey:
    """A run's parts without weights, and what was found out about them."""

    recipe: Recipe
    parts: Parts
    work: Workload
    sizes: Sizes
    found: Mapping[str, Pass]

    @staticmethod
    def of(recipe: Recipe, progress: Progress | None = None) -> Survey:
        """Build them. Raises SapwoodError as `sapwood train` would."""
        with outlines(), warnings.catch_warnings():
            # The weights of adapters' files go nowhere here, as they should.
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            parts = build(recipe, recipe.run.dir, progress or Progress(stream=io.StringIO()))
            return Survey.made(recipe, parts, resident())

    @staticmethod
    def made(recipe: Recipe, parts: Parts, runtime: int, before: Survey | None = None) -> Survey:
        """What a recipe makes of parts that are there already. runtime: bytes of the process before any weight;
        before: a survey whose passes are those of this recipe too."""
        with outlines():
            device = pick_device(recipe.model.device).type
            work = workload(recipe, parts) if before is None else before.work
            found = passes_of(parts, work, Passes(parts.models, device)) if before is None else before.found
            return Survey(recipe, parts, work, sizes(recipe, parts, work, device, runtime), found)

    def changed(self, recipe: Recipe) -> Survey:
        """The survey of a recipe that differs in some options; what they leave as it is isn't done again."""
        asked, now = recipe.model, self.recipe.model
        free = {"quantize": now.quantize, "gradient_checkpointing": now.gradient_checkpointing}
        if asked.model_copy(update=free) != now:
            return Survey.of(recipe)
        runtime = self.sizes.runtime
        if recipe.optim == self.recipe.optim and asked.gradient_checkpointing == now.gradient_checkpointing:
            return Survey.made(recipe, self.parts, runtime, self)
        _checkpoint(self.parts, asked.gradient_checkpointing)
        try:
            return Survey.made(recipe, self.parts, runtime)
        finally:
            _checkpoint(self.parts, now.gradient_checkpointing)

    @property
    def memory(self) -> Memory:
        """Parts by phase, as far as the samples tell."""
        return self.sizes.memory(self.found)

    @property
    def at_most(self) -> int:
        """Bytes at the peak where replies or records get as long as they may."""
        largest = nodes(self.work.largest) if self.work.largest else 0
        stretch = max(self.work.at_most / largest, 1.0) if largest else 1.0
        return self.sizes.memory(self.found, stretch).peak


def _checkpoint(parts: Parts, wanted: bool) -> None:
    """Switch gradient checkpointing, as `load_policy` does it."""
    critic = parts.models.critic
    for policy in (parts.policy, *((critic.policy,) if critic is not None else ())):
        model = causal_lm(policy.model)
        if wanted:
            how = {"use_reentrant": False, "context_fn": recompute_contexts}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        else:
            model.gradient_checkpointing_disable()


@dataclass(frozen=True)
class Plan:
    """What a run needs. at_most: bytes at the peak where replies or records get as long as they may; room: what there
    is, or None where the system doesn't say; time: None on a GPU, and where it wasn't asked for.

    tokens: distinct ones of micro-batches (typical, largest, at most, budget). advice: sentences, where it doesn't fit.
    """

    device: str
    parameters: Parameters
    memory: Memory
    at_most: int
    room: Room | None
    tokens: Mapping[str, int]
    time: Time | None = None
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> Literal["yes", "maybe", "no", "unknown"]:
        """Whether the memory is there; maybe: the longest replies or records, or the plan's own error, decide."""
        if self.room is None:
            return "unknown"
        if self.memory.peak > self.room.bytes:
            return "no"
        return "yes" if max(self.at_most, (1 + MARGIN) * self.memory.peak) <= self.room.bytes else "maybe"


def plan(recipe: Recipe, progress: Progress | None = None, *, timed: bool = True, space: Room | None = None) -> Plan:
    """Plan a run. timed: measure this CPU for a second or two to tell the time; space: the memory that there is, in
    place of this machine's. Raises SapwoodError as `sapwood train` would, before it loads a weight."""
    from sapwood.plan.advice import advise

    survey = Survey.of(recipe, progress)
    device = pick_device(recipe.model.device)
    made = of_survey(survey, space or room(device))
    if made.fits in ("no", "maybe"):
        if progress is not None:
            progress.phase("looking for options that fit")
        made = replace(made, advice=advise(survey, made))
    if timed and device.type == "cpu" and survey.work.largest:
        made = replace(made, time=estimate(recipe, survey.parts, survey.work, survey.found))
    return made


def of_survey(survey: Survey, space: Room | None) -> Plan:
    """A plan without time and advice."""
    typical = [nodes(micro) for update in survey.work.typical.updates for micro in update]
    tokens = {
        "typical": max(typical, default=0),
        "largest": nodes(survey.work.largest) if survey.work.largest else 0,
        "at_most": survey.work.at_most,
        "budget": survey.recipe.optim.token_budget,
    }
    device = survey.sizes.device
    return Plan(device, Parameters.of(survey.parts), survey.memory, survey.at_most, space, tokens)


def warning(recipe: Recipe) -> str | None:
    """One line where a run's plan clearly doesn't fit this machine's memory, else None; nothing is timed.

    For `sapwood train`, before it loads a weight: what a CPU's memory can't hold ends with the kernel's killer, which
    leaves no message. Costs what building the parts without weights costs.
    """
    if pick_device(recipe.model.device) != torch.device("cpu"):
        return None
    made = of_survey(Survey.of(recipe), room(torch.device("cpu")))
    if made.fits != "no":
        return None
    from sapwood.plan.show import needs

    return f"{needs(made)}; the kernel may end the run. `sapwood train ... --plan` says what to change."
