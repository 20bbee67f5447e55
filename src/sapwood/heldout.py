"""What is measured while training: held-out tasks that are played, and held-out records whose loss is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sapwood.algorithms import Algorithm, Forward, RowBatch, Totals
from sapwood.chat import Chat
from sapwood.engines import Engine, Sampling
from sapwood.envs import EnvFamily
from sapwood.evaluate import EvalResult, EvalTable, Progress, evaluate_baselines, evaluate_policy, heading
from sapwood.metrics import Metric
from sapwood.models.roles import Models
from sapwood.ops.batch import Needs
from sapwood.rewards import Reward
from sapwood.rollout import to_rows
from sapwood.types import Floats, Group, Row, Task


@dataclass
class HeldOutTasks:
    """Tasks that no training ever sees, played by whoever is asked: same tasks, same seeds.

    played: what the last `play` played.
    """

    family: EnvFamily
    count: int
    engine: Engine
    chat: Chat
    sampling: Sampling
    rewards: Sequence[Reward]
    metrics: Sequence[Metric]
    seed: int
    max_context: int | None
    results: dict[str, EvalResult] = field(default_factory=dict)
    played: list[Group] = field(default_factory=list)

    @property
    def tasks(self) -> list[Task]:
        """The held-out tasks."""
        return self.family.tasks("eval", self.count, self.seed)

    def baselines(self, progress: Progress | None = None) -> None:
        """Play the world's controllers without a language model."""
        self.results.update(evaluate_baselines(self.family, self.tasks, progress))

    def play(self, name: str, progress: Progress | None = None) -> dict[str, float]:
        """Play the engine's policy; keeps the result by name and returns its metrics."""
        self.played = []
        result = evaluate_policy(
            self.family,
            self.tasks,
            self.engine,
            self.chat,
            self.sampling,
            self.seed,
            self.max_context,
            rewards=self.rewards,
            metrics=self.metrics,
            name=name,
            progress=progress,
            keep=self.played,
        )
        self.results[name] = result
        found = {"return": result.interval.mean, "low": result.interval.lo, "high": result.interval.hi}
        if result.parsed is not None:
            found["parsed"] = result.parsed
        return {**found, **result.metrics}

    def state(self) -> dict[str, Any]:
        """The results so far, to checkpoint."""
        return {name: asdict(result) for name, result in self.results.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.results = {name: EvalResult.of(result) for name, result in state.items()}

    def table(self, ours: str, theirs: str) -> EvalTable:
        """All results beside each other."""
        compare = (ours, theirs) if theirs in self.results and ours in self.results else None
        return EvalTable(heading(self.family, self.tasks, self.sampling), tuple(self.results.values()), compare)


@dataclass
class HeldOutRecords:
    """Records that no training ever sees; measured by the algorithm's own loss and metrics.

    by_record: with `each`, what the last `measure` found of every record by itself, by the task's id.
    """

    algorithm: Algorithm
    models: Models
    groups: Sequence[Group]
    heading: str
    each: bool = False
    by_record: dict[str, dict[str, float]] = field(default_factory=dict)
    # The reference doesn't change, so what it says of these records is asked once.
    _reference: list[Floats] = field(default_factory=list, init=False)

    def ask_reference(self, pack: Callable[[Sequence[Row]], list[list[Row]]]) -> None:
        """Keep the reference's log-probabilities of these records, so that `measure` can do without the reference."""
        rows = to_rows(self.groups, 1.0)
        self.models.score(pack(rows), Needs(reference_logprobs=True))
        self._keep(rows)

    def _keep(self, rows: Sequence[Row]) -> None:
        self._reference = [row.reference_logprobs for row in rows if row.reference_logprobs is not None]

    def measure(
        self, pack: Callable[[Sequence[Row]], list[list[Row]]], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Loss and metrics over all records at once, without gradient; {} where nothing was held out.

        progress(done, total) counts micro-batches.
        """
        if not self.groups:
            return {}
        state = self.algorithm.state()
        try:
            found = self._measure(pack, progress)
        finally:
            self.algorithm.load_state(state)  # what these records say is not to be learnt from (KTO's reference point)
        found |= self.algorithm.derived(found)
        return {name: value for name, value in found.items() if not name.startswith("_") and math.isfinite(value)}

    def _measure(
        self, pack: Callable[[Sequence[Row]], list[list[Row]]], progress: Callable[[int, int], None] | None
    ) -> dict[str, float]:
        rows = to_rows(self.groups, 1.0)
        extra = self.algorithm.augment(rows)
        needs = self._able(self.algorithm.extra_needs if extra else self.algorithm.needs)
        if self._reference and not extra:
            needs = replace(needs, reference_logprobs=False)
            for row, known in zip(rows, self._reference, strict=True):
                row.reference_logprobs = known
        self.models.eval()
        self.models.score(pack([*rows, *extra]), needs)
        if needs.reference_logprobs:
            self._keep(rows)
        rows += extra
        kept, metrics = self.algorithm.credit(self.groups, rows)
        totals = Totals.of(kept)
        sums: dict[str, float] = {}
        with torch.no_grad():
            batches = pack(kept)
            for done, micro in enumerate(batches, 1):
                forward = self.models.forward(micro, self._able(self.algorithm.needs))
                output = self.algorithm.loss(forward, RowBatch.of(micro, self.models.policy.device), totals)
                for name, value in output.metrics.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
                if self.each:
                    self._measure_each(forward, micro)
                if progress is not None:
                    progress(done, len(batches))
        return {**metrics, **sums}

    def _able(self, needs: Needs) -> Needs:
        """Without a critic, as where only policies are compared, no values are asked for."""
        return needs if self.models.critic is not None else replace(needs, values=False)

    def _measure_each(self, forward: Forward, micro: Sequence[Row]) -> None:
        """The metrics of every group of a micro-batch by itself."""
        for group in sorted({row.group for row in micro}):
            chosen = [i for i, row in enumerate(micro) if row.group == group]
            rows = [micro[i] for i in chosen]
            batch = RowBatch.of(rows, self.models.policy.device)
            output = self.algorithm.loss(_part(forward, micro, chosen), batch, Totals.of(rows))
            told = {name: float(value) for name, value in output.metrics.items() if not name.startswith("_")}
            self.by_record[self.groups[group].task.id] = told


def _part(forward: Forward, rows: Sequence[Row], chosen: Sequence[int]) -> Forward:
    """The forward of some of its rows."""
    sizes = [row.scored for row in rows]

    def tokens(values: Tensor | None) -> Tensor | None:
        if values is None or not values.numel():
            return values
        parts = values.split(sizes)
        return torch.cat([parts[i] for i in chosen])

    logprobs = tokens(forward.logprobs)
    assert logprobs is not None
    scores = None if forward.scores is None else forward.scores[list(chosen)]
    return Forward(logprobs, tokens(forward.entropies), tokens(forward.values), scores)
