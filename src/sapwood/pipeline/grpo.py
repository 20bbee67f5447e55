"""The other way from the same start: on-policy GRPO in the same world with the same prompts, as a run of Sapwood's.

Self-distillation learns from days that were played once, before anything was learnt; GRPO plays anew at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapwood.config import Recipe, parse_recipe
from sapwood.envs.hvac.text import Hvac
from sapwood.pipeline import finetune
from sapwood.pipeline.digests import digests
from sapwood.pipeline.rollout import RolloutOptions
from sapwood.progress import Progress
from sapwood.sections import ModelSection
from sapwood.train import train

if TYPE_CHECKING:
    from sapwood.pipeline.recipe import GrpoOptions


@dataclass(frozen=True)
class GrpoResult:
    """What the stage left. run_dir: the run's folder; final_model: the trained adapter or model; steps: made in all."""

    run_dir: Path
    final_model: Path
    steps: int


def run(
    options: GrpoOptions,
    sampling: RolloutOptions,
    model: ModelSection,
    engine: Mapping[str, Any],
    family: Hvac,
    out_dir: Path,
    progress: Progress,
    seed: int,
    *,
    fresh: bool = False,
) -> GrpoResult:
    """Train in the folder `out_dir`, going on with an unfinished run of the same, and export `final_model/`.

    sampling: stop strings and token limit of the replies. fresh: begin anew even so. Raises SapwoodError; Stopped where
    a signal ended it, which was saved.
    """
    made = recipe(options, sampling, model, engine, family, out_dir, seed)
    digest = " ".join(digests(family.examples, model.init_from))
    opened, start = finetune.opened_run(made, digest, progress, fresh)
    with opened:
        for note in start.notes:
            progress.note(note)
        result = train(made, opened, progress, start)
    final = finetune.export(result.policy_dir, out_dir / finetune.FINAL)
    return GrpoResult(out_dir, final, finetune.steps_of(result.policy_dir))


def recipe(
    options: GrpoOptions,
    sampling: RolloutOptions,
    model: ModelSection,
    engine: Mapping[str, Any],
    family: Hvac,
    out_dir: Path,
    seed: int,
) -> Recipe:
    """The recipe of the stage's run. Held-out days are stage 6's, so it plays none itself."""
    asked = sampling.sampling(family, options.temperature).model_dump(mode="json")
    lora = {"rank": options.lora_rank} if model.init_from is None else model.model_dump(mode="json")["lora"]
    world = {**family.model_dump(mode="json"), "train_horizon": min(options.train_horizon, family.horizon)}
    return parse_recipe(
        {
            "run": {"dir": str(out_dir), "steps": options.steps, "seed": seed},
            "model": {**model.model_dump(mode="json"), "lora": lora},
            "env": {"name": "hvac", **world},
            "rewards": [{"name": "env"}],
            "algorithm": {"name": "grpo", "group_size": options.group_size, "entropy_coef": options.entropy_coef},
            "engine": {"name": "local", **asked, **engine},
            "optim": {
                "learning_rate": options.learning_rate,
                "min_learning_rate": options.learning_rate / 10,
                "schedule": "cosine",
                "warmup_steps": min(options.warmup_steps, options.steps),
                "batch_size": options.batch_size,
                "token_budget": options.token_budget,
            },
            "eval": {"every": 0, "tasks": 1, "at_start": False, "baselines": False},
            "checkpoint": {"every": options.checkpoint_every, "keep": 2},
        }
    )
