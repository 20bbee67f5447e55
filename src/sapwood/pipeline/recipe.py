"""The recipe of a pipeline: the world, the model, and the options of every stage.

    run:      {dir: runs/office, seed: 0, rounds: 1}
    env:      {name: hvac, building: OfficeSmall, climate: Hot_Dry}
    model:    {name: smollm2-135m}
    ppo: {...}  select: {...}  rollout: {...}  distill: {...}  finetune: {...}  grpo: {...}  eval: {...}

Files, overlays and `key=value` overrides work as in the recipe of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, field_validator

from sapwood import configfile
from sapwood.configfile import Source
from sapwood.engines.local import LocalOptions
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import ConfigError
from sapwood.pipeline import finetune
from sapwood.pipeline.distill import DistillOptions
from sapwood.pipeline.finetune import FinetuneOptions
from sapwood.pipeline.ppo import PpoOptions
from sapwood.pipeline.rollout import RolloutOptions
from sapwood.pipeline.rollout import check as check_rollout
from sapwood.pipeline.select import SelectOptions
from sapwood.sections import Count, LoraSection, ModelSection, Positive, Section

#: The names by which files of one's own are given to a stage.
WORLD = "hvac"


class PipelineRun(Section):
    """Where, with which seed, and how often. rounds: at most so many times rollout, distill and finetune; each begins
    with the model of the one before, and a round that doesn't improve on training days is the last.

    validation_days: training days that rounds are compared on.
    """

    dir: Path
    seed: Count = 0
    rounds: Positive = 1
    validation_days: Annotated[int, Field(ge=2)] = 16


class GrpoOptions(Section):
    """The other way from the same start: on-policy GRPO in the same world, with the same prompts.

    steps: of batch_size tasks with group_size attempts each; learning_rate: at first, falling to a tenth;
    train_horizon: steps of a training episode; sampling ends at the rollout section's stop strings and token limit. The
    other options are those of a run's recipe.
    """

    steps: Positive = 30
    group_size: Annotated[int, Field(ge=2)] = 8
    batch_size: Positive = 8
    train_horizon: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    warmup_steps: Count = 2
    lora_rank: Positive = 16
    entropy_coef: Annotated[float, Field(ge=0)] = 0.03
    temperature: Annotated[float, Field(gt=0)] = 1.0
    token_budget: Positive = 8192
    checkpoint_every: Positive = 10


class EvaluationOptions(Section):
    """Which held-out days are played by everyone. days: of each seed; seeds: how many, from the run's seed on, which
    differ where episodes start at random or replies are sampled; temperature: of the language models, 0 is greedy.
    """

    days: Positive = 16
    seeds: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0


class PipelineRecipe(Section):
    """All stages. engine: the local engine's own options; grpo: left out unless given."""

    run: PipelineRun
    env: dict[str, Any]
    model: ModelSection = Field(default_factory=ModelSection)
    engine: LocalOptions = Field(default_factory=LocalOptions)
    ppo: PpoOptions = Field(default_factory=PpoOptions)
    select: SelectOptions = Field(default_factory=SelectOptions)
    rollout: RolloutOptions = Field(default_factory=RolloutOptions)
    distill: DistillOptions = Field(default_factory=DistillOptions)
    finetune: FinetuneOptions = Field(default_factory=FinetuneOptions)
    grpo: GrpoOptions | None = None
    eval: EvaluationOptions = Field(default_factory=EvaluationOptions)

    @field_validator("env")
    @classmethod
    def _a_building(cls, env: dict[str, Any]) -> dict[str, Any]:
        name = env.get("name", WORLD)
        if name != WORLD:
            raise ValueError(f"env.name is {name!r}, and this pipeline is for buildings; set env.name={WORLD}")
        return {**env, "name": name}

    @property
    def family(self) -> Hvac:
        """The world, as the recipe has it: without the examples that stage `select` makes."""
        return Hvac.model_validate({key: value for key, value in self.env.items() if key != "name"})


def load_pipeline(paths: Sequence[Path | str] | Path | str, overrides: Sequence[str] = ()) -> PipelineRecipe:
    """Merge recipe files left to right, then `key=value` overrides, and check the whole.

    Raises ConfigError with a sentence for every problem: file, line, key, and what is allowed.
    """
    files = [paths] if isinstance(paths, Path | str) else list(paths)
    if not files:
        raise ConfigError("no recipe given: name a YAML file, e.g. recipes/hvac_self_distillation.yaml.")
    source = configfile.read(Path(files[0]))
    for file in files[1:]:
        source = configfile.merge(source, configfile.read(Path(file)))
    return _parse(configfile.override(source, overrides))


def parse_pipeline(data: Mapping[str, Any]) -> PipelineRecipe:
    """The recipe of a plain mapping, checked like one from a file. Raises ConfigError."""
    return _parse(configfile.source_of(data))


def dump_pipeline(recipe: PipelineRecipe) -> str:
    """The recipe as YAML; loading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _parse(source: Source) -> PipelineRecipe:
    source = configfile.settle(source, lambda gate: gate[0] in PipelineRecipe.model_fields)
    if "algorithm" in source.data:
        raise ConfigError(
            f"{source.place(('algorithm',))}: this is the recipe of a run and not of a pipeline: use `sapwood train`."
        )
    data = {key: value for key, value in source.data.items() if value is not None}
    if isinstance(data.get("env"), str):
        data["env"] = {"name": data["env"]}
    try:
        recipe = PipelineRecipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(configfile.explain(error, source, (), PipelineRecipe)) from error
    options = {key: value for key, value in recipe.env.items() if key != "name"}
    try:
        family = Hvac.model_validate(options)
    except ValidationError as error:
        raise ConfigError(configfile.explain(error, source, ("env",), Hvac)) from error
    except ConfigError as error:
        raise type(error)(f"{source.place(('env',))}: {error}") from error
    recipe = recipe.model_copy(update={"env": {"name": WORLD, **family.model_dump(mode="json")}})
    _check(recipe, family, source)
    try:
        dump_pipeline(recipe)
    except ValueError as error:  # Python writes out no number of thousands of digits
        raise ConfigError(f"{source.label}: a number has too many digits; give one that can be meant.") from error
    return recipe


def _check(recipe: PipelineRecipe, family: Hvac, source: Source) -> None:
    """What no section can see by itself. Raises ConfigError."""
    if recipe.model.lora != LoraSection():
        raise ConfigError(
            f"{source.place(('model', 'lora'))}: model.lora has no effect: each stage makes an adapter of its own; set "
            "finetune.lora_rank and grpo.lora_rank."
        )
    check_rollout(recipe.rollout, family)
    if recipe.select.rank == "advantage" and (family.train_horizon or family.horizon) < 2:
        raise ConfigError(
            f"{source.place(('select', 'rank'))}: select.rank is advantage, which needs the value of a next step, and "
            "training episodes have one; set select.rank=reward or env.train_horizon=2."
        )
    nothing = Path("nothing.json")
    try:  # what these stages would refuse, before the first is run
        finetune.recipe(recipe.finetune, nothing, recipe.model, family, recipe.run.dir, recipe.run.seed, 100)
    except ConfigError as error:
        raise type(error)(f"finetune: {error}") from error
    evaluation = recipe.eval
    if evaluation.seeds > 1 and family.start == "day" and evaluation.temperature == 0:
        raise ConfigError(
            f"{source.place(('eval', 'seeds'))}: eval.seeds is {evaluation.seeds}, but with env.start=day and greedy "
            "replies every seed plays the same days alike; set env.start=random or eval.temperature, or eval.seeds=1."
        )
    available = len(family.days("eval"))
    if family.start == "day" and evaluation.days > available:
        raise ConfigError(
            f"{source.place(('eval', 'days'))}: eval.days is {evaluation.days}, and {available} days are held out for "
            f"episodes of this length; set eval.days={available}."
        )
