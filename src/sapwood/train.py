"""The loop that every algorithm shares: groups, rows, scores, credit, updates, evaluation.

for step in steps:
    groups = source.groups(step)                      # rollouts, or data
    rows   = to_rows(groups)
    models.score(rows)                                # old, reference, values: no gradient
    rows   = algorithm.credit(groups, rows)           # advantages, returns
    for update in updates(rows):                      # one optimiser step sees one update
        totals = count(update)                        # packing never changes a gradient
        for micro in pack(update, token_budget):
            algorithm.loss(models.forward(micro), micro, totals).backward()
        clip, optimizer.step(); algorithm.adapt(stats)
    engine.load(policy)

sapwood train recipes/hvac_demo.yaml
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sapwood import checkpoint, memory, resume
from sapwood.algorithms import Algorithm
from sapwood.chat import Chat
from sapwood.config import Recipe, dump_recipe
from sapwood.errors import BudgetError, ConfigError, SapwoodError, Stopped, StorageError, TrainingStopped
from sapwood.evaluate import EvalTable, MetricTable
from sapwood.guards import Alarm, Watch, reply_metrics
from sapwood.learner import Learner
from sapwood.models.load import Policy
from sapwood.models.roles import Models
from sapwood.optimizer import Stepper, counters, higher_is_better, set_counters
from sapwood.parts import Parts, build
from sapwood.progress import Progress
from sapwood.resume import Start
from sapwood.rollout import to_rows
from sapwood.run import Run
from sapwood.signals import Interrupted, Stopping
from sapwood.source import DROPOUT, GLOBAL, ORDER, derive
from sapwood.types import Group, Ids, Row

BASE, TRAINED = "base model", "trained model"

#: Between two looks at a full disk.
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: its folder, the trained policy's folder, the curve and the final evaluation.

    table: held-out returns, where an environment is played; figures: held-out metrics, where data is learned from.
    """

    run_dir: Path
    policy_dir: Path
    plot: Path | None
    table: EvalTable | None
    figures: MetricTable | None = None


def train(
    recipe: Recipe, run: Run | None = None, progress: Progress | None = None, start: Start | None = None
) -> TrainResult:
    """Train as the recipe says, into a fresh run folder (or the open one given).

    progress: where to report; a plain line a step unless given. start: where a resumed run goes on (`resume.find`),
    with its folder opened by `Run.resume`. Raises SapwoodError for what a user can act on; Stopped where a signal
    ended the run, which was saved first.
    """
    recipe.check_trainable()
    with ExitStack() as stack:
        shown = progress or stack.enter_context(Progress())
        log = run or stack.enter_context(Run.create(recipe))
        shown.phase("loading")
        return Trainer.of(recipe, log, shown, start or Start()).run_all()


@dataclass
class Trainer:
    """One run. `of` builds its parts from a recipe; the loop is `run_all`, a step is `step`.

    done: updates made; pending: metrics and timing of the last step while its evaluation is to come.
    """

    recipe: Recipe
    log: Run
    progress: Progress
    parts: Parts
    first_weights: str = ""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    done: int = 0
    pending: tuple[dict[str, float], dict[str, float]] | None = None
    finished: str | None = None
    watch: Watch = field(init=False)
    learner: Learner = field(init=False)
    _stopping: Stopping = field(default_factory=Stopping)
    _last: dict[str, float] = field(default_factory=dict)
    _kept: dict[str, Any] | None = None
    _saved_step: int = -1
    _saved_at: float = field(default_factory=time.monotonic)
    _waiting: bool = False
    _waited: float = 0.0

    def __post_init__(self) -> None:
        parts = self.parts
        self.watch = Watch.of(self.recipe, parts.algorithm.learns_from)
        self.learner = Learner(
            self.recipe,
            parts.algorithm,
            parts.models,
            parts.stepper,
            self.log,
            self.progress,
            parts.steps,
            self._decode,
            parts.reference_cache,
        )

    @staticmethod
    def of(recipe: Recipe, run: Run, progress: Progress, start: Start = Start()) -> Trainer:  # noqa: B008  (frozen)
        """Build everything that a run needs, and put it where the run left off."""
        _seed_globals(recipe.run.seed, 0)
        parts = build(recipe, run.dir, progress)
        trainer = Trainer(recipe, run, progress, parts, resume.fingerprint(parts.models))
        if start.folder is not None:
            with resume.restoring(start.folder):
                trainer._restore(start)
            span = (int(start.state["steps"]), parts.steps)
            if start.before is not None and (note := resume.schedule_note(start.before, recipe, span, start.step)):
                parts.notes.append(note)
        return trainer

    @property
    def algorithm(self) -> Algorithm:
        """What is trained by."""
        return self.parts.algorithm

    @property
    def policy(self) -> Policy:
        """What is trained."""
        return self.parts.policy

    @property
    def models(self) -> Models:
        """Every role."""
        return self.parts.models

    @property
    def chat(self) -> Chat:
        """The policy's chat."""
        return self.parts.chat

    @property
    def stepper(self) -> Stepper:
        """The optimiser."""
        return self.parts.stepper

    def run_all(self) -> TrainResult:
        """Evaluate, train all steps, evaluate again; checkpoints, samples and metrics as the recipe asks."""
        section, best = self.recipe.checkpoint, self.recipe.checkpoint.best
        higher = section.mode == "max" or (section.mode == "auto" and best is not None and higher_is_better(best))
        self.log.when_full = self._wait_for_space
        writer = checkpoint.Writer(
            self.log.dir, section.keep, best, higher, background=section.background, when_full=self._wait_for_space
        )
        with self._stopping, writer:
            try:
                return self._run(writer)
            except Interrupted:
                raise self._stop(writer) from None
            except Exception:
                self._rescue(writer)
                raise

    def _run(self, writer: checkpoint.Writer) -> TrainResult:
        steps = self.parts.steps
        for note in self.parts.notes:
            self.progress.note(note)
        self.log.event("resume" if self.done else "start", f"{steps - self.done} of {steps} steps to make", self.done)
        self._tell_trackers()
        if self.done == 0:
            with self._stopping.interruptible():
                self._evaluate_start()
        if self.parts.reference_cache is not None:
            self.progress.phase("reference log-probabilities")
            with self._stopping.interruptible():
                self.parts.reference_cache.build(self.learner.scored, self.learner.pack, self.progress.work)
        self.progress.start(steps, done=self.done)
        if self.finished is not None:
            self.progress.note(f"nothing is left to do ({self.finished}); give more run.steps to go on.")
        while self.finished is None:
            if self.pending is None:
                self._advance(self.done + 1)
                if self._stopping.requested is not None:
                    raise Interrupted
            self._close(writer)
        if self._saved_step != self.done:
            self._save(writer)
        writer.wait()
        self.progress.stop()
        for what, count in self.parts.source.counts().items():
            self.progress.note(f"data: {what}: {count:,}")
        result = self._result(checkpoint.folder_of(self.log.dir, self.done) / "policy")
        self.log.event("finish", self.finished, self.done)
        return result

    def _advance(self, step: int) -> None:
        """Make step `step`'s updates; its metrics wait for what is measured after them."""
        self.pending = self.step(step)
        self.done = step

    def _close(self, writer: checkpoint.Writer) -> None:
        """Measure what is due after the last updates, write the step's rows and maybe a checkpoint."""
        assert self.pending is not None
        recipe, step, (learnt, timing) = self.recipe, self.done, self.pending
        metrics, began = dict(learnt), time.perf_counter()
        due = step == self.parts.steps or bool(recipe.eval.every and step % recipe.eval.every == 0)
        self._keep()
        if due:
            with self._stopping.interruptible():
                metrics |= self._evaluate(TRAINED)
        watchers = self._watcher_state()
        last = self._see(metrics, due) or step == self.parts.steps
        if last and not due:
            try:
                with self._stopping.interruptible():
                    metrics |= self._evaluate(TRAINED)
            except Interrupted:
                self._set_watchers(watchers)  # they see this step again on resuming
                raise
        self.log.log_metrics(step, metrics)
        waited, self._waited = writer.stalled - self._waited, writer.stalled
        evaluated = {"evaluation_seconds": time.perf_counter() - began} if due or last else {}
        self.log.log_timing(step, {**timing, **evaluated, "checkpoint_seconds": waited})
        self.progress.step(step, metrics, timing)
        self._tell_trackers()
        alarm = self._warn(step, metrics)
        self.pending, self._last, self._kept = None, metrics, None
        if last:
            self.finished = "all steps are made" if step == self.parts.steps else "stopped early"
        elif alarm is not None or self._checkpoint_due(step):
            self._save(writer)
        if alarm is not None:
            writer.wait()
            raise TrainingStopped(alarm.reason_to_stop())

    def _warn(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Tell what the guards make of a step; the first warning that is to stop the run."""
        alarms = self.watch.see(step, metrics)
        for alarm in alarms:
            self.log.warn(alarm.record())
            self.progress.warn(alarm.sentence())
        return next((alarm for alarm in alarms if alarm.stop), None)

    def _checkpoint_due(self, step: int) -> bool:
        section = self.recipe.checkpoint
        if section.every and step % section.every == 0:
            return True
        if section.minutes is None or time.monotonic() - self._saved_at < 60 * section.minutes:
            return False
        self.log.event("checkpoint", f"after {section.minutes:g} minutes", step)
        return True

    # --- saving and resuming ------------------------------------------------------------------------------------

    def _save(self, writer: checkpoint.Writer) -> None:
        metrics = self._last if self.pending is None else self.pending[0]
        self.log.sync()
        writer.submit(
            lambda: checkpoint.snapshot(self.models, self.done, self._state(), metrics, dump_recipe(self.recipe))
        )
        # One without its evaluation is written again once that is made.
        self._saved_at, self._saved_step = time.monotonic(), self.done if self.pending is None else -1
        self.log.plot_soon()

    def _tell_trackers(self) -> None:
        for note in self.log.notes():
            self.progress.note(note)

    def _stop(self, writer: checkpoint.Writer) -> Stopped:
        """Save as things stand, and say so."""
        self.progress.phase("saving")
        why = self._stopping.reason
        if self.done and self._saved_step != self.done:
            self._save(writer)
        writer.wait()
        self.log.event("stop", f"by {why}", self.done)
        self.progress.stop()
        self.log.plot()
        told = self.log.saved() if self.done else "nothing had been learnt yet."
        return Stopped(
            f"stopped by {why}; {told} Go on with: sapwood train --resume {self.log.dir}", self._stopping.exit_code
        )

    def _rescue(self, writer: checkpoint.Writer) -> None:
        """Something failed: keep the last finished step, unless an update of the next has changed the weights."""
        if self.done and self._saved_step != self.done and not self.learner.touched:
            with contextlib.suppress(SapwoodError):  # what failed first is what is told
                self._save(writer)
                writer.wait()

    def _wait_for_space(self, path: Path) -> None:
        """The disk is full: wait until there is some room, or until the run is asked to stop."""
        if not self._waiting:
            self._waiting = True
            self.progress.note(f"the disk is full: waiting to write {path}. Free some space and the run goes on.")
            logging.getLogger("sapwood").warning("the disk is full: waiting to write %s", path)
        if self._stopping.requested is not None:
            raise StorageError(f"{path}: the disk is full, so this can't be saved; what was written before is whole.")
        time.sleep(POLL_SECONDS)

    def _watcher_state(self) -> dict[str, Any]:
        early, plateau = self.parts.early_stopping, self.stepper.plateau
        return {
            "early_stopping": None if early is None else counters(early),
            "plateau": None if plateau is None else counters(plateau),
        }

    def _set_watchers(self, state: Mapping[str, Any]) -> None:
        for watcher, kept in (
            (self.parts.early_stopping, state["early_stopping"]),
            (self.stepper.plateau, state["plateau"]),
        ):
            if watcher is not None and kept is not None:
                set_counters(watcher, kept)

    def _state(self) -> dict[str, Any]:
        """Everything that the next step depends on, beside whole models, which their folders hold."""
        tasks = self.parts.tasks
        return {
            "step": self.done,
            "steps": self.parts.steps,
            "pending": None if self.pending is None else list(self.pending),
            "finished": self.finished,
            "metrics": self._last,
            "first_weights": self.first_weights,
            "parameters": resume.trained(self.models),
            "stepper": self.stepper.state(),
            "watchers": self._watcher_state(),
            "learner": self.learner.state(),
            "engine": {} if self.parts.engine is None else self.parts.engine.state(),
            "guards": self.watch.state(),
            **(self._kept or self._between()),
            "tasks": None if tasks is None else tasks.state(),
            "evaluations": self.evaluations,
        }

    def _restore(self, start: Start) -> None:
        """Put freshly built parts into the state of a checkpoint."""
        state = start.state
        assert start.folder is not None
        if state["first_weights"] != self.first_weights:
            raise StorageError(
                f"{start.folder}: the run began with other weights than model.init_from or model.name gives today, so "
                "it can't go on from them as it was; put them back, or start another run from this checkpoint with "
                "model.init_from."
            )
        resume.load_weights(self.models, start.folder, state)
        self.stepper.load_state(state["stepper"])
        self._set_watchers(state["watchers"])
        self.learner.load_state(state["learner"])
        self.watch.load_state(state["guards"])
        self.algorithm.load_state(state["algorithm"])
        self.parts.source.load_state(state["source"])
        if self.parts.tasks is not None and state["tasks"] is not None:
            self.parts.tasks.load_state(state["tasks"])
        self.evaluations = {name: dict(found) for name, found in state["evaluations"].items()}
        self.done, self._saved_step = start.step, -1 if start.pending else start.step
        self._last = dict(state["metrics"])
        early = self.parts.early_stopping
        if state["pending"] is not None:
            learnt, timing = state["pending"]
            self.pending = (dict(learnt), dict(timing))
        elif start.step >= self.parts.steps or (early is not None and early.waited >= early.patience):
            self.finished = state["finished"]
        if self.parts.engine is not None:
            self.parts.engine.load_state(state["engine"])
            self.parts.engine.load(self.policy)

    # --- a step -------------------------------------------------------------------------------------------------

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One batch and its updates. Returns (metrics, timing): the former without wall-clock."""
        began = time.perf_counter()
        seed = self.recipe.run.seed
        _seed_globals(seed, step)
        order = derive(seed, ORDER, step)
        self.progress.phase("sampling" if self.algorithm.learns_from == "rollouts" else "reading")
        # Until its first update nothing is learnt: a run that ends there is at the end of the step before.
        self._keep()
        with self._stopping.interruptible():
            groups = memory.retry(lambda: self.parts.source.groups(step), self._shrink_engine)
            rows = to_rows(groups, self.parts.source.temperature)
        gathered = time.perf_counter()
        self.progress.phase("learning")
        torch.manual_seed(derive(seed, DROPOUT, step))
        metrics = self.algorithm.begin(step, self.parts.steps) | self.parts.source.metrics()
        self.learner.score(groups, rows, step, order)
        kept, credited = self.algorithm.credit(groups, rows)
        metrics |= credited
        taught = [row for row in kept if row.scored]
        metrics |= self.learner.learn(groups, taught, step, order, keep=self._samples_due(step))
        self.algorithm.finish(metrics)
        metrics |= self.algorithm.derived(metrics)
        learnt = time.perf_counter()
        if self.parts.engine is not None:
            self.parts.engine.load(self.policy)
        if self._samples_due(step):
            self.log.save_samples(step, groups, kept, self._decode)
        if self.parts.examples:
            metrics["epoch"] = step * self.recipe.optim.groups_per_step / self.parts.examples
        metrics |= reply_metrics(groups, sampled=self.algorithm.learns_from == "rollouts")
        timing = self._timing(groups, rows, began, gathered, learnt)
        self._kept, self.learner.touched = None, False
        return {name: value for name, value in metrics.items() if not name.startswith("_")}, timing

    def _between(self) -> dict[str, Any]:
        """The state that sampling, credit and evaluation change."""
        return {"algorithm": self.algorithm.state(), "source": self.parts.source.state()}

    def _keep(self) -> None:
        """What is saved from here on is the state of this moment, until what follows is done."""
        self._kept, self.learner.touched = checkpoint.copied(self._between()), False

    def _shrink_engine(self) -> None:
        """Memory ran out in sampling: try again with a smaller engine, from where the sampling began."""
        assert self._kept is not None
        engine = self.parts.engine
        if engine is None or not engine.shrink():
            raise BudgetError(
                "memory ran out in sampling, and the engine can't take less; lower engine.max_new_tokens or the length "
                "of prompts, quantise the base (model.quantize) or choose a smaller model."
            )
        self.parts.source.load_state(self._kept["source"])
        told = "memory ran out in sampling: the engine takes fewer replies and tokens at once from here on"
        self.log.event("memory", told, self.done)
        self.progress.warn(told)

    def _samples_due(self, step: int) -> bool:
        every = self.recipe.samples.every
        return bool(every and step % every == 0)

    def _decode(self, ids: Ids) -> str:
        return self.chat.decode(ids, skip_special_tokens=False)

    def _timing(
        self, groups: Sequence[Group], rows: Sequence[Row], began: float, gathered: float, learnt: float
    ) -> dict[str, float]:
        """Seconds and rates; tokens/s of sampling for rollouts, of everything for data."""
        sampled = self.algorithm.learns_from == "rollouts"
        tokens = sum(row.scored for row in rows)
        timing = {
            "sampling_seconds": gathered - began,
            "learning_seconds": learnt - gathered,
            "loading_seconds": time.perf_counter() - learnt,
            "trained_tokens_per_second": tokens / max(learnt - gathered, 1e-9),
        }
        rate = tokens / max(gathered - began, 1e-9) if sampled else tokens / max(learnt - began, 1e-9)
        return {**timing, "sampled_tokens" if sampled else "tokens": tokens, "tokens_per_second": rate}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def _evaluate_start(self) -> None:
        if self.parts.tasks is not None and self.recipe.eval.baselines:
            self.progress.phase("evaluating baselines")
            self.parts.tasks.baselines(self.progress.work)
        self._keep()
        if self.recipe.eval.at_start:
            metrics = self._evaluate(BASE)
            self.log.log_metrics(0, metrics)
            self._warn(0, metrics)
            self.progress.note(f"held-out before training: {_told(metrics)}")

    def _evaluate(self, name: str) -> dict[str, float]:
        """Held-out tasks and records with the current policy. The seed is the run's, so that evaluations compare."""
        self.progress.phase("evaluating")
        _seed_globals(self.recipe.run.seed, self.done)
        metrics: dict[str, float] = {}
        if self.parts.records is not None:
            records = self.parts.records
            self.evaluations[name] = self.learner.within_memory(
                lambda: records.measure(self.learner.pack), to_rows(records.groups, 1.0)
            )
            metrics |= self.evaluations[name]
        if self.parts.tasks is not None:
            tasks = self.parts.tasks
            metrics |= memory.retry(lambda: tasks.play(name, self.progress.work), self._shrink_engine)
            if self.recipe.samples.every:
                self.log.save_samples(self.done, self.parts.tasks.played, decode=self._decode, name="eval")
            # The engine would keep these prompts, and the next step's numbers would tell: a prefix that both share is
            # computed among other rows here, and differs in its last bits. A resumed run has no such past.
            assert self.parts.engine is not None
            self.parts.engine.load(self.policy)
        return {f"eval/{key}": value for key, value in metrics.items()}

    def _see(self, metrics: Mapping[str, float], evaluated: bool) -> bool:
        """Show a step's metrics to the plateau schedule and to early stopping; True to stop."""
        plateau, early = self.stepper.plateau, self.parts.early_stopping
        if plateau is not None:
            if math.isnan(plateau.best):
                self._check_measured("optim.plateau_metric", plateau.metric, metrics, evaluated)
            if plateau.metric in metrics:
                plateau.see(metrics[plateau.metric])
        if early is None:
            return False
        if math.isnan(early.best):
            self._check_measured("early_stopping.metric", early.metric, metrics, evaluated)
        stop = early.metric in metrics and early.see(metrics[early.metric])
        if stop:
            self.progress.note(f"stopped early: {early.metric} has not improved for {early.patience} measurements")
        return stop

    def _check_measured(self, option: str, name: str, metrics: Mapping[str, float], evaluated: bool) -> None:
        """A metric that was never seen must be there when metrics of its kind are, or it is watched in vain.

        Some come and go (explained_variance, the rewards of KTO's undesirable replies), so one that was seen may.
        """
        expected = evaluated if name.startswith("eval/") else metrics.get("updates", 0) > 0
        if expected and name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"measured are {', '.join(sorted(metrics))}."
            raise ConfigError(f"{option}: no metric {name!r} is measured; {hint}")

    def _result(self, saved: Path) -> TrainResult:
        table = self.parts.tasks.table(TRAINED, BASE) if self.parts.tasks is not None else None
        figures = MetricTable(self.parts.records.heading, self.evaluations) if self.parts.records is not None else None
        told = {**(figures.to_json() if figures else {}), **(table.to_json() if table else {})}
        if told:
            self.log.write_text("evaluation.json", json.dumps(told, indent=2) + "\n")
        return TrainResult(self.log.dir, saved, self.log.plot(), table, figures)


def _seed_globals(seed: int, step: int) -> None:
    """Worlds and rewards of others may draw from the global generators: those follow from the run's seed too."""
    drawn = derive(seed, GLOBAL, step)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def _told(metrics: Mapping[str, float]) -> str:
    shown = ("eval/return", "eval/loss", "eval/accuracy", "eval/perplexity")
    found = {name.removeprefix("eval/"): metrics[name] for name in shown if name in metrics}
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "nothing was measured"
