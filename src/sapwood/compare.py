"""Models beside each other on what no training ever saw: the base, what a run started from, and what it trained.

Tasks are played by all with the same seeds, and records are measured by the recipe's own loss, so that differences are
taken task by task and record by record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group as Stack
from rich.console import RenderableType

from sapwood import plugins
from sapwood.algorithms import Algorithm, Needs
from sapwood.config import Recipe, parse_recipe
from sapwood.data.dataset import Dataset, open_data
from sapwood.data.prompts import DataPrompts
from sapwood.data.recordings import grouper_for
from sapwood.data.section import DataSection
from sapwood.envs import EnvFamily
from sapwood.errors import ConfigError, DataError, ModelError
from sapwood.evaluate import EvalResult, EvalTable, MetricTable, Progress
from sapwood.heldout import HeldOutRecords, HeldOutTasks
from sapwood.models.load import Policy, called, find_adapter
from sapwood.models.role import BASE as WITHOUT_ADAPTER
from sapwood.models.roles import Models
from sapwood.opening import Head, Origin, build_chat, build_engine, load_policy
from sapwood.ops.batch import Forward
from sapwood.paths import expanded
from sapwood.rollout import bind_all
from sapwood.sections import ModelSection
from sapwood.source import held_out_groups
from sapwood.tree import pack
from sapwood.types import Ids, Row

BASE, START, TRAINED = "base", "start", "trained"
#: Held-out records that are measured where neither the recipe nor the call says how many.
RECORDS = 256
#: Files whose whole text is measured, and tokens that one window of it has at most.
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst"})
WINDOW = 1024
_PACKED = 8192


@dataclass(frozen=True)
class Evaluation:
    """What `run_eval` found. returns: where tasks were played; records: where data was measured."""

    returns: EvalTable | None = None
    records: MetricTable | None = None

    @property
    def tables(self) -> list[EvalTable | MetricTable]:
        """The tables there are."""
        return [table for table in (self.records, self.returns) if table is not None]

    def render(self) -> RenderableType:
        """The tables for a terminal."""
        return Stack(*(table.render() for table in self.tables))

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file: the keys of EvalTable.to_json, and `held_out` for data."""
        return {key: value for table in self.tables for key, value in table.to_json().items()}


@dataclass(frozen=True)
class _World:
    """What is measured with. family: the tasks to play, None where nothing is played; held_out: records, or None."""

    recipe: Recipe
    algorithm: Algorithm
    family: EnvFamily | None
    tasks: int
    held_out: Dataset | None
    limit: int

    @property
    def head(self) -> Head:
        """What the recipe's policy ends in."""
        return "scalar" if self.algorithm.needs.scores else "lm"


def run_eval(
    recipe: Recipe,
    adapters: Sequence[Path | str] | Path | str | None = None,
    count: int | None = None,
    progress: Progress | None = None,
    *,
    data: Path | str | None = None,
    base_name: str = BASE,
) -> Evaluation:
    """Measure a recipe's base model and what was trained from it, on held-out tasks and held-out records.

    adapters: adapters, checkpoints or runs on the recipe's model; `model.init_from` of the recipe if None, and where
    both are given, `init_from` is what they started from. count: held-out tasks or records; the recipe's eval.tasks
    and eval.max_samples if None. data: measure all records of this file in place of the held-out ones, or, of a plain
    text, its perplexity. All play the same tasks with the same seeds.
    """
    paths = [Path(path) for path in ([adapters] if isinstance(adapters, Path | str) else adapters or ())]
    data = None if data is None else Path(data)
    sections = _sections(recipe, paths, base_name)
    if data is not None and data.suffix.lower() in TEXT_SUFFIXES:
        return Evaluation(records=_text_table(sections, recipe.run.seed, data, progress))
    world = _world(recipe, count, data, progress)
    against = START if START in sections else base_name
    played: list[EvalResult] = []
    figures: dict[str, dict[str, float]] = {}
    by_record: dict[str, dict[str, dict[str, float]]] = {}
    table: HeldOutTasks | None = None
    title = ""
    for name, section in sections.items():
        with called("model.name", "--adapter" if paths and section.init_from in paths else "model.init_from"):
            policy = load_policy(section, world.head, recipe.run.seed)
        if len(sections) == 1 and world.head == "scalar" and not policy.trained_head:
            raise ModelError(
                f"{section.init_from or section.name} has no trained scalar head, so its scores would be drawn at "
                "random; name a reward model, or a run or adapter of one by --adapter."
            )
        models = _models(world, policy, section)
        if world.held_out is not None:
            measured = _held_out_records(world, models)
            figures[name] = measured.measure(_packer(world), progress and _named(progress, name))
            by_record[name], title = measured.by_record, measured.heading
        if world.family is not None:
            table = _held_out_tasks(world, world.family, models)
            if not played and recipe.eval.baselines and data is None:
                table.baselines(progress)
            table.play(name, progress)
            played += table.results.values()
    records = MetricTable(title, figures, by_record, against) if figures else None
    if table is None:
        return Evaluation(records=records)
    pairs = [(name, against) for name in sections if name != against]
    trained = [pair for pair in pairs if pair[0] != base_name] + [pair for pair in pairs if pair[0] == base_name]
    shown = replace(table.table("", ""), results=tuple(played), compare=trained[0] if trained else None)
    return Evaluation(replace(shown, others=tuple(trained[1:])), records)


def with_metrics(recipe: Recipe, metrics: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe with further eval.metrics. Raises ConfigError for one that isn't known."""
    if not metrics:
        return recipe
    plain = recipe.model_dump(mode="json")
    plain["eval"]["metrics"] = [*plain["eval"]["metrics"], *(dict(metric) for metric in metrics)]
    return parse_recipe(plain)


def recipe_for(origin: Origin, data: Path, algorithm: str | None = None) -> Recipe:
    """A recipe that measures a model on a file: by SFT's loss, or a reward model's, unless an algorithm is named."""
    name = algorithm or ("reward" if origin.head == "scalar" else "sft")
    if plugins.load("algorithm", name).learns_from == "rollouts":
        raise ConfigError(
            f"--algorithm {name} learns from rollouts, so it can't measure data: choose sft, dpo, reward."
        )
    run = {"dir": "runs/eval", "steps": 1}  # never made: nothing is trained
    made = parse_recipe({"run": run, "data": str(data), "algorithm": {"name": name}})
    return made.model_copy(update={"model": origin.section})


# ---- what is measured ---------------------------------------------------------------------------------------


def _sections(recipe: Recipe, adapters: Sequence[Path], base_name: str) -> dict[str, ModelSection]:
    """How to load each model, by name."""
    begin = recipe.model.init_from
    bare = recipe.model.model_copy(update={"init_from": None, "lora": None})
    if not adapters:
        sections = {base_name: bare}
        if begin is not None:
            sections[TRAINED] = bare.model_copy(update={"init_from": begin})
        return sections
    for path in adapters:
        with called("--adapter"):
            find_adapter(expanded(path))  # refuses a wrong path before any weight is loaded
    sections = {base_name: bare}
    if begin is not None:
        sections[START] = bare.model_copy(update={"init_from": begin})
    for name, path in _names(adapters).items():
        sections[name] = bare.model_copy(update={"init_from": path})
    return sections


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names that tell the paths apart."""
    if len(paths) == 1:
        return {TRAINED: paths[0]}
    if len(set(paths)) < len(paths):
        raise ConfigError("the same adapter is given twice; name each once.")
    short = [path.name for path in paths]
    return dict(zip(short if len(set(short)) == len(short) else map(str, paths), paths, strict=True))


def _world(recipe: Recipe, count: int | None, data: Path | None, progress: Progress | None) -> _World:
    algorithm = recipe.build_algorithm()
    held_out, family, tasks = None, None, recipe.eval.task_count if count is None else count
    if recipe.data is not None:
        section = recipe.data if data is None else _on_file(recipe.data, data)
        train, held_out = open_data(section, algorithm.learns_from, recipe.run.seed, progress)
        held_out = train if data is not None else held_out
        if not len(held_out):
            raise ConfigError("data.eval_fraction is 0, so no record is held out; give --data FILE to measure.")
        if algorithm.learns_from == "rollouts":
            family = DataPrompts(train=train, held_out=held_out)
            tasks, held_out = min(tasks, len(held_out)), None
    elif data is not None:
        raise ConfigError("--data measures a recipe that learns from data; this one plays an env, so leave it out.")
    if recipe.env is not None and data is None:
        family = recipe.build_env()
    everything = len(held_out) if data is not None and held_out is not None else RECORDS
    limit = count or recipe.eval.max_samples or everything
    return _World(recipe, algorithm, family, tasks, held_out, limit)


def _on_file(section: DataSection, path: Path) -> DataSection:
    """The section with one file in place of its sources: fields named as in its first one."""
    if not path.exists():
        raise DataError(f"--data: there is no file {str(path)!r}.")
    forgotten = {"format": "auto", "split": None, "subset": None, "revision": None, "weight": None, "max_samples": None}
    source = section.sources[0].model_copy(update={"path": str(path), **forgotten})
    return section.model_copy(update={"sources": (source,), "eval_sources": (), "eval_fraction": 0.0})


def _models(world: _World, policy: Policy, section: ModelSection) -> Models:
    """The roles to measure this policy in. The reference is what the recipe's run starts from, not this policy."""
    recipe, needs = world.recipe, replace(world.algorithm.needs, values=False)
    reference = None
    if needs.reference_logprobs and world.held_out is not None:
        own = recipe.reference
        start = recipe.model.init_from
        if own is not None and (own.name or own.init_from):
            wanted = {"name": own.name or recipe.model.name, "init_from": own.init_from, "lora": None}
            with called("reference.name", "reference.init_from"):
                reference = load_policy(recipe.model.model_copy(update=wanted), seed=recipe.run.seed)
        elif section.init_from == start:
            reference = policy
        elif start is None and policy.has_lora:
            reference = policy.view(WITHOUT_ADAPTER)
        else:
            reference = load_policy(recipe.model.model_copy(update={"lora": None}), seed=recipe.run.seed)
    if world.held_out is None:
        needs = Needs(logprobs=not needs.scores, scores=needs.scores)
    return Models(policy, needs=needs, reference=reference, autocast=recipe.model.autocast)


def _held_out_records(world: _World, models: Models) -> HeldOutRecords:
    assert world.held_out is not None
    assert world.recipe.data is not None
    section, context = world.recipe.data, models.policy.max_context
    within = section.model_copy(update={"max_length": min(section.max_length or context, context)})
    grouper = grouper_for(world.algorithm.learns_from, build_chat(models.policy, world.recipe.model), within)
    groups = held_out_groups(world.held_out, grouper, world.limit)
    counts = "".join(f", {count:,} {what}" for what, count in sorted(grouper.counts.items()))
    title = f"{world.recipe.algorithm['name']}: {len(groups)} held-out records{counts}"
    return HeldOutRecords(world.algorithm, models, groups, title, each=True)


def _held_out_tasks(world: _World, family: EnvFamily, models: Models) -> HeldOutTasks:
    recipe, policy = world.recipe, models.policy
    rewards, metrics = recipe.build_rewards(), recipe.build_metrics()
    bind_all((*rewards, *metrics), models)
    return HeldOutTasks(
        family,
        world.tasks,
        build_engine(recipe, policy),
        build_chat(policy, recipe.model),
        recipe.sampling().model_copy(update={"temperature": recipe.eval.temperature}),
        rewards,
        metrics,
        recipe.run.seed,
        policy.max_context,
    )


def _packer(world: _World) -> Any:
    return lambda rows: pack(rows, world.recipe.optim.token_budget, atomic=world.algorithm.atomic)


def _named(progress: Progress, name: str) -> Any:
    return lambda done, total: progress(name, done, total)


# ---- plain text ---------------------------------------------------------------------------------------------


def text_perplexity(
    policy: Policy, texts: Sequence[str], window: int | None = None, progress: Any = None
) -> dict[str, float]:
    """How well a model predicts texts: nll (nats a token), perplexity = exp(nll), bits_per_byte, tokens.

    Every token but a text's very first is scored once; a text longer than the window (1,024 tokens, or the model's
    context) is read in windows that overlap by half, so that a token has at least half a window before it. A tokenizer
    with a bos token puts it before each text. Raises DataError where there is no token to score.
    """
    size = min(window or WINDOW, policy.max_context)
    rows = [row for text in texts for row in _windows(_text_ids(policy, text), size)]
    total = sum(row.scored for row in rows)
    if not total:
        raise DataError("the text is empty or a single token: there is nothing to predict.")
    models, nll = Models(policy), 0.0
    models.eval()
    batches = pack(rows, _PACKED)
    with torch.no_grad():
        for done, batch in enumerate(batches, 1):
            forward: Forward = models.forward(batch, Needs(entropies=False))
            nll -= float(forward.logprobs.double().sum())
            if progress is not None:
                progress(done, len(batches))
    size_in_bytes = sum(len(text.encode()) for text in texts)
    return {
        "nll": nll / total,
        "perplexity": math.exp(min(nll / total, 700.0)),
        "bits_per_byte": nll / math.log(2) / size_in_bytes,
        "tokens": float(total),
    }


def _text_ids(policy: Policy, text: str) -> Ids:
    ids = list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = policy.tokenizer.bos_token_id
    return np.array([bos, *ids] if bos is not None else ids, np.int64)


def _windows(ids: Ids, size: int) -> Iterator[Row]:
    """Rows of at most `size` tokens; together they score every token but the first once."""
    scored = 1
    while scored < ids.size:
        end = min(size, ids.size) if scored == 1 else min(scored + size // 2, ids.size)
        first = max(0, end - size)
        mask = np.zeros(end - first, np.bool_)
        mask[scored - first :] = True
        yield Row(ids[first:end], mask, np.zeros(end - scored, np.int32))
        scored = end


def _text_table(sections: Mapping[str, ModelSection], seed: int, path: Path, progress: Progress | None) -> MetricTable:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data: {path} can't be read as UTF-8 text: {error}.") from error
    found = {
        name: text_perplexity(load_policy(section, seed=seed), [text], progress=progress and _named(progress, name))
        for name, section in sections.items()
    }
    return MetricTable(f"{path.name}: the whole text", found)
