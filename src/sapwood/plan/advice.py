"""What to change where a run doesn't fit: options, each tried by planning again with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sapwood.config import Recipe, parse_recipe
from sapwood.errors import SapwoodError
from sapwood.models.load import pick_device
from sapwood.plan.machine import Room
from sapwood.plan.making import Plan, Survey, of_survey
from sapwood.plan.workload import nodes
from sapwood.sections import LoraSection


@dataclass(frozen=True)
class Change:
    """Options to set, as on the command line, and what they cost. rebuilds: the models are others with them."""

    settings: Mapping[str, Any]
    price: str
    rebuilds: bool = False

    def __str__(self) -> str:
        return " ".join(f"{key}={_written(value)}" for key, value in self.settings.items())


def advise(survey: Survey, made: Plan) -> tuple[str, ...]:
    """Sentences, one a change that makes the plan fit; or changes together, or what is missing."""
    assert made.room is not None
    space = made.room
    tried: list[tuple[Change, Plan]] = []
    for change in _changes(survey, space):
        found = _with(survey, (change,), space)
        if found is not None and _need(found) < 0.98 * _need(made):
            tried.append((change, found))
    alone = [_sentence(str(change), found, change.price) for change, found in tried if _need(found) <= space.bytes]
    if alone:
        return tuple(alone)
    return _together(survey, [change for change, _ in tried], space)


def _need(made: Plan) -> int:
    return made.at_most


def _together(survey: Survey, changes: list[Change], space: Room) -> tuple[str, ...]:
    """As few of the changes as are needed, the cheapest first, each made beside those before it."""
    used: list[Change] = []
    best: Plan | None = None
    for change in changes:
        if any(set(change.settings) & set(other.settings) for other in used):
            continue
        found = _with(survey, (*used, change), space)
        if found is None or (best is not None and _need(found) >= _need(best)):
            continue
        used, best = [*used, change], found
        if _need(found) <= space.bytes:
            prices = "; ".join(dict.fromkeys(each.price for each in used))
            return (_sentence(" ".join(map(str, used)), found, prices),)
    if best is None:
        return ("No option makes it smaller: choose a smaller model.name, or a machine with more memory.",)
    told = size(_need(best))
    return (f"Even with {' '.join(map(str, used))} it needs {told}: choose a smaller model.name, or a larger machine.",)


def _sentence(setting: str, found: Plan, price: str) -> str:
    return f"With {setting} it needs {size(_need(found))} ({price})."


def size(count: int) -> str:
    """Bytes in binary units: MiB below 1 GiB, GiB with one decimal above."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _with(survey: Survey, changes: tuple[Change, ...], space: Room) -> Plan | None:
    """The plan with these changes, or None where the recipe doesn't take them."""
    try:
        recipe = _changed(survey.recipe, {k: v for change in changes for k, v in change.settings.items()})
        if any(change.rebuilds for change in changes):
            return of_survey(Survey.of(recipe), space)
        return of_survey(Survey.made(recipe, survey.parts, survey.sizes.runtime), space)
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
    for maker in (_token_budget, _checkpointing, _engine, _snapshot, _half, _adapters, _quantised):
        yield from maker(survey, space)


def _token_budget(survey: Survey, space: Room) -> Iterator[Change]:
    """The largest power of two that leaves room, never below what can't be split."""
    work, memory = survey.work, survey.memory
    if not work.largest:
        return
    least = max(len(row.token_ids) for step in work.steps for micro in step.scoring for row in micro)
    if survey.parts.algorithm.atomic:
        units: dict[int, list[Any]] = {}
        for row in work.largest:
            units.setdefault(row.group, []).append(row)
        least = max(least, *map(nodes, units.values()))
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
    if least < min(work.at_most, survey.recipe.optim.token_budget):
        yield Change({"optim.token_budget": least}, "the same gradients, from smaller parts")


def _checkpointing(survey: Survey, space: Room) -> Iterator[Change]:
    if not survey.recipe.model.gradient_checkpointing:
        price = "the same gradients; learning takes about a third longer"
        yield Change({"model.gradient_checkpointing": True}, price, rebuilds=True)


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
    if pick_device(model.device).type == "cpu" and model.dtype in ("auto", "float32") and model.quantize == "none":
        yield Change({"model.dtype": "bfloat16"}, "coarser numbers, and slower on many CPUs", rebuilds=True)


def _adapters(survey: Survey, space: Room) -> Iterator[Change]:
    if survey.recipe.model.lora is None:
        settings = {"model.lora": {"rank": LoraSection().rank}}
        price = "adapters learn in place of all weights, and want a learning rate 10 to 100 times as large"
        yield Change(settings, price, rebuilds=True)


def _quantised(survey: Survey, space: Room) -> Iterator[Change]:
    if survey.recipe.model.quantize == "none" and survey.recipe.model.lora is not None:
        for kind in ("8bit", "4bit"):
            yield Change({"model.quantize": kind}, "a coarser base; needs bitsandbytes", rebuilds=True)
