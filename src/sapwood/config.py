"""The recipe: what a run does, as small pydantic models, one a section.

`load_recipe` merges YAML files and dotted overrides, checks everything that can be checked without loading a
model (the options of every named plugin too) and fills in all defaults, so that `dump_recipe` writes what will
run. The sections `env`, `algorithm`, `engine` and `rewards` stay mappings of a plugin's name and options;
`Recipe.build_env` and its like make the objects. Torch is imported only with a plugin that needs it.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from annotated_types import Ge
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from sapwood import configfile, plugins
from sapwood.configfile import KeyPath, Source
from sapwood.data.section import DataSection
from sapwood.engines import Engine, Sampling
from sapwood.envs import EnvFamily
from sapwood.errors import ConfigError
from sapwood.metrics import Metric
from sapwood.rewards import Reward
from sapwood.sections import (
    CheckpointSection,
    CriticSection,
    EarlyStoppingSection,
    EvalSection,
    GuardsSection,
    ModelSection,
    OptimSection,
    ReferenceSection,
    RunSection,
    SamplesSection,
    Section,
)
from sapwood.trackers import Tracker

if TYPE_CHECKING:
    from sapwood.algorithms import Algorithm


class Recipe(Section):
    """A whole run. Made by `load_recipe` or `parse_recipe`, which check and fill in every plugin's options."""

    run: RunSection
    model: ModelSection = Field(default_factory=ModelSection)
    reference: ReferenceSection | None = None
    critic: CriticSection | None = None
    env: dict[str, Any] | None = None
    data: DataSection | None = None
    rewards: tuple[dict[str, Any], ...] | None = None
    algorithm: dict[str, Any]
    engine: dict[str, Any] | None = None
    optim: OptimSection = Field(default_factory=OptimSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    early_stopping: EarlyStoppingSection | None = None
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    guards: GuardsSection = Field(default_factory=GuardsSection)
    samples: SamplesSection = Field(default_factory=SamplesSection)
    trackers: tuple[dict[str, Any], ...] = ({"name": "tensorboard"},)

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        return configfile.normalise(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.run.steps is not None and self.optim.warmup_steps > self.run.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is more than run.steps ({self.run.steps}): "
                "the learning rate would never reach its value; lower it"
            )
        if self.run.epochs is not None and self.data is None:
            raise ValueError("run.epochs counts passes over data, but an env makes its tasks: give run.steps")
        if self.rewards is not None and not self.rewards:
            raise ValueError("rewards is empty, so nothing would be learnt: give at least [{name: env}]")
        if self.env is None and self.data is None:
            raise ValueError("env is missing: give env to learn from rollouts in a world, or data to learn from files")
        return self

    @property
    def plays(self) -> bool:
        """Whether anything is sampled: rollouts to learn from, or held-out tasks of an environment."""
        return self.engine is not None

    def build_env(self) -> EnvFamily:
        """The environment family of the `env` section. Raises ConfigError."""
        if self.env is None:
            raise ConfigError("env is missing: this recipe learns from data and names no environment; add env to play.")
        return _build("env", self.env, ("env",), EnvFamily)

    def build_algorithm(self) -> Algorithm:
        """The algorithm, with its options. Imports torch. Raises ConfigError."""
        from sapwood.algorithms import Algorithm

        return _build("algorithm", self.algorithm, ("algorithm",), Algorithm)

    def build_rewards(self) -> list[Reward]:
        """The rewards, in order; none where nothing is played. Raises ConfigError."""
        return [_build("reward", item, ("rewards", index), Reward) for index, item in enumerate(self.rewards or ())]

    def build_metrics(self) -> list[Metric]:
        """The further metrics of evaluation, in order. Raises ConfigError."""
        metrics = [
            _build("metric", item, ("eval", "metrics", index), Metric) for index, item in enumerate(self.eval.metrics)
        ]
        several = [item["name"] for item, metric in zip(self.eval.metrics, metrics, strict=True) if metric.attempts > 1]
        if several and self.eval.temperature == 0:
            raise ConfigError(
                f"eval.metrics: {several[0]} wants several attempts at a task, but eval.temperature is 0, so they "
                "would all be the same; set eval.temperature=1.0."
            )
        return metrics

    def build_trackers(self) -> list[tuple[str, Tracker]]:
        """The trackers with their names, in order. Raises ConfigError."""
        return [
            (item["name"], _build("tracker", item, ("trackers", index), Tracker))
            for index, item in enumerate(self.trackers)
        ]

    def sampling(self) -> Sampling:
        """The part of the `engine` section that every engine shares."""
        engine = self.engine or {}
        return _sampling(engine, Source({"engine": engine}))

    def engine_options(self) -> dict[str, Any]:
        """The engine's own options: everything in its section but the name and the sampling options."""
        return _own_options(self.engine or {})

    def check_trainable(self) -> None:
        """Refuse what can be sampled from but can't teach. Raises ConfigError."""
        if self.build_algorithm().learns_from != "rollouts":
            return
        if self.sampling().temperature == 0:
            raise ConfigError(
                "engine.temperature is 0: greedy replies to a task are all the same, so there is nothing to "
                "learn from; set engine.temperature=1.0."
            )
        reasons = (
            [] if self.env is not None and self.build_env().pays else [r.needs_world() for r in self.build_rewards()]
        )
        for index, reason in enumerate(reasons):
            if reason is not None and (self.env is None or None not in reasons):
                raise ConfigError(f"rewards.{index}: {reason}")


def load_recipe(paths: Sequence[Path | str] | Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Merge recipe files left to right, then `key=value` overrides, and check the whole.

    Raises ConfigError with a sentence for every problem: file, line, key, and what is allowed.
    """
    files = [paths] if isinstance(paths, Path | str) else list(paths)
    if not files:
        raise ConfigError("no recipe given: name a YAML file, e.g. recipes/hvac_demo.yaml.")
    source = configfile.read(Path(files[0]))
    for file in files[1:]:
        source = configfile.merge(source, configfile.read(Path(file)))
    return _parse(configfile.override(source, overrides))


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """The recipe of a plain mapping, checked like one from a file. Raises ConfigError."""
    return _parse(configfile.source_of(data))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; loading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _parse(source: Source) -> Recipe:
    of_pipeline = [key for key in ("rollout", "distill", "finetune") if key in source.data]
    if of_pipeline and "algorithm" not in source.data:
        place = source.place((of_pipeline[0],))
        raise ConfigError(f"{place}: this is the recipe of a pipeline and not of a run: use `sapwood pipeline`.")
    source = configfile.settle(source, lambda gate: _has_section(gate, source))
    recipe = _checked(source)
    _name("algorithm", recipe.algorithm, ("algorithm",), source)
    if source.soft:
        source = _settle(source, recipe)
        recipe = _checked(source)
    from sapwood.algorithms import Algorithm  # imports torch, so only once the file itself is right

    algorithm = _build("algorithm", recipe.algorithm, ("algorithm",), Algorithm, source)
    recipe = _with_defaults(recipe, algorithm, source)
    if recipe.samples.every is None:
        saved = SamplesSection(every=1 if algorithm.learns_from == "rollouts" else 0)
        recipe = recipe.model_copy(update={"samples": saved})
    resolved: dict[str, Any] = {
        "algorithm": {"name": recipe.algorithm["name"], **_plain(algorithm, ("algorithm",), source)},
        "eval": recipe.eval.model_copy(
            update={
                "metrics": tuple(
                    _resolve("metric", item, ("eval", "metrics", index), Metric, source)
                    for index, item in enumerate(recipe.eval.metrics)
                )
            }
        ),
        "trackers": tuple(
            _resolve("tracker", item, ("trackers", index), Tracker, source)
            for index, item in enumerate(recipe.trackers)
        ),
    }
    if recipe.env is not None:
        resolved["env"] = _resolve("env", recipe.env, ("env",), EnvFamily, source)
    if recipe.rewards is not None:
        resolved["rewards"] = tuple(
            _resolve("reward", item, ("rewards", index), Reward, source) for index, item in enumerate(recipe.rewards)
        )
    if recipe.engine is not None:
        resolved["engine"] = _resolve_engine(recipe.engine, source)
    return recipe.model_copy(update=resolved)


def _checked(source: Source) -> Recipe:
    try:
        return Recipe.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError(configfile.explain(error, source, (), Recipe)) from error


def _has_section(gate: KeyPath, source: Source) -> bool | None:
    """Whether the recipe has what a soft key asks for, as far as its own keys tell. Raises ConfigError."""
    section = str(gate[0])
    if section in ("env", "data") and source.data.get(section) is None:
        return False
    if section == "data" or gate == ("env",):
        return True
    if gate in (("run", "steps"), ("run", "epochs")):
        run = source.data.get("run")
        return isinstance(run, Mapping) and run.get(gate[1]) is not None
    in_play = gate in (("eval", "metrics"), ("eval", "tasks"), ("eval", "temperature"))
    later = section in ("engine", "rewards", "critic", "reference") or in_play
    if later or (section in ("algorithm", "env") and len(gate) == 2):
        return None
    place = next(entry.place for entry in source.soft if gate in entry.gates)
    name = configfile.dotted(gate)
    if section not in Recipe.model_fields:
        raise ConfigError(f"{place}: {configfile.unknown_key(gate[:1], sorted(Recipe.model_fields))}")
    raise ConfigError(f"{place}: {name}? asks whether the recipe can have {name}, and every one can; remove the '?'.")


def _settle(source: Source, recipe: Recipe) -> Source:
    """The soft keys that depend on plugins: options that they have, and sections that are in use."""
    from sapwood.algorithms import Algorithm

    def option(gate: KeyPath) -> bool | None:
        if gate in (("algorithm", "epochs"), ("algorithm", "updates")):  # every algorithm's, but meant for rollouts
            return plugin.learns_from == "rollouts"
        return _has_option(gate, source) if len(gate) == 2 and gate[0] in ("algorithm", "env", "engine") else None

    def used(gate: KeyPath) -> bool:
        if gate[0] in ("critic", "reference"):
            return algorithm.needs.values if gate[0] == "critic" else algorithm.needs.reference_logprobs
        return algorithm.learns_from == "rollouts" or recipe.env is not None

    plugin = _plugin("algorithm", recipe.algorithm, ("algorithm",), source)
    source = dataclasses.replace(source, soft=tuple(_at_least(entry, plugin) for entry in source.soft))
    source = configfile.settle(source, lambda gate: option(gate) if gate[0] == "algorithm" else None)
    algorithm: Algorithm = _build("algorithm", source.data["algorithm"], ("algorithm",), Algorithm, source)
    return configfile.settle(source, lambda gate: used(gate) and option(gate) is not False)


def _has_option(gate: KeyPath, source: Source) -> bool:
    """Whether the plugin has the option. Raises ConfigError where no built-in one has: a typo would never apply."""
    kind, key = str(gate[0]), str(gate[1])
    section = source.data.get(kind) or {}
    name = _name(kind, section, (kind,), source)
    if key in _option_names(_plugin(kind, {"name": name}, (kind,), source)):
        return True
    known = {option for other in plugins.known(kind) for option in _option_names(plugins.load(kind, other))}
    if key in known:
        return False
    place = next(entry.place for entry in source.soft if gate in entry.gates)
    raise ConfigError(f"{place}: no {kind} has it: {configfile.unknown_key(gate, sorted(known))}")


def _option_names(plugin: Any) -> set[str]:
    if isinstance(plugin, type) and issubclass(plugin, Engine):
        model = _engine_options_model(plugin)
        return {*Sampling.model_fields, *(model.model_fields if model else ())}
    return set(plugin.model_fields)


def _at_least(entry: configfile.Soft, plugin: Any) -> configfile.Soft:
    """A soft number of an algorithm that takes no less than a minimum, raised to it."""
    field = plugin.model_fields.get(entry.path[-1]) if entry.path[0] == "algorithm" and len(entry.path) == 2 else None
    if field is None or not isinstance(entry.value, int | float):
        return entry
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    rules: list[Any] = [rule.ge for rule in field.metadata if isinstance(rule, Ge)]
    least: Any = max(rules, default=extra.get("minimum"))
    return entry if least is None else dataclasses.replace(entry, value=max(entry.value, least))


def _with_defaults(recipe: Recipe, algorithm: Algorithm, source: Source) -> Recipe:
    """Rewards and engine filled in where something is played; a section that would have no effect is refused."""
    name, rollouts = recipe.algorithm["name"], algorithm.learns_from == "rollouts"

    def refuse(section: str, reason: str) -> None:
        raise ConfigError(f"{source.place((section,))}: {reason}")

    if rollouts and recipe.env is not None and recipe.data is not None:
        refuse("data", f"{name} learns from rollouts, either in env or on the prompts of data; give one of them.")
    if not rollouts and recipe.data is None:
        refuse("algorithm", f"{name} learns from {algorithm.learns_from}: give data (a file, see docs/data.md).")
    if recipe.critic is not None and not algorithm.needs.values:
        refuse("critic", f"algorithm {name} has no critic; remove the section or choose ppo.")
    if recipe.reference is not None and not algorithm.needs.reference_logprobs:
        refuse("reference", f"algorithm {name} with these options uses no reference; remove the section.")
    if recipe.reference is not None and recipe.reference.precompute and rollouts:
        refuse("reference", f"reference.precompute is for data, but {name} samples its replies; remove it.")
    _refuse_idle(recipe, algorithm, source)
    if not rollouts and recipe.env is None:
        for section in ("rewards", "engine"):
            if getattr(recipe, section) is not None:
                refuse(section, f"{section} has no effect: {name} learns from data and no env is given; remove it.")
        if recipe.eval.metrics:
            raise ConfigError(
                f"{source.place(('eval', 'metrics'))}: eval.metrics measure replies in an env; give env or remove them."
            )
        return recipe
    rewards = recipe.rewards
    if rewards is None:
        if recipe.env is None:
            refuse("data", "rewards is missing: prompts pay nothing by themselves; give e.g. rewards: [exact_match].")
        rewards = ({"name": "env"},)
    return recipe.model_copy(update={"rewards": rewards, "engine": recipe.engine or {"name": "local"}})


def _refuse_idle(recipe: Recipe, algorithm: Algorithm, source: Source) -> None:
    """Options that nothing reads with this algorithm and these sections. Raises ConfigError for the first one set."""
    name, needs, rollouts = recipe.algorithm["name"], algorithm.needs, algorithm.learns_from == "rollouts"
    plays = rollouts or recipe.env is not None
    nothing = f"{name} learns from data and no env is given, so nothing is sampled"
    of_critic = needs.values and recipe.optim.critic_learning_rate is None
    reasons: dict[tuple[str, str], str | None] = {
        ("eval", "tasks"): None if plays else f"{nothing}; give eval.max_samples for the number of held-out records",
        ("eval", "temperature"): None if plays else f"{nothing}; remove it",
        ("optim", "max_gap"): None if rollouts else f"{name} learns from no samples; remove it",
        ("optim", "critic_learning_rate"): None if needs.values else f"{name} has no critic; remove it",
        ("optim", "head_learning_rate"): None
        if needs.scores or of_critic
        else "a critic's head learns at optim.critic_learning_rate; keep one"
        if needs.values
        else f"{name} has no scalar head; remove it",
    }
    if rollouts:
        reasons |= {
            ("data", "train_on"): f"{name} learns from the replies that it samples; remove it",
            ("data", "long_reply"): f"{name} samples its replies: engine.max_new_tokens bounds them; remove it",
        }
    for (section, key), reason in reasons.items():
        options = getattr(recipe, section)
        if reason and options is not None and getattr(options, key) != type(options).model_fields[key].default:
            raise ConfigError(f"{source.place((section, key))}: {section}.{key} has no effect: {reason}.")
    if rollouts and recipe.data is not None and recipe.data.long_prompt == "cut_start":
        raise ConfigError(
            f"{source.place(('data', 'long_prompt'))}: data.long_prompt: cut_start cuts tokens, and {name} asks whole "
            "messages; use drop_turns or drop."
        )
    if not rollouts and "temperature" in (recipe.engine or {}):
        default = Sampling.model_fields["temperature"].default
        if recipe.engine is not None and recipe.env is not None and recipe.engine["temperature"] != default:
            raise ConfigError(
                f"{source.place(('engine', 'temperature'))}: engine.temperature has no effect: {name} samples for "
                "evaluation only; set eval.temperature."
            )


def _name(kind: str, section: Mapping[str, Any], path: KeyPath, source: Source) -> str:
    name = section.get("name", configfile.DEFAULT_NAMES.get(kind))
    if not isinstance(name, str):
        known = ", ".join(plugins.known(kind))
        raise ConfigError(
            f"{source.place((*path, 'name'))}: {configfile.dotted(path)}.name is missing; known: {known}."
        )
    return name


def _plugin(kind: str, section: Mapping[str, Any], path: KeyPath, source: Source) -> Any:
    name = _name(kind, section, path, source)
    try:
        return plugins.load(kind, name)
    except ConfigError as error:
        raise type(error)(f"{source.place((*path, 'name'))}: {error}") from error


def _build(kind: str, section: Mapping[str, Any], path: KeyPath, contract: type, source: Source | None = None) -> Any:
    source = source or Source(_nest(path, section))
    plugin = _plugin(kind, section, path, source)
    if not (isinstance(plugin, type) and issubclass(plugin, contract)):
        raise ConfigError(
            f"{source.place((*path, 'name'))}: {kind} {section['name']!r} is not a class derived from "
            f"{contract.__module__}.{contract.__name__}."
        )
    if inspect.isabstract(plugin):
        lacks = ", ".join(sorted(plugin.__abstractmethods__))
        raise ConfigError(
            f"{source.place((*path, 'name'))}: {kind} {section['name']!r} lacks the method {lacks}, which every "
            f"{contract.__name__} has; write it."
        )
    options = {key: value for key, value in section.items() if key != "name"}
    return _validate(plugin, options, path, source)


def _validate(model: type[BaseModel], options: dict[str, Any], path: KeyPath, source: Source) -> Any:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        raise ConfigError(configfile.explain(error, source, path, model)) from error
    except ConfigError as error:
        raise type(error)(f"{source.place(path)}: {error}") from error


def _nest(path: KeyPath, section: Mapping[Any, Any]) -> dict[Any, Any]:
    """Data in which `section` sits at `path`, so that an error can point into it."""
    for part in reversed(path):
        section = {part: section}
    return dict(section)


def _resolve(kind: str, section: Mapping[str, Any], path: KeyPath, contract: type, source: Source) -> dict[str, Any]:
    """The section with every option of the plugin filled in, as plain data."""
    built = _build(kind, section, path, contract, source)
    return {"name": section["name"], **_plain(built, path, source)}


def _plain(options: BaseModel, path: KeyPath, source: Source) -> dict[str, Any]:
    try:
        return options.model_dump(mode="json")
    except PydanticSerializationError as error:
        field = configfile.dotted(path)
        raise ConfigError(f"{source.place(path)}: {field} has an option that isn't plain data: {error}.") from error


def _sampling(section: Mapping[str, Any], source: Source) -> Sampling:
    shared = {key: value for key, value in section.items() if key in Sampling.model_fields}
    return _validate(Sampling, shared, ("engine",), source)


def _own_options(engine: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in engine.items() if key != "name" and key not in Sampling.model_fields}


def _resolve_engine(section: Mapping[str, Any], source: Source) -> dict[str, Any]:
    name = _name("engine", section, ("engine",), source)
    sampling = _sampling(section, source)
    plugin = _plugin("engine", {"name": name}, ("engine",), source)
    if not (isinstance(plugin, type) and issubclass(plugin, Engine)):
        raise ConfigError(
            f"{source.place(('engine', 'name'))}: engine {name!r} is not a class derived from sapwood.engines.Engine."
        )
    model = _engine_options_model(plugin)
    own = _own_options(section)
    allowed = sorted({*Sampling.model_fields, *(model.model_fields if model else ())})
    for key in own:
        if key not in allowed:
            path = ("engine", key)
            raise ConfigError(f"{source.place(path)}: {configfile.unknown_key(path, allowed)}")
    options = _plain(_validate(model, own, ("engine",), source), ("engine",), source) if model else {}
    return {"name": name, **_plain(sampling, ("engine",), source), **options}


def _engine_options_model(plugin: type) -> type[BaseModel] | None:
    """`OPTIONS` of the engine's class, or of the module that it lives in; None where it has no options."""
    return getattr(plugin, "OPTIONS", None) or getattr(sys.modules[plugin.__module__], "OPTIONS", None)
