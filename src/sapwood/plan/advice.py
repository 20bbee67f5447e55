"""What to change where a run doesn't fit: options, each tried by planning again with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.config import Recipe, parse_recipe
from sapwood.errors import SapwoodError
from sapwood.memory import largest_unit
from sapwood.models.load import pick_device
from sapwood.plan.machine import Room
from sapwood.plan.making import Plan, Survey, of_survey
from sapwood.plan.workload import nodes
from sapwood.sections import LoraSection

#: Changes that are made together before a smaller model is the better advice.
DEPTH = 3


@dataclass(frozen=True)
class Change:
    """Options to set, as on the command line, and what they cost."""

    settings: Mapping[str, Any]
    price: str

    def __str__(self) -> str:
        return " ".join(f"{key}={_written(value)}" for key, value in self.settings.items())


def advise(survey: Survey, made: Plan) -> tuple[str, ...]:
    """Sentences, one a change that makes the plan fit; or changes together, or what is missing."""
    assert made.room is not None
    space, helping = made.room, []
    for change in _changes(survey, space):
        found = _with(survey, change, space)
        if found is not None and found.at_most < 0.98 * made.at_most:
            helping.append((change, found))
    alone = [(change, found) for change, found in helping if found.at_most <= space.bytes]
    if alone:
        return tuple(_sentence([change], found) for change, found in alone)
    return (_together(survey, made, helping, space),)


def _together(survey: Survey, made: Plan, helping: Sequence[tuple[Change, Plan]], space: Room) -> str:
    """Several changes: the one that saves most, and so on from there, until another makes it fit."""
    used: list[Change] = []
    while helping and len(used) < DEPTH:
        change, made = min(helping, key=lambda pair: pair[1].at_most)
        used.append(change)
        survey = survey.changed(_changed(survey.recipe, change.settings))
        helping = []
        for other in _changes(survey, space):
            found = _with(survey, other, space)
            if found is not None and found.at_most <= space.bytes:
                return _sentence([*used, other], found)
            if found is not None and found.at_most < 0.98 * made.at_most:
                helping.append((other, found))
    if not used:
        return "No option makes it smaller: choose a smaller model.name, or a machine with more memory."
    told = f"Even with {_settings(used)} it needs {size(made.at_most)}"
    return f"{told}: choose a smaller model.name, or a machine with more memory."


def _settings(changes: Sequence[Change]) -> str:
    return " ".join(map(str, changes))


def _sentence(changes: Sequence[Change], found: Plan) -> str:
    prices = "; ".join(dict.fromkeys(change.price for change in changes))
    return f"With {_settings(changes)} it needs {size(found.at_most)} ({prices})."


def size(count: int) -> str:
    """Bytes in binary units: MiB below 1 GiB, GiB with one decimal above."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _with(survey: Survey, change: Change, space: Room) -> Plan | None:
    """The plan with this change, or None where the recipe doesn't take it."""
    try:
        return of_survey(survey.changed(_changed(survey.recipe, change.settings)), space)
    except SapwoodError:
        return None


def _changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    data = recipe.model_dump(mode="json")
    for key, value in settings.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section[part]
        section[last] = value
    return parse_recipe(data)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "'{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}'"
    return str(value)


def _changes(survey: Survey, space: Room) -> Iterator[Change]:
    """What may help, the least intrusive first."""
    for maker in (_token_budget, _checkpointing, _snapshot, _engine, _adapters, _quantised, _half):
        yield from maker(survey, space)


def _token_budget(survey: Survey, space: Room) -> Iterator[Change]:
    """The largest power of two that leaves room, never below what can't be split."""
    work, memory = survey.work, survey.memory
    if not work.largest:
        return
    micros = [micro for step in work.steps for update in step.updates for micro in update]
    least = largest_unit(micros, atomic=survey.parts.algorithm.atomic)
    moving = sum(part.at("learning") for part in memory.parts if part.name in ("activations", "kept by the allocator"))
    stays = memory.total("learning") - moving
    share = (space.bytes - stays) / max(moving, 1)
    wanted = int(nodes(work.largest) * share) if share > 0 else least
    budget = 1 << max(min(wanted, work.at_most - 1), 1).bit_length() - 1
    while budget >= least and budget >= 16:
        if budget < survey.recipe.optim.token_budget and budget < work.at_most:
            yield Change({"optim.token_budget": budget}, "the same gradients, from smaller parts")
            return
        budget //= 2
    budget = min(1 << (least - 1).bit_length(), work.at_most)
    if least <= budget < min(work.at_most, survey.recipe.optim.token_budget):
        yield Change({"optim.token_budget": budget}, "the same gradients, from smaller parts")


def _checkpointing(survey: Survey, space: Room) -> Iterator[Change]:
    if not survey.recipe.model.gradient_checkpointing:
        price = "the same gradients; learning takes about a third longer"
        yield Change({"model.gradient_checkpointing": True}, price)


def _engine(survey: Survey, space: Room) -> Iterator[Change]:
    options = survey.recipe.engine_options()
    if survey.sizes.sampler.kept:
        rows, tokens = int(options.get("max_batch", 0)), int(options.get("kv_budget_tokens", 0))
        settings = {"engine.max_batch": max(rows // 4, 1), "engine.kv_budget_tokens": max(tokens // 8, 1024)}
        yield Change(settings, "sampling takes longer")


def _snapshot(survey: Survey, space: Room) -> Iterator[Change]:
    if survey.sizes.snapshot:
        yield Change({"checkpoint.background": False}, "training waits while a checkpoint is written")


def _half(survey: Survey, space: Room) -> Iterator[Change]:
    model = survey.recipe.model
    # Weights that are trained themselves would lose small updates.
    fits = model.lora is not None and model.quantize == "none" and model.dtype in ("auto", "float32")
    if fits and pick_device(model.device).type == "cpu":
        yield Change({"model.dtype": "bfloat16"}, "coarser numbers, and slower on many CPUs")


def _adapters(survey: Survey, space: Room) -> Iterator[Change]:
    if survey.recipe.model.lora is None:
        settings = {"model.lora": {"rank": LoraSection().rank}}
        price = "adapters learn in place of all weights, and want a learning rate 10 to 100 times as large"
        yield Change(settings, price)


def _quantised(survey: Survey, space: Room) -> Iterator[Change]:
    if survey.recipe.model.quantize == "none" and survey.recipe.model.lora is not None:
        for kind in ("8bit", "4bit"):
            yield Change({"model.quantize": kind}, "a coarser base; needs bitsandbytes")
