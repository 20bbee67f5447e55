"""The sections of a recipe: small pydantic models, immutable, an unknown key is an error.

`sapwood.config` puts them together as a `Recipe`. The options of the sections `algorithm`, `env`, `engine`, `rewards`
and `trackers` belong to the plugins that they name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
#: Tasks or records of a micro-batch: a step with more would never end.
MOST = 1_000_000


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        # YAML reads `yes` and `on` as true, and pydantic reads true as 1: a typo would become a setting.
        if isinstance(value, bool) and _is_number(cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("number_type", "Input should be a number")
        return value


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_is_number, get_args(annotation)))


class RunSection(Section):
    """Where and how long. dir: the run folder, which must not exist yet; seed: all randomness derives from it.

    steps: optimisation steps (a step sees one batch); or epochs: passes over the data.
    """

    dir: Path
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    seed: Count = 0

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> RunSection:
        if self.steps is None and self.epochs is None:
            raise ValueError("run.steps is missing: give run.steps, or run.epochs for passes over the data")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("run.epochs and run.steps are both given; keep one")
        return self


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

    dtype: of the weights; autocast: of the passes (mixed precision: float32 weights, float16 or bfloat16 products).
    cache_dir: where hub files are kept; device_map: how accelerate spreads a large model over devices.
    tree: False computes plain rows in place of the token tree: the same results, to compare or to find a fault.
    """

    name: str = "smollm2-135m"
    init_from: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    lora: LoraSection | None = Field(default_factory=LoraSection)
    quantize: Literal["none", "8bit", "4bit"] = "none"
    gradient_checkpointing: StrictBool = False
    device: str = "auto"
    device_map: str | None = None
    cache_dir: Path | None = None
    trust_remote_code: StrictBool = False
    chat_template: Path | None = None
    tree: StrictBool = True

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
            raise PydanticCustomError("device", "Input should be 'auto', 'cpu', 'cuda' or one GPU such as 'cuda:1'")
        return value

    @model_validator(mode="after")
    def _trainable(self) -> ModelSection:
        if self.quantize != "none" and self.lora is None:
            raise ValueError(
                f"model.quantize is {self.quantize} and model.lora is null: quantised weights can't be "
                "trained; give model.lora.rank, or set model.quantize=none"
            )
        if self.dtype == "float16" and self.lora is None:
            raise ValueError(
                "model.dtype is float16 and model.lora is null: float16 weights lose small updates; set "
                "model.dtype=float32 with model.autocast=float16, or train adapters with model.lora.rank"
            )
        return self


class ReferenceSection(Section):
    """What the policy is held to, where that isn't the policy at step 0.

    name: a model of its own (a folder or hub id); init_from: an adapter or run on it. precompute: compute its
    log-probabilities over the data once, before training, and keep them in the run folder.
    """

    name: str | None = None
    init_from: Path | None = None
    precompute: StrictBool = False

    @model_validator(mode="after")
    def _says_something(self) -> ReferenceSection:
        if self.name is None and self.init_from is None and not self.precompute:
            raise ValueError("reference is empty: give reference.name, reference.init_from or reference.precompute")
        return self


class CriticSection(Section):
    """The value model. kind: an adapter and a head on the policy's base, a head on the policy's own hidden states, or
    a model of its own (name: a folder or hub id; a reward model's is a common start).

    init_from: an adapter or run to start from; detach: of kind head, keep its gradient out of the policy.
    """

    kind: Literal["auto", "adapter", "head", "model"] = "auto"
    name: str | None = None
    init_from: Path | None = None
    lora: LoraSection | None = None
    detach: StrictBool = False

    @model_validator(mode="after")
    def _fits_its_kind(self) -> CriticSection:
        if self.name is not None and self.kind in ("adapter", "head"):
            raise ValueError(f"critic.name has no effect with critic.kind: {self.kind}; remove it or set kind: model")
        if self.detach and self.kind != "head":
            raise ValueError(f"critic.detach has no effect with critic.kind: {self.kind}; remove it or set kind: head")
        if self.kind == "head" and (self.lora is not None or self.init_from is not None):
            raise ValueError("critic.kind: head has no adapter to start from; remove critic.lora and critic.init_from")
        return self


class OptimSection(Section):
    """The optimiser, and what one step sees: batch_size x gradient_accumulation tasks to roll out, or records.

    gradient_accumulation: the step adds up that many micro-batches of batch_size; token_budget: distinct tokens of a
    micro-batch. Neither changes a gradient. head_learning_rate, critic_learning_rate: of scalar heads made from
    scratch, and of the critic with its head (learning_rate unless given).
    schedule: plateau multiplies the rate by plateau_factor where `plateau_metric` hasn't improved for
    plateau_patience evaluations. max_gap: a run stops where sampler and trainer disagree by more nats a token (the k3
    estimate of their KL).
    """

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    critic_learning_rate: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    warmup_steps: Count = 0
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    plateau_metric: str | None = None
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Count = 2
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_gap: Annotated[float, Field(gt=0)] = 0.1
    token_budget: Positive = 8192
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 4
    gradient_accumulation: Annotated[int, Field(ge=1, le=MOST)] = 1

    @property
    def groups_per_step(self) -> int:
        """Tasks or records that one step sees."""
        return self.batch_size * self.gradient_accumulation

    @model_validator(mode="after")
    def _minimum_below_peak(self) -> OptimSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optim.min_learning_rate ({self.min_learning_rate:g}) is above optim.learning_rate "
                f"({self.learning_rate:g}): lower it"
            )
        if self.schedule != "plateau":
            for name in ("plateau_metric", "plateau_factor", "plateau_patience"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"optim.{name} has no effect with schedule: {self.schedule}; remove it or set schedule: plateau"
                    )
        if self.schedule == "constant" and self.min_learning_rate:
            raise ValueError(
                "optim.min_learning_rate has no effect with schedule: constant; remove it or set another schedule"
            )
        return self


class EvalSection(Section):
    """Held-out evaluation. every: steps between evaluations, 0 for the end only.

    tasks: held-out tasks of an environment; max_samples: at most so many held-out records or tasks; at_start: evaluate
    the untrained model too; baselines: run the environment's controllers without a language model too; temperature: 0
    is greedy; metrics: further measurements of the held-out replies (pass_at_k, or "file.py:function").
    """

    every: Count = 0
    tasks: Positive = 16
    max_samples: Positive | None = None
    at_start: StrictBool = True
    baselines: StrictBool = True
    temperature: Annotated[float, Field(ge=0)] = 0.0
    metrics: tuple[dict[str, Any], ...] = ()

    @property
    def task_count(self) -> int:
        """Held-out tasks to play."""
        return self.tasks if self.max_samples is None else min(self.tasks, self.max_samples)


class EarlyStoppingSection(Section):
    """Stop where a metric hasn't improved by more than min_delta for `patience` of its measurements.

    metric: a logged name; the held-out return, or the held-out loss where there is no environment, unless given.
    """

    metric: str | None = None
    mode: Literal["max", "min", "auto"] = "auto"
    patience: Positive = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class CheckpointSection(Section):
    """What is kept to go on from. every: steps between checkpoints; minutes: wall-clock minutes between them; with
    neither, the end only. keep: how many of the newest stay.

    best: a metric by which one more stays, the best; mode: whether it should rise or fall. background: write while
    training goes on, from a copy of what is trained.
    """

    every: Count = 0
    minutes: Annotated[float, Field(gt=0)] | None = None
    keep: Positive = 3
    best: str | None = None
    mode: Literal["max", "min", "auto"] = "auto"
    background: StrictBool = True

    @model_validator(mode="after")
    def _mode_of_a_metric(self) -> CheckpointSection:
        if self.best is None and self.mode != "auto":
            raise ValueError("checkpoint.mode has no effect without checkpoint.best; remove it or name a metric")
        return self


#: What `sapwood.guards` can warn of; docs/guards.md describes each.
WarningName = Literal[
    "not_finite",
    "sampler_gap",
    "entropy_collapse",
    "entropy_explosion",
    "kl_runaway",
    "policy_lag",
    "clip_fraction",
    "target_kl_stops",
    "reward_hacking",
    "reward_collapse",
    "reward_stalled",
    "no_signal",
    "env_failures",
    "parse_failures",
    "length_limit",
    "value_divergence",
    "gradient_spike",
    "loss_divergence",
    "overfitting",
    "chosen_falls",
    "too_easy",
]
Limit = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(gt=1)]


class GuardLimits(Section):
    """What each warning is raised at, by its name; docs/guards.md says what is measured."""

    sampler_gap: Share = 0.25
    entropy_collapse: Share = 0.1
    entropy_explosion: Factor = 2.0
    kl_runaway: Limit = 2.0
    policy_lag: Limit = 0.3
    clip_fraction: Share = 0.5
    target_kl_stops: Annotated[int, Field(ge=1, le=60)] = 10
    reward_hacking: Factor = 3.0
    reward_collapse: Limit = 0.25
    reward_stalled: Positive = 100
    no_signal: Share = 0.75
    env_failures: Share = 0.2
    parse_failures: Share = 0.5
    length_limit: Share = 0.5
    value_divergence: Factor = 5.0
    gradient_spike: Factor = 10.0
    loss_divergence: Factor = 1.5
    overfitting: Limit = 0.05
    chosen_falls: Limit = 0.5
    too_easy: Share = 0.99


class GuardsSection(Section):
    """When a run warns, and when it stops by itself. max_skipped: updates in a row that may be left out because loss or
    gradient isn't finite; keep_evidence: how many such batches stay in evidence/, the newest ones.

    stop_on: warnings that end the run; off: warnings that are not raised; limits: what they are raised at.
    """

    max_skipped: Count = 3
    keep_evidence: Count = 4
    stop_on: tuple[WarningName, ...] = ()
    off: tuple[WarningName, ...] = ()
    limits: GuardLimits = Field(default_factory=GuardLimits)

    @model_validator(mode="after")
    def _no_warning_twice(self) -> GuardsSection:
        for name in self.off:
            if name in self.stop_on:
                raise ValueError(f"guards.stop_on and guards.off both name {name}; keep one")
            if name in self.limits.model_fields_set and getattr(self.limits, name) != _default_limit(name):
                raise ValueError(f"guards.limits.{name} has no effect: guards.off names it; remove one")
        return self


def _default_limit(name: str) -> Any:
    return GuardLimits.model_fields[name].default


class SamplesSection(Section):
    """every: steps between files of what was learnt from, 0 for none; 1 for rollouts and 0 for data unless given."""

    every: Count | None = None
