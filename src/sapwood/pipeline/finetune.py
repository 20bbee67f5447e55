"""Stage 5: the model learns from its own kept decisions, as a run of Sapwood's with the algorithm `distill`.

The run's folder is the stage's: recipe, metrics, checkpoints and pictures are those of `sapwood train`, and so is going
on after a kill. At its end the trained adapter (or model) is copied to `final_model/`, which opens with PEFT or
transformers as it is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sapwood import resume
from sapwood.algorithms.distill import Distill
from sapwood.config import Recipe, load_recipe, parse_recipe
from sapwood.data import recordings
from sapwood.envs.hvac.layout import misfit
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import DataError, StorageError
from sapwood.models.load import find_adapter, is_adapter
from sapwood.paths import expanded
from sapwood.pipeline.digests import digests
from sapwood.pipeline.rollout import SHORT, THOUGHTS
from sapwood.progress import Progress
from sapwood.resume import Start
from sapwood.run import Run, free_name, writing
from sapwood.sections import Count, CriticSection, LoraSection, ModelSection, Positive, Section
from sapwood.train import TrainResult, train

FINAL, INPUTS = "final_model", "inputs.json"


class FinetuneOptions(Section):
    """How the kept decisions are learnt. algorithm: options of `distill`; critic: as in a recipe.

    epochs: passes over the decisions; batch_size x gradient_accumulation: decisions of a step, which are computed
    together as far as token_budget lets them, so that their common examples are read once; the gradient is the same.
    lora_rank, lora_alpha (twice the rank), lora_dropout: of a new adapter; one that is gone on with keeps its own.
    critic_learning_rate: of the critic and its head. eval_fraction: of the decisions held out, by state; eval_tasks:
    held-out days that are played before and after (0: none, they are stage 6's); max_new_tokens, stop: of the replies
    there. checkpoint_every: steps, once an epoch unless given; keep: how many stay.
    """

    epochs: Annotated[float, Field(gt=0)] = 3
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Positive = 2
    gradient_accumulation: Positive = 8
    lora_rank: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    token_budget: Positive = 8192
    algorithm: Distill = Field(default_factory=Distill)
    critic: CriticSection = Field(default_factory=lambda: CriticSection(kind="head", detach=True))
    critic_learning_rate: Annotated[float, Field(gt=0)] | None = 1e-3
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    eval_tasks: Count = 0
    max_new_tokens: Positive | None = None
    stop: tuple[str, ...] = ()
    checkpoint_every: Positive | None = None
    keep: Positive = 3

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> FinetuneOptions:
        if not self.eval_tasks and (self.max_new_tokens is not None or self.stop):
            raise ValueError("finetune.max_new_tokens and finetune.stop have no effect without finetune.eval_tasks")
        if not self.algorithm.needs.values:
            for name in ("critic", "critic_learning_rate"):
                default = type(self).model_fields[name].get_default(call_default_factory=True)
                if getattr(self, name) not in (default, None):
                    raise ValueError(f"finetune.{name} has no effect: finetune.algorithm learns no values; remove it")
        return self


@dataclass(frozen=True)
class FinetuneResult:
    """What the stage left. run_dir: the run's folder; final_model: the trained adapter or model; steps: made in all."""

    run_dir: Path
    final_model: Path
    steps: int
    train: TrainResult


def run(
    options: FinetuneOptions,
    data: Path,
    model: ModelSection,
    family: Hvac,
    out_dir: Path,
    progress: Progress,
    seed: int,
    *,
    fresh: bool = False,
) -> FinetuneResult:
    """Learn from `data` (stage 4's decisions) in the folder `out_dir`, going on with an unfinished run of the same.

    model: what made the recording (with init_from, an adapter of an earlier round). fresh: begin anew even so. A run of
    another recipe or of other decisions that is in the way is kept under another name. Raises SapwoodError for what a
    user can act on; Stopped where a signal ended it, which was saved.
    """
    file = recordings.read(data)
    differing = misfit(file.world, family)
    if differing:
        raise DataError(
            f"{data}: its decisions were made in another world ({differing}); use the env section that they were "
            "recorded with, or record others with `sapwood pipeline RECIPE --stage rollout`."
        )
    made = recipe(options, data, model, family, out_dir, seed, len(file.decisions))
    digest = " ".join(digests(data, model.init_from, family.examples))
    opened, start = opened_run(made, digest, progress, fresh)
    with opened:
        for note in start.notes:
            progress.note(note)
        result = train(made, opened, progress, start)
    final = export(result.policy_dir, out_dir / FINAL)
    return FinetuneResult(out_dir, final, steps_of(result.policy_dir), result)


def recipe(
    options: FinetuneOptions, data: Path, model: ModelSection, family: Hvac, out_dir: Path, seed: int, decisions: int
) -> Recipe:
    """The recipe of the stage's run. decisions: how many the file has, for checkpoints once an epoch."""
    algorithm = {"name": "distill", **options.algorithm.model_dump(mode="json")}
    per_step = options.batch_size * options.gradient_accumulation
    an_epoch = max(1, math.ceil(decisions * (1.0 - options.eval_fraction) / per_step))
    with_critic = options.algorithm.needs.values
    plain: dict[str, Any] = {
        "run": {"dir": str(out_dir), "epochs": options.epochs, "seed": seed},
        "model": {**model.model_dump(mode="json"), "lora": _lora(options, model)},
        "data": {"sources": [{"path": str(data)}], "eval_fraction": options.eval_fraction},
        "algorithm": algorithm,
        "optim": {
            "learning_rate": options.learning_rate,
            "critic_learning_rate": options.critic_learning_rate if with_critic else None,
            "schedule": options.schedule,
            "warmup_steps": options.warmup_steps,
            "max_grad_norm": options.max_grad_norm,
            "token_budget": options.token_budget,
            "batch_size": per_step,
        },
        "eval": {"every": an_epoch},
        "checkpoint": {"every": options.checkpoint_every or an_epoch, "keep": options.keep},
    }
    if with_critic:
        plain["critic"] = options.critic.model_dump(mode="json")
    if options.eval_tasks:
        room = options.max_new_tokens or (THOUGHTS if family.reasoning else SHORT)
        plain["env"] = {"name": "hvac", **family.model_dump(mode="json")}
        plain["engine"] = {"name": "local", "max_new_tokens": room, "stop": list(options.stop)}
        plain["eval"]["tasks"] = options.eval_tasks
    return parse_recipe(plain)


def _lora(options: FinetuneOptions, model: ModelSection) -> dict[str, Any]:
    """The adapter to train. One that is gone on with has its own shape, unless another is asked for, which is refused
    where the run is built."""
    start = model.init_from
    given = {"lora_rank", "lora_alpha", "lora_dropout"} & options.model_fields_set
    if not given and start is not None and is_adapter(find_adapter(expanded(start))):
        return LoraSection().model_dump(mode="json")
    return {"rank": options.lora_rank, "alpha": options.lora_alpha, "dropout": options.lora_dropout}


def opened_run(made: Recipe, digest: str, progress: Progress, fresh: bool) -> tuple[Run, Start]:
    """The run in `run.dir` to go on with, or a new one; another that is in the way is kept under another name.

    digest: of the files that it learns from; fresh: begin anew even so.
    """
    folder = made.run.dir
    if (folder / "recipe.yaml").is_file():
        if not fresh and _same(folder, made, digest):
            start = resume.find(folder)
            before = load_recipe(folder)
            notes = [*start.notes, *resume.environment_notes(folder / "environment.json")]
            if start.step:
                notes.append(f"finetune: going on after step {start.step}")
            opened = Run.resume(made, start.step, pending=start.pending, aside=start.aside)
            return opened, replace(start, notes=tuple(notes), before=before)
        aside = free_name(folder)
        with writing(folder):
            folder.rename(aside)
        progress.note(f"finetune: {folder} held another run, which is kept as {aside}")
    opened = Run.create(made)
    opened.write_text(INPUTS, json.dumps({"data_sha256": digest}) + "\n")
    return opened, Start()


def _same(folder: Path, made: Recipe, digest: str) -> bool:
    """Whether the run in the folder has this recipe and these decisions."""
    try:
        told = json.loads((folder / INPUTS).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return told == {"data_sha256": digest} and load_recipe(folder) == made


def export(policy: Path, target: Path) -> Path:
    """Copy a checkpoint's policy to `target`, which is replaced once the copy is whole. Raises StorageError."""
    scratch = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    try:
        for leftover in (scratch, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(policy, scratch)
        if target.exists():
            target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{target}: can't be written ({error.strerror or error}); the trained model is in {policy}."
        ) from error
    return target


def steps_of(policy: Path) -> int:
    """The step of the checkpoint that a policy belongs to."""
    return int(os.path.basename(policy.parent).removeprefix("step_"))
