"""The loop that every algorithm shares: roll out, score, assign credit, update, evaluate.

for step in steps:
    groups  = collect(tasks)                          # env x engine
    rows    = to_rows(groups)
    models.score(rows)                                # old and reference log-probabilities, no gradient
    rows    = algorithm.credit(groups, rows)          # advantages
    for update in updates(rows):                      # one optimiser step sees one update
        totals = count(update)                        # packing never changes a gradient
        for micro in pack(update, token_budget):
            algorithm.loss(models.forward(micro), micro, totals).backward()
        clip, optimizer.step()
    engine.load(policy)

sapwood train recipes/hvac_demo.yaml
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sapwood import checkpoint
from sapwood.algorithms import Algorithm, RowBatch, Totals
from sapwood.chat import Chat
from sapwood.config import Recipe
from sapwood.engines import Engine, Sampling
from sapwood.envs import EnvFamily
from sapwood.errors import TrainingStopped
from sapwood.evaluate import (
    EvalResult,
    EvalTable,
    build_chat,
    build_engine,
    evaluate_baselines,
    evaluate_policy,
    heading,
)
from sapwood.models.load import Policy, load_policy
from sapwood.models.roles import Models
from sapwood.ops.schedules import learning_rate
from sapwood.progress import Progress
from sapwood.rewards import Reward
from sapwood.rollout import collect, to_rows
from sapwood.run import Run
from sapwood.tree import pack
from sapwood.types import Group, Row, Task

#: Further rollouts that dynamic sampling may ask for in one step.
MAX_RESAMPLES = 3
BASE, TRAINED = "base model", "trained model"

# Streams of the run's seed, so that no two uses draw the same numbers.
_TASKS, _SAMPLING, _ORDER, _DROPOUT = range(4)


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: its folder, the trained policy's folder, the curve and the final evaluation."""

    run_dir: Path
    policy_dir: Path
    plot: Path | None
    table: EvalTable


def train(recipe: Recipe, run: Run | None = None, progress: Progress | None = None) -> TrainResult:
    """Train as the recipe says, into a fresh run folder (or the open one given).

    progress: where to report; a plain line a step unless given. Raises SapwoodError for what a user can act on.
    """
    recipe.check_trainable()
    with ExitStack() as stack:
        shown = progress or stack.enter_context(Progress())
        log = run or stack.enter_context(Run.create(recipe))
        shown.phase("loading")
        return Trainer.of(recipe, log, shown).run_all()


def derive(seed: int, *path: int) -> int:
    """A seed of its own for every use, in 0 .. 2**32 - 1."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint32)[0])


def split_updates(rows: Sequence[Row], updates: int, seed: int) -> list[list[Row]]:
    """Deal whole groups, in an order drawn from the seed, to at most `updates` parts of nearly equal size."""
    groups = sorted({row.group for row in rows})
    if updates == 1:
        return [list(rows)]
    order = np.random.default_rng(seed).permutation(groups)
    parts = [set(part.tolist()) for part in np.array_split(order, min(updates, len(groups)))]
    return [[row for row in rows if row.group in part] for part in parts]


@dataclass
class Trainer:
    """One run. `of` builds its parts from a recipe; the loop is `run_all`, a step is `step`."""

    recipe: Recipe
    log: Run
    progress: Progress
    family: EnvFamily
    algorithm: Algorithm
    rewards: list[Reward]
    policy: Policy
    models: Models
    engine: Engine
    chat: Chat
    optimizer: torch.optim.Optimizer
    results: dict[str, EvalResult] = field(default_factory=dict)

    @staticmethod
    def of(recipe: Recipe, run: Run, progress: Progress) -> Trainer:
        """Build everything that a run needs; the cheap parts that may refuse come first."""
        family, algorithm, rewards = recipe.build_env(), recipe.build_algorithm(), recipe.build_rewards()
        family.tasks("train", 1, recipe.run.seed)  # refuses an empty family before any weight is loaded
        policy = load_policy(recipe.model, recipe.run.seed)
        models = Models(policy, reference=algorithm.needs.reference_logprobs)
        optim = recipe.optim
        optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        engine, chat = build_engine(recipe, policy), build_chat(policy, recipe.model)
        return Trainer(recipe, run, progress, family, algorithm, rewards, policy, models, engine, chat, optimizer)

    def run_all(self) -> TrainResult:
        """Evaluate, train all steps, evaluate again; checkpoints, samples and metrics as the recipe asks."""
        recipe, steps = self.recipe, self.recipe.run.steps
        self.progress.note(checkpoint.describe(self.policy))
        if self.policy.fallback:
            self.progress.note(f"plain rows in place of the token tree: {self.policy.fallback}")
        self._evaluate_start()
        self.progress.start(steps)
        saved = None
        for step in range(1, steps + 1):
            metrics, timing = self.step(step)
            last = step == steps
            if last or (recipe.eval.every and step % recipe.eval.every == 0):
                metrics |= self._evaluate(step)
            self.log.log_metrics(step, metrics)
            self.log.log_timing(step, timing)
            self.progress.step(step, metrics, timing)
            if last or (recipe.checkpoint.every and step % recipe.checkpoint.every == 0):
                saved = checkpoint.save(self.policy, self.log.dir, step, recipe.checkpoint.keep)
        self.progress.stop()
        assert saved is not None
        table = self._table()
        self.log.write_text("evaluation.json", json.dumps(table.to_json(), indent=2) + "\n")
        return TrainResult(self.log.dir, saved, self.log.plot(), table)

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One rollout and its updates. Returns (metrics, timing): the former without wall-clock."""
        began = time.perf_counter()
        self.progress.phase("sampling")
        groups, rows = self._rollout(step)
        sampled = time.perf_counter()
        self.progress.phase("learning")
        seed = self.recipe.run.seed
        torch.manual_seed(derive(seed, _DROPOUT, step))
        order = derive(seed, _ORDER, step)
        first_update = split_updates(rows, self.algorithm.updates, order)
        self.models.score([m for update in first_update for m in self._pack(update)], self.algorithm.needs)
        rows_kept, metrics = self.algorithm.credit(groups, rows)
        metrics |= self._learn(rows_kept, step, order)
        learnt = time.perf_counter()
        self.engine.load(self.policy)
        if self.recipe.samples.every and step % self.recipe.samples.every == 0:
            self.log.save_samples(step, groups, rows_kept, self.chat.decode)
        tokens = sum(len(turn.token_ids) for group in groups for t in group.trajectories for turn in t.turns)
        metrics["reply_tokens"] = tokens / max(sum(len(t.turns) for g in groups for t in g.trajectories), 1)
        timing = {
            "sampling_seconds": sampled - began,
            "learning_seconds": learnt - sampled,
            "loading_seconds": time.perf_counter() - learnt,
            "sampled_tokens": tokens,
            "tokens_per_second": tokens / max(sampled - began, 1e-9),
        }
        return metrics, timing

    def _rollout(self, step: int) -> tuple[list[Group], list[Row]]:
        """A step's groups. With resampling, groups that can't teach are replaced, a bounded number of times."""
        wanted, seed = self.recipe.optim.batch_size, self.recipe.run.seed
        sampling = self.recipe.sampling()
        groups: list[Group] = []
        for attempt in range(1 + MAX_RESAMPLES):
            missing = wanted - len(groups)
            tasks = self.family.tasks("train", missing, derive(seed, _TASKS, step, attempt))
            fresh = collect(
                self.family,
                tasks,
                self.algorithm.attempts,
                self.engine,
                self.chat,
                sampling,
                derive(seed, _SAMPLING, step, attempt),
                max_context=self.policy.max_context,
                rewards=self.rewards,
            )
            last = attempt == MAX_RESAMPLES or not self.algorithm.resample
            groups += [group for group in fresh if last or self.algorithm.informative(group)]
            if last or len(groups) == wanted:
                break
        return groups, to_rows(groups, sampling.temperature)

    def _pack(self, rows: Sequence[Row]) -> list[list[Row]]:
        return pack(rows, self.recipe.optim.token_budget)

    def _learn(self, rows: list[Row], step: int, order: int) -> dict[str, float]:
        """All updates of a step; metrics are means over them. {} where no row can teach."""
        optim, algorithm = self.recipe.optim, self.algorithm
        rate = learning_rate(
            step,
            peak=optim.learning_rate,
            schedule=optim.schedule,
            warmup=optim.warmup_steps,
            total=self.recipe.run.steps,
            minimum=optim.min_learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not rows:
            return {"learning_rate": rate, "updates": 0}
        self.policy.model.train()
        reports = [
            self._update(update, step)
            for _ in range(algorithm.epochs)
            for update in split_updates(rows, algorithm.updates, order)
        ]
        self.policy.model.eval()
        means = {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}
        return {**means, "learning_rate": rate, "updates": len(reports)}

    def _update(self, rows: Sequence[Row], step: int) -> dict[str, float]:
        """One optimiser step over these rows, micro-batch by micro-batch."""
        totals = Totals.of(rows)
        sums: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for micro in self._pack(rows):
            forward = self.models.forward(micro, entropy_grad=self.algorithm.needs.entropy_grad)
            output = self.algorithm.loss(forward, RowBatch.of(micro, self.policy.device), totals)
            output.loss.backward()
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        parameters = self.policy.parameters()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.optim.max_grad_norm))
        self._guard(step, norm, sums)
        self.optimizer.step()
        return {**sums, "grad_norm": norm}

    def _guard(self, step: int, norm: float, sums: dict[str, float]) -> None:
        """Stop before a broken update reaches the weights."""
        if not math.isfinite(norm) or not math.isfinite(sums.get("loss", 0.0)):
            raise TrainingStopped(
                f"step {step}: loss {sums.get('loss')} and gradient norm {norm} are not finite; the weights are those "
                "of the step before. Lower optim.learning_rate, or use model.dtype=float32."
            )
        gap, limit = sums.get("gap_k3", 0.0), self.recipe.optim.max_gap
        if gap > limit:
            raise TrainingStopped(
                f"step {step}: sampler and trainer disagree by {gap:.3g} nats a token (limit optim.max_gap = "
                f"{limit:g}), so the samples don't come from the policy that learns. Use one dtype for both, or raise "
                "optim.max_gap and correct for the gap with algorithm.gap_correction=token."
            )

    def _evaluate_start(self) -> None:
        if self.recipe.eval.baselines:
            self.progress.phase("evaluating baselines")
            self.results.update(evaluate_baselines(self.family, self._held_out(), self.progress.work))
        if self.recipe.eval.at_start:
            metrics = self._evaluate(0, BASE)
            self.log.log_metrics(0, metrics)
            self.progress.note(f"held-out return before training: {metrics['eval/return']:.3f}")

    def _held_out(self) -> list[Task]:
        return self.family.tasks("eval", self.recipe.eval.tasks, self.recipe.run.seed)

    def _eval_sampling(self) -> Sampling:
        return self.recipe.sampling().model_copy(update={"temperature": self.recipe.eval.temperature})

    def _evaluate(self, step: int, name: str = TRAINED) -> dict[str, float]:
        """Play the held-out tasks with the current policy. The seed is the run's, so that evaluations compare."""
        self.progress.phase("evaluating")
        result = evaluate_policy(
            self.family,
            self._held_out(),
            self.engine,
            self.chat,
            self._eval_sampling(),
            self.recipe.run.seed,
            self.policy.max_context,
            name=name,
            progress=self.progress.work,
        )
        self.results[name] = result
        metrics = {"eval/return": result.interval.mean, "eval/low": result.interval.lo, "eval/high": result.interval.hi}
        return metrics if result.parsed is None else {**metrics, "eval/parsed": result.parsed}

    def _table(self) -> EvalTable:
        title = heading(self.family, self._held_out(), self._eval_sampling())
        compare = (TRAINED, BASE) if BASE in self.results else None
        return EvalTable(title, tuple(self.results.values()), compare)
