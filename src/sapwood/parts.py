"""From a recipe to the parts of a run. The cheap parts that may refuse come first, weights last."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sapwood import checkpoint
from sapwood.algorithms import Algorithm
from sapwood.chat import Chat
from sapwood.config import Recipe
from sapwood.data.dataset import Dataset, open_data
from sapwood.data.groups import Grouper
from sapwood.data.prompts import DataPrompts
from sapwood.engines import Engine
from sapwood.envs import EnvFamily
from sapwood.errors import ConfigError
from sapwood.heldout import HeldOutRecords, HeldOutTasks
from sapwood.models.load import Policy, load_policy
from sapwood.models.roles import Models, build_critic
from sapwood.opening import build_chat, build_engine
from sapwood.optimizer import EarlyStopping, Plateau, Stepper
from sapwood.progress import Progress
from sapwood.reference import ReferenceCache
from sapwood.rewards import Reward
from sapwood.source import Records, Rollouts, Source, held_out_groups, steps_of

#: Held-out records that are measured where eval.max_samples doesn't say.
EVAL_RECORDS = 256


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
    policy = load_policy(recipe.model, recipe.run.seed, head="scalar" if algorithm.needs.scores else "lm")
    models = _models(recipe, algorithm, policy)
    for part in (*rewards, *metrics):
        part.bind(models)
    chat = build_chat(policy, recipe.model)
    engine = build_engine(recipe, policy) if recipe.plays else None
    grouper = Grouper(chat, recipe.data) if recipe.data is not None else None
    tasks = None
    if family is not None and engine is not None and _evaluates_tasks(recipe, data):
        sampling = recipe.sampling().model_copy(update={"temperature": recipe.eval.temperature})
        count = recipe.eval.task_count
        if data is not None and recipe.env is None:
            count = min(count, len(data.held_out))
        tasks = HeldOutTasks(
            family, count, engine, chat, sampling, rewards, metrics, recipe.run.seed, policy.max_context
        )
    parts = Parts(
        algorithm=algorithm,
        policy=policy,
        models=models,
        chat=chat,
        source=_source(recipe, algorithm, family, engine, chat, rewards, data, grouper, policy),
        stepper=_stepper(recipe, models, steps),
        steps=steps,
        engine=engine,
        examples=examples,
        tasks=tasks,
        early_stopping=_early_stopping(recipe),
        notes=_notes(policy, models, data),
    )
    if data is not None and grouper is not None and algorithm.learns_from != "rollouts":
        limit = recipe.eval.max_samples or EVAL_RECORDS
        groups = held_out_groups(data.held_out, grouper, limit)
        title = f"{algorithm.learns_from} held out: {len(groups)} records"
        parts.records = HeldOutRecords(algorithm, models, groups, title)
        if recipe.reference is not None and recipe.reference.precompute:
            parts.reference_cache = ReferenceCache(run_dir / "reference" / "logprobs.f32", data.train, grouper)
    return parts


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
    if section is not None and (section.name or section.init_from):
        own = {"name": section.name or recipe.model.name, "init_from": section.init_from, "lora": None}
        reference = load_policy(recipe.model.model_copy(update=own), recipe.run.seed)
        if reference.model.config.vocab_size != policy.model.config.vocab_size:
            raise ConfigError(
                f"reference.name: {own['name']!r} has a vocabulary of {reference.model.config.vocab_size} tokens and "
                f"the policy one of {policy.model.config.vocab_size}; choose a model with the policy's tokenizer."
            )
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
    grouper: Grouper | None,
    policy: Policy,
) -> Source:
    per_step = recipe.optim.groups_per_step
    if algorithm.learns_from != "rollouts":
        assert data is not None
        assert grouper is not None
        return Records(data.train, grouper, per_step)
    assert family is not None
    assert engine is not None
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
    )


def _stepper(recipe: Recipe, models: Models, steps: int) -> Stepper:
    optim = recipe.optim
    plateau = None
    if optim.schedule == "plateau":
        metric = optim.plateau_metric or _watched_by_default(recipe)
        _check_evaluated("optim.schedule: plateau", metric, recipe)
        plateau = Plateau(metric, _higher_is_better(metric), optim.plateau_factor, optim.plateau_patience)
    scaling = "float16" in (recipe.model.autocast, recipe.model.dtype)
    return Stepper(optim, models.parameter_groups(), steps, scaling, plateau)


def _early_stopping(recipe: Recipe) -> EarlyStopping | None:
    section = recipe.early_stopping
    if section is None:
        return None
    metric = section.metric or _watched_by_default(recipe)
    _check_evaluated("early_stopping", metric, recipe)
    higher = _higher_is_better(metric) if section.mode == "auto" else section.mode == "max"
    return EarlyStopping(metric, higher, section.patience, section.min_delta)


def _watched_by_default(recipe: Recipe) -> str:
    return "eval/return" if recipe.plays else "eval/loss"


def _check_evaluated(option: str, metric: str, recipe: Recipe) -> None:
    if metric.startswith("eval/") and not recipe.eval.every:
        raise ConfigError(f"{option} watches {metric}, but eval.every is 0, so it is measured at the end only: set it.")


def _higher_is_better(metric: str) -> bool:
    """Losses, divergences and their like should fall; everything else is taken to be better the higher it is."""
    falling = ("loss", "perplexity", "kl", "gap", "grad_norm", "error", "nll")
    return not any(word in metric.rpartition("/")[2] for word in falling)


def _notes(policy: Policy, models: Models, data: _Data | None) -> list[str]:
    notes = [checkpoint.describe(policy)]
    if models.critic is not None:
        notes.append(f"critic: {models.critic.describe()}")
    if policy.fallback:
        notes.append(f"plain rows in place of the token tree: {policy.fallback}")
    if data is not None:
        notes += data.train.report.lines()
    return notes
