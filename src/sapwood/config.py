"""The recipe: what a run does, as small pydantic models, one a section.

`load_recipe` merges YAML files and dotted overrides, checks everything that can be checked without loading a
model (the options of every named plugin too) and fills in all defaults, so that `dump_recipe` writes what will
run. The sections `env`, `algorithm`, `engine` and `rewards` stay mappings of a plugin's name and options;
`Recipe.build_env` and its like make the objects. Torch is imported only with a plugin that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticSerializationError

from sapwood import configfile, plugins
from sapwood.configfile import KeyPath, Source
from sapwood.engines import Engine, Sampling
from sapwood.envs import EnvFamily
from sapwood.errors import ConfigError
from sapwood.rewards import Reward

if TYPE_CHECKING:
    from sapwood.algorithms import Algorithm

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        # YAML reads `yes` and `on` as true, and pydantic reads true as 1: a typo would become a setting.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise PydanticCustomError("number_type", "Input should be a number")
        return value


class RunSection(Section):
    """Where and how long. dir: the run folder, which must not exist yet; seed: all randomness derives from it."""

    dir: Path
    steps: Positive
    seed: Count = 0

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "epochs" in data:
            if data.get("steps") is not None:
                raise ValueError("run.epochs and run.steps are both given; keep run.steps")
            raise ValueError("run.epochs counts passes over data, but an env makes its tasks: give run.steps")
        return data


class LoraSection(Section):
    """Low-rank adapters. alpha: the update is scaled by alpha / rank; twice the rank unless given."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("alpha") is None:
            rank = data.get("rank", 16)
            data = {**data, "alpha": 2.0 * rank if isinstance(rank, int) and rank > 0 else 1.0}
        return data


class ModelSection(Section):
    """Which policy. name: a known name, a folder or a hub id; init_from: an adapter, checkpoint or run.

    tree: False computes plain rows in place of the token tree: the same results, to compare or to find a fault.
    """

    name: str = "smollm2-135m"
    init_from: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora: LoraSection | None = Field(default_factory=LoraSection)
    quantize: Literal["none", "8bit", "4bit"] = "none"
    gradient_checkpointing: StrictBool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: StrictBool = False
    chat_template: Path | None = None
    tree: StrictBool = True

    @model_validator(mode="after")
    def _quantised_base_needs_adapters(self) -> ModelSection:
        if self.quantize != "none" and self.lora is None:
            raise ValueError(
                f"model.quantize is {self.quantize} and model.lora is null: quantised weights can't be "
                "trained; give model.lora.rank, or set model.quantize=none"
            )
        return self


class OptimSection(Section):
    """AdamW, and what one step sees. token_budget: distinct tokens of a micro-batch; it never changes a gradient.

    max_gap: a run stops where sampler and trainer disagree by more nats a token (the k3 estimate of their KL).
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_gap: Annotated[float, Field(gt=0)] = 0.1
    token_budget: Positive = 8192
    batch_size: Positive = 4

    @model_validator(mode="after")
    def _minimum_below_peak(self) -> OptimSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optim.min_learning_rate ({self.min_learning_rate:g}) is above optim.learning_rate "
                f"({self.learning_rate:g}): lower it"
            )
        return self


class EvalSection(Section):
    """Held-out evaluation. every: steps between evaluations, 0 for the end only; tasks: held-out tasks.

    at_start: evaluate the untrained model too; baselines: run the environment's controllers without a language
    model too; temperature: 0 is greedy.
    """

    every: Count = 0
    tasks: Positive = 16
    at_start: StrictBool = True
    baselines: StrictBool = True
    temperature: Annotated[float, Field(ge=0)] = 0.0


class CheckpointSection(Section):
    """every: steps between checkpoints, 0 for the end only; keep: how many of the newest stay."""

    every: Count = 0
    keep: Positive = 3


class SamplesSection(Section):
    """every: steps between files of samples, 0 for none."""

    every: Count = 1


class Recipe(Section):
    """A whole run. Made by `load_recipe` or `parse_recipe`, which check and fill in every plugin's options."""

    run: RunSection
    model: ModelSection = Field(default_factory=ModelSection)
    env: dict[str, Any]
    rewards: tuple[dict[str, Any], ...] = ({"name": "env", "weight": 1.0},)
    algorithm: dict[str, Any]
    engine: dict[str, Any] = {"name": "local"}
    optim: OptimSection = Field(default_factory=OptimSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    samples: SamplesSection = Field(default_factory=SamplesSection)
    trackers: tuple[Literal["tensorboard"], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        return configfile.normalise(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.optim.warmup_steps > self.run.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is more than run.steps ({self.run.steps}): "
                "the learning rate would never reach its value; lower it"
            )
        if not self.rewards:
            raise ValueError("rewards is empty, so nothing would be learnt: give at least [{name: env}]")
        return self

    def build_env(self) -> EnvFamily:
        """The environment family of the `env` section. Raises ConfigError."""
        return _build("env", self.env, ("env",), EnvFamily)

    def build_algorithm(self) -> Algorithm:
        """The algorithm, with its options. Imports torch. Raises ConfigError."""
        from sapwood.algorithms import Algorithm

        return _build("algorithm", self.algorithm, ("algorithm",), Algorithm)

    def build_rewards(self) -> list[Reward]:
        """The rewards, in order. Raises ConfigError."""
        return [_build("reward", item, ("rewards", index), Reward) for index, item in enumerate(self.rewards)]

    def sampling(self) -> Sampling:
        """The part of the `engine` section that every engine shares."""
        return _sampling(self.engine, Source({"engine": self.engine}))

    def engine_options(self) -> dict[str, Any]:
        """The engine's own options: everything in its section but the name and the sampling options."""
        return _own_options(self.engine)

    def check_trainable(self) -> None:
        """Refuse what can be sampled from but can't teach. Raises ConfigError."""
        if self.sampling().temperature == 0:
            raise ConfigError(
                "engine.temperature is 0: greedy replies to a task are all the same, so there is nothing to "
                "learn from; set engine.temperature=1.0."
            )


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
    return _parse(Source(configfile.normalise(data)))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; loading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _parse(source: Source) -> Recipe:
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError(configfile.explain(error, source, (), Recipe)) from error
    from_section = {
        "env": _resolve("env", recipe.env, ("env",), EnvFamily, source),
        "rewards": tuple(
            _resolve("reward", item, ("rewards", index), Reward, source) for index, item in enumerate(recipe.rewards)
        ),
        "engine": _resolve_engine(recipe.engine, source),
    }
    _name("algorithm", recipe.algorithm, ("algorithm",), source)
    from sapwood.algorithms import Algorithm  # imports torch, so only once everything else is right

    from_section["algorithm"] = _resolve("algorithm", recipe.algorithm, ("algorithm",), Algorithm, source)
    return recipe.model_copy(update=from_section)


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
    options = {key: value for key, value in section.items() if key != "name"}
    return _validate(plugin, options, path, source)


def _validate(model: type[BaseModel], options: dict[str, Any], path: KeyPath, source: Source) -> Any:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        raise ConfigError(configfile.explain(error, source, path, model)) from error
    except ConfigError as error:
        raise type(error)(f"{source.place(path)}: {error}") from error


def _nest(path: KeyPath, section: Mapping[str, Any]) -> dict[str, Any]:
    """Data in which `section` sits at `path`, so that an error can point into it."""
    if len(path) == 1:
        return {str(path[0]): section}
    return {str(path[0]): {path[1]: section}}


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
