"""What a step does with its rows: scoring, and updates that survive what is not finite and memory that runs out.

A skipped update leaves weights and optimiser as they are, and its batch is kept as evidence. Where memory runs out the
token budget is halved and the same update computed again: packing decides memory, never a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from sapwood import evidence, memory
from sapwood.algorithms import Algorithm, Forward, Needs, RowBatch, Totals
from sapwood.config import Recipe
from sapwood.errors import StorageError, TrainingStopped
from sapwood.memory import Budget
from sapwood.models.roles import Models
from sapwood.optimizer import Stepper
from sapwood.progress import Progress
from sapwood.reference import ReferenceCache
from sapwood.run import Run
from sapwood.tree import pack
from sapwood.types import Group, Ids, Row

T = TypeVar("T")


def split_updates(rows: Sequence[Row], updates: int, seed: int) -> list[list[Row]]:
    """Deal whole groups, in an order drawn from the seed, to at most `updates` parts of nearly equal size."""
    groups = sorted({row.group for row in rows})
    if updates == 1:
        return [list(rows)]
    order = np.random.default_rng(seed).permutation(groups)
    parts = [set(part.tolist()) for part in np.array_split(order, min(updates, len(groups)))]
    return [[row for row in rows if row.group in part] for part in parts]


@dataclass
class Learner:
    """Scores rows and learns from them.

    steps: of the run; decode: token ids to text, for evidence; skipped: updates in a row that weren't finite; touched:
    whether an update of the step under way has changed the weights; where: the step and update that is computed.
    """

    recipe: Recipe
    algorithm: Algorithm
    models: Models
    stepper: Stepper
    run: Run
    progress: Progress
    steps: int
    decode: Callable[[Ids], str]
    cache: ReferenceCache | None = None
    budget: Budget = field(init=False)
    skipped: int = 0
    touched: bool = False
    _step: int = 0

    def __post_init__(self) -> None:
        self.budget = Budget(self.recipe.optim.token_budget)
        memory.prepare(self.stepper.optimizer)

    # --- memory -------------------------------------------------------------------------------------------------

    def pack(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Micro-batches that fit the token budget."""
        optim = self.recipe.optim
        limit = optim.batch_size if optim.gradient_accumulation > 1 else None
        return pack(rows, self.budget.tokens, atomic=self.algorithm.atomic, max_groups=limit)

    def within_memory(self, compute: Callable[[], T], rows: Sequence[Row]) -> T:
        """What `compute` returns, on `pack`s of these rows; anew with half of the budget where memory runs out."""

        def halve() -> None:
            self.stepper.zero_grad()
            told = self.budget.halve(self.pack(rows), atomic=self.algorithm.atomic)
            self.run.event("memory", told, self._step)
            self.progress.warn(told)

        return memory.retry(compute, halve)

    # --- scoring ------------------------------------------------------------------------------------------------

    def scored(self, rows: Sequence[Row], needs: Needs) -> None:
        """Fill in what is needed, of rows packed as they come."""
        self.within_memory(lambda: self.models.score(self.pack(rows), needs), rows)

    def score(self, groups: Sequence[Group], rows: list[Row], step: int, order: int) -> None:
        """Fill in what the algorithm needs, packed as the first updates will be; its further rows join `rows`."""
        self._step = step
        extra, needs = self.algorithm.augment(rows), self.algorithm.needs
        if self.cache is not None:
            self.cache.fill(groups, rows)
            needs = self.cache.rest(needs)

        def compute() -> None:
            if self.cache is None and extra:  # together, so that the prompts that they share are computed once
                self.models.score(self.pack([*rows, *extra]), self.algorithm.extra_needs)
                return
            parts = split_updates(rows, self.algorithm.updates, order)
            self.models.score([micro for part in parts for micro in self.pack(part)], needs)
            self.models.score(self.pack(extra), self.algorithm.extra_needs)

        self.within_memory(compute, [*rows, *extra])
        rows += extra

    # --- learning -----------------------------------------------------------------------------------------------

    def learn(self, groups: Sequence[Group], rows: list[Row], step: int, order: int, keep: bool) -> dict[str, float]:
        """All updates of a step; metrics are means over them. Nothing but the rate where no row can teach.

        keep: leave the policy's log-probabilities of each update with its rows.
        """
        rate = self.stepper.schedule(step)
        if not rows:
            return {"learning_rate": rate, "updates": 0}
        self._step = step
        self.models.train()
        reports: list[dict[str, float]] = []
        skipped = 0
        for number, update in enumerate(self._updates(rows, order), 1):
            report = self._update(groups, update, number, keep)
            if report is None:
                skipped += 1
                continue
            reports.append(report)
            if self.algorithm.adapt(report):
                break
        self.models.eval()
        names = reports[0] if reports else ()
        means = {name: float(np.mean([report[name] for report in reports])) for name in names}
        told = {"skipped_updates": float(skipped)} if skipped else {}
        return {**means, **told, "learning_rate": rate, "updates": len(reports)}

    def _updates(self, rows: list[Row], order: int) -> list[list[Row]]:
        parts = split_updates(rows, self.algorithm.updates, order)
        return [part for _ in range(self.algorithm.epochs) for part in parts]

    def _update(self, groups: Sequence[Group], rows: Sequence[Row], number: int, keep: bool) -> dict[str, float] | None:
        """One optimiser step over these rows, micro-batch by micro-batch; None where it was skipped."""
        drawn = torch.get_rng_state()

        def compute() -> dict[str, float]:
            torch.set_rng_state(drawn)  # the dropout of a first try that ran out of memory
            return self._gradients(rows, keep)

        sums = self.within_memory(compute, rows)
        sums |= self.stepper.clip()
        if not self._is_finite(sums):
            self._skip(groups, rows, number, sums, drawn)
            return None
        self._check_gap(sums)
        memory.probe(self.stepper.optimizer)
        self.touched, self.skipped = True, 0
        self.stepper.step()
        return sums

    def _gradients(self, rows: Sequence[Row], keep: bool) -> dict[str, float]:
        """Gradients and metrics, summed over the micro-batches."""
        totals = Totals.of(rows)
        sums: dict[str, float] = {}
        self.stepper.zero_grad()
        for micro in self.pack(rows):
            forward = self.models.forward(micro, self.algorithm.needs)
            output = self.algorithm.loss(forward, RowBatch.of(micro, self.models.policy.device), totals)
            self.stepper.backward(output.loss)
            if keep:
                _keep_logprobs(micro, forward)
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    # --- what must not reach the weights ------------------------------------------------------------------------

    def _is_finite(self, sums: Mapping[str, float]) -> bool:
        """Whether an update may be made. Raises TrainingStopped where even a small loss scale overflows."""
        loss, norm = sums.get("loss", 0.0), sums["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        if not math.isfinite(loss) or not self.stepper.loss_scaling:
            return False
        if sums["loss_scale"] < 1.0:
            raise TrainingStopped(
                f"step {self._step}: the gradient is not finite even at a loss scale of {sums['loss_scale']:g}, so it "
                "isn't float16's range that is exceeded. Lower optim.learning_rate, or use model.dtype=float32."
            )
        return True  # with a loss scale an overflow is expected now and then: the scaler skips it and backs off

    def _skip(
        self, groups: Sequence[Group], rows: Sequence[Row], number: int, sums: Mapping[str, float], drawn: torch.Tensor
    ) -> None:
        """Leave an update out, keep its batch, and stop where that happens too often."""
        self.skipped += 1
        step, norm, loss = self._step, sums["grad_norm"], sums.get("loss", 0.0)
        told = f"step {step}: update {number} was skipped, its loss is {loss:g} and its gradient norm {norm:g}"
        try:
            kept = evidence.save(
                self.run.dir,
                self.recipe,
                self.models,
                self.algorithm,
                groups,
                rows,
                step=step,
                update=number,
                steps=self.steps,
                numbers=sums,
                token_budget=self.budget.tokens,
                decode=self.decode,
                rng=drawn,
            )
            told += f"; to see why: sapwood replay {kept}" if kept is not None else ""
        except StorageError as error:
            told += f"; its batch could not be kept ({error})"
        self.stepper.skip()
        self.run.event("skip", told, step)
        self.progress.warn(told)
        limit = self.recipe.guards.max_skipped
        if self.skipped > limit:
            raise TrainingStopped(
                f"{told}. That is {self.skipped} updates in a row that aren't finite (guards.max_skipped is {limit}); "
                "the weights are those of the last update that was. Lower optim.learning_rate, or use "
                "model.dtype=float32."
            )

    def _check_gap(self, sums: Mapping[str, float]) -> None:
        gap, limit = sums.get("gap_k3", 0.0), self.recipe.optim.max_gap
        if gap > limit:
            raise TrainingStopped(
                f"step {self._step}: sampler and trainer disagree by {gap:.3g} nats a token (limit optim.max_gap = "
                f"{limit:g}), so the samples don't come from the policy that learns. Use one dtype for both, or raise "
                "optim.max_gap and correct for the gap with algorithm.gap_correction=token."
            )

    # --- resuming -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"skipped": self.skipped, "budget": self.budget.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.skipped = int(state["skipped"])
        self.budget.load_state(state["budget"])


def _keep_logprobs(rows: Sequence[Row], forward: Forward) -> None:
    """What the policy gives a row's tokens in this update, for the samples."""
    if not forward.logprobs.numel():
        return
    parts = forward.logprobs.detach().float().cpu().split([row.scored for row in rows])
    for row, part in zip(rows, parts, strict=True):
        row.logprobs = part.numpy().copy()
