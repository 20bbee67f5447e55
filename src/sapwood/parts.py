"""From a recipe to the parts of a run. The cheap parts that may refuse come first, weights last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sapwood import checkpoint
from sapwood.algorithms import Algorithm
from sapwood.chat import Chat
from sapwood.config import Recipe
from sapwood.data import Record
from sapwood.data.dataset import Dataset, open_data
from sapwood.data.groups import Grouper
from sapwood.data.prompts import DataPrompts
from sapwood.data.recordings import RecordingGrouper, check_model, grouper_for
from sapwood.data.section import DataSection
from sapwood.engines import Engine
from sapwood.envs import EnvFamily
from sapwood.errors import ConfigError
from sapwood.heldout import HeldOutRecords, HeldOutTasks
from sapwood.metrics import Metric
from sapwood.models.adapters import AdapterFile
from sapwood.models.critic import check_vocabulary
from sapwood.models.identity import identity
from sapwood.models.load import Policy, called, find_adapter, is_adapter, load_policy
from sapwood.models.roles import Models, build_critic, reference_on
from sapwood.models.sources import outlined
from sapwood.opening import build_chat, build_engine
from sapwood.optimizer import EarlyStopping, Plateau, Stepper, higher_is_better
from sapwood.paths import expanded
from sapwood.progress import Progress
from sapwood.reference import ReferenceCache
from sapwood.rewards import Reward
from sapwood.rollout import bind_all
from sapwood.sections import LoraSection
from sapwood.source import Records, Rollouts, Source, held_out_groups, steps_of
from sapwood.types import Message, Row

#: Held-out records that are measured where eval.max_samples doesn't say.
EVAL_RECORDS = 256
NOTHING_HELD_OUT = "no data is held out: raise data.eval_fraction or give data.eval_sources."


@dataclass
class Parts:
    """Everything that the loop works with. examples: tasks or records of an epoch, None where there are no epochs."""

    algorithm: Algorithm
    policy: Policy
    models: Models
    chat: Chat
    source: Source
    stepper: Stepper
    steps: int
    engine: Engine | None = None
    examples: int | None = None
    tasks: HeldOutTasks | None = None
    records: HeldOutRecords | None = None
    reference_cache: ReferenceCache | None = None
    early_stopping: EarlyStopping | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Data:
    train: Dataset
    held_out: Dataset


def build(recipe: Recipe, run_dir: Path, progress: Progress) -> Parts:
    """All parts of a run. Raises SapwoodError for what a user can act on."""
    algorithm, rewards, metrics = recipe.build_algorithm(), recipe.build_rewards(), recipe.build_metrics()
    data = None
    if recipe.data is not None:
        data = _Data(*open_data(recipe.data, algorithm.learns_from, recipe.run.seed, progress.work))
    family = _family(recipe, algorithm, data)
    per_step = recipe.optim.groups_per_step
    examples = len(data.train) if data is not None else None
    steps = steps_of(recipe.run.steps, recipe.run.epochs, examples, per_step)
    if recipe.optim.warmup_steps > steps:
        raise ConfigError(f"optim.warmup_steps ({recipe.optim.warmup_steps}) is more than the run's {steps} steps.")
    _check_lora(recipe)
    policy = load_policy(recipe.model, recipe.run.seed, head="scalar" if algorithm.needs.scores else "lm")
    if data is not None and data.train.recordings and not outlined():  # a plan's model has no weights to compare
        check_model(data.train.recordings, identity(policy))
    models = _models(recipe, algorithm, policy)
    bind_all((*rewards, *metrics), models)
    chat = build_chat(policy, recipe.model)
    engine = build_engine(recipe, policy) if recipe.plays else None
    limits = _limits(recipe, algorithm, policy)
    grouper = grouper_for(algorithm.learns_from, chat, limits) if limits is not None else None
    if isinstance(family, DataPrompts) and limits is not None:
        assert isinstance(grouper, Grouper)
        family.limit(_Fit(grouper, Grouper(chat, limits)), limits.max_prompt_length)
    tasks, records = None, None
    if family is not None and engine is not None and _evaluates_tasks(recipe, data):
        tasks = _held_out_tasks(recipe, family, engine, chat, data, (rewards, metrics), policy)
    elif recipe.eval.metrics:
        raise ConfigError(f"eval.metrics measure held-out replies, but {NOTHING_HELD_OUT}")
    if data is not None and limits is not None and algorithm.learns_from != "rollouts":
        # A grouper of its own, so that what is cut of these records isn't counted with what is learnt from.
        own = grouper_for(algorithm.learns_from, chat, limits)
        groups = held_out_groups(data.held_out, own, recipe.eval.max_samples or EVAL_RECORDS)
        title = f"{algorithm.learns_from} held out: {len(groups)} records"
        records = HeldOutRecords(algorithm, models, groups, title)
    parts = Parts(
        algorithm=algorithm,
        policy=policy,
        models=models,
        chat=chat,
        source=_source(recipe, algorithm, family, engine, chat, rewards, data, grouper, policy),
        stepper=_stepper(recipe, models, steps, tasks, records),
        steps=steps,
        engine=engine,
        examples=examples,
        tasks=tasks,
        records=records,
        early_stopping=_early_stopping(recipe, tasks, records),
        notes=_notes(policy, models, data, per_step),
    )
    if records is not None and recipe.reference is not None and recipe.reference.precompute:
        assert data is not None
        assert limits is not None
        path = run_dir / "reference" / "logprobs.f32"
        then = None
        if type(algorithm).augment is Algorithm.augment:  # otherwise rows of no record are still to be scored
            then = _Forget(models, records)
        parts.reference_cache = ReferenceCache(path, data.train, Grouper(chat, limits), then)
    return parts


def _check_lora(recipe: Recipe) -> None:
    """Raises ConfigError where model.lora asks for another adapter than that of model.init_from, which goes on."""
    lora, start = recipe.model.lora, recipe.model.init_from
    if start is None or not is_adapter(folder := find_adapter(expanded(start))):
        return
    if lora is None:
        raise ConfigError(
            f"model.lora is null, which trains all weights, but model.init_from ({folder}) is an adapter: remove "
            "model.lora to go on with it, or merge it into its base with `sapwood export` and start from that."
        )
    config = AdapterFile.read(folder).config
    usual = LoraSection(rank=lora.rank)
    asked = {
        "rank": (lora.rank, config.r, LoraSection().rank),
        "alpha": (lora.alpha, config.lora_alpha, usual.alpha),
        "dropout": (lora.dropout, config.lora_dropout, usual.dropout),
        "target_modules": (
            usual.target_modules if lora.target_modules == usual.target_modules else sorted(lora.target_modules),
            sorted(config.target_modules or ()),
            usual.target_modules,
        ),
    }
    for name, (wanted, found, default) in asked.items():
        if wanted not in (found, default):
            raise ConfigError(
                f"model.lora.{name} is {wanted}, but model.init_from ({folder}) goes on with an adapter whose "
                f"{name} is {found}; remove model.lora.{name}."
            )


@dataclass
class _Forget:
    """Frees the reference once every record, those held out too, has its log-probabilities."""

    models: Models
    records: HeldOutRecords

    def __call__(self, pack: Callable[[Sequence[Row]], list[list[Row]]]) -> None:
        self.records.ask_reference(pack)
        self.models.drop_reference()


@dataclass
class _Fit:
    """The prompts to ask of records, within the limits on length; those held out are counted apart."""

    train: Grouper
    held_out: Grouper

    def __call__(self, split: str, record: Record, index: int) -> tuple[Message, ...] | None:
        grouper = self.train if split == "train" else self.held_out
        return grouper.prompt(record, index)


def _limits(recipe: Recipe, algorithm: Algorithm, policy: Policy) -> DataSection | None:
    """The data section with limits that the model's context sets, and for rollouts the room for a reply."""
    section, context = recipe.data, policy.max_context
    if section is None:
        return None
    if section.max_length is not None and section.max_length > context:
        raise ConfigError(
            f"data.max_length ({section.max_length}) is more than the model's context of {context} tokens: lower it."
        )
    longest = section.max_length or context
    if algorithm.learns_from != "rollouts":
        return section.model_copy(update={"max_length": longest})
    reply = recipe.sampling().max_new_tokens
    if reply >= longest:
        what = "data.max_length" if section.max_length else "the model's context"
        raise ConfigError(
            f"engine.max_new_tokens ({reply}) leaves no room for a prompt in {what} ({longest}): lower it."
        )
    room = min(section.max_prompt_length or longest, longest - reply)
    return section.model_copy(update={"max_length": longest, "max_prompt_length": room})


def _held_out_tasks(
    recipe: Recipe,
    family: EnvFamily,
    engine: Engine,
    chat: Chat,
    data: _Data | None,
    measures: tuple[list[Reward], list[Metric]],
    policy: Policy,
) -> HeldOutTasks:
    sampling = recipe.sampling().model_copy(update={"temperature": recipe.eval.temperature})
    count = recipe.eval.task_count
    if data is not None and recipe.env is None:
        count = min(count, len(data.held_out))
    return HeldOutTasks(family, count, engine, chat, sampling, *measures, recipe.run.seed, policy.max_context)


def _family(recipe: Recipe, algorithm: Algorithm, data: _Data | None) -> EnvFamily | None:
    """The world to play: the recipe's, or the prompts of its data; None where nothing is played."""
    if recipe.env is not None:
        family = recipe.build_env()
        family.tasks("train", 1, recipe.run.seed)  # refuses an empty family before any weight is loaded
        return family
    if algorithm.learns_from == "rollouts" and data is not None:
        return DataPrompts(train=data.train, held_out=data.held_out)
    return None


def _evaluates_tasks(recipe: Recipe, data: _Data | None) -> bool:
    return recipe.env is not None or (data is not None and len(data.held_out) > 0)


def _models(recipe: Recipe, algorithm: Algorithm, policy: Policy) -> Models:
    needs, section = algorithm.needs, recipe.reference
    reference = None
    if section is not None and section.name is None and section.init_from is not None:
        with called("reference.name", "reference.init_from"):
            reference = reference_on(policy, section.init_from)
    if section is not None and reference is None and (section.name or section.init_from):
        name = section.name or recipe.model.name
        own = {"name": name, "init_from": section.init_from, "lora": None}
        with called("reference.name", "reference.init_from"):
            reference = load_policy(recipe.model.model_copy(update=own), recipe.run.seed)
        check_vocabulary("reference.name", name, reference.tokenizer, policy)
    critic = build_critic(policy, recipe.critic, recipe.model, recipe.run.seed) if needs.values else None
    return Models(policy, needs=needs, reference=reference, critic=critic, autocast=recipe.model.autocast)


def _source(
    recipe: Recipe,
    algorithm: Algorithm,
    family: EnvFamily | None,
    engine: Engine | None,
    chat: Chat,
    rewards: list[Reward],
    data: _Data | None,
    grouper: Grouper | RecordingGrouper | None,
    policy: Policy,
) -> Source:
    per_step = recipe.optim.groups_per_step
    if algorithm.learns_from != "rollouts":
        assert data is not None
        assert grouper is not None
        return Records(data.train, grouper, per_step)
    assert family is not None
    assert engine is not None
    assert not isinstance(grouper, RecordingGrouper)
    return Rollouts(
        family,
        engine,
        chat,
        recipe.sampling(),
        rewards,
        algorithm,
        per_step,
        recipe.run.seed,
        policy.max_context,
        grouper,
    )


def _stepper(
    recipe: Recipe, models: Models, steps: int, tasks: HeldOutTasks | None, records: HeldOutRecords | None
) -> Stepper:
    optim = recipe.optim
    plateau = None
    if optim.schedule == "plateau":
        metric = _watched("optim.schedule: plateau", optim.plateau_metric, recipe, tasks, records)
        plateau = Plateau(metric, higher_is_better(metric), optim.plateau_factor, optim.plateau_patience)
    scaling = "float16" in (recipe.model.autocast, recipe.model.dtype)
    return Stepper(optim, models.parameter_groups(), steps, scaling, plateau)


def _early_stopping(recipe: Recipe, tasks: HeldOutTasks | None, records: HeldOutRecords | None) -> EarlyStopping | None:
    section = recipe.early_stopping
    if section is None:
        return None
    metric = _watched("early_stopping", section.metric, recipe, tasks, records)
    higher = higher_is_better(metric) if section.mode == "auto" else section.mode == "max"
    return EarlyStopping(metric, higher, section.patience, section.min_delta)


def _watched(
    option: str, metric: str | None, recipe: Recipe, tasks: HeldOutTasks | None, records: HeldOutRecords | None
) -> str:
    """The metric to watch: the held-out return or loss unless given. Raises ConfigError where it is never measured."""
    watched = metric or ("eval/loss" if tasks is None and records is not None else "eval/return")
    if not watched.startswith("eval/"):
        return watched
    if tasks is None and not (records is not None and records.groups):
        raise ConfigError(f"{option} watches {watched}, but {NOTHING_HELD_OUT}")
    if not recipe.eval.every:
        raise ConfigError(
            f"{option} watches {watched}, but eval.every is 0, so it is measured at the end only: set it."
        )
    return watched


def _notes(policy: Policy, models: Models, data: _Data | None, per_step: int) -> list[str]:
    notes = [checkpoint.describe(policy)]
    if models.critic is not None:
        notes.append(f"critic: {models.critic.describe()}")
    if policy.fallback:
        notes.append(f"plain rows in place of the token tree: {policy.fallback}")
    if data is not None:
        notes += data.train.report.lines()
        if per_step > len(data.train):
            notes.append(
                f"optim.batch_size x optim.gradient_accumulation is {per_step:,}, more than the {len(data.train):,} "
                "records, so a step sees each of them several times; lower it."
            )
    return notes
