"""What a policy earns on held-out tasks, beside controllers without a language model.

Returns are physical: a step counts by its info["physical_reward"] or info["env_reward"] where the environment scales
or shapes what it pays, so that a table compares like with like; in worlds that pay nothing themselves (prompts), the
return is the recipe's weighted reward. Intervals are two-sided 95 % Student t intervals of the
mean over tasks (one episode a task): exact for normal returns, and a good approximation from about 15 tasks on. Two
policies are compared by the mean of their differences task by task, which removes what the tasks have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from sapwood.chat import Chat
from sapwood.config import Recipe
from sapwood.data.dataset import open_data
from sapwood.data.prompts import DataPrompts
from sapwood.engines import Engine, Sampling
from sapwood.envs import EnvFamily, Split
from sapwood.errors import ConfigError
from sapwood.generate import JsonLines, Progress
from sapwood.metrics import Metric
from sapwood.opening import build_chat, build_engine, load_policy
from sapwood.rewards import Reward
from sapwood.rollout import bind_all, collect, records
from sapwood.types import Group, Ids, Task, Trajectory, Turn

#: Names of a step's unshaped reward in its info, the first that is there counts.
PHYSICAL = ("physical_reward", "env_reward")
#: Tasks that are played, and then written, together by `run_rollout`.
CHUNK = 64
#: Models that a table of metrics has room for in 80 columns.
MODELS_ACROSS = 5


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; lo and hi are NaN where fewer than two values leave it unknown."""

    mean: float
    lo: float
    hi: float
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Student t interval: mean -+ t(0.975, n - 1) * s / sqrt(n), with the sample standard deviation s."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class EvalResult:
    """How one policy or controller did.

    returns: physical return by task id; failed: episodes whose environment failed, which have no return; parsed,
    fallback: share of the replies that were parsed, and that led to a fallback action (None where the environment
    doesn't parse, or for a controller); reply_tokens: mean tokens of a reply; turns: replies in all; metrics: reward
    parts ("reward/NAME") and what the recipe's eval.metrics measured.
    """

    name: str
    returns: Mapping[str, float]
    failed: int = 0
    turns: int = 0
    parsed: float | None = None
    fallback: float | None = None
    reply_tokens: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(state: Mapping[str, Any]) -> EvalResult:
        """From what `dataclasses.asdict` made of a result."""
        return EvalResult(**state)

    @property
    def interval(self) -> Interval:
        """Mean return with its interval over tasks."""
        return mean_interval(list(self.returns.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not a finite number is None."""
        interval = self.interval
        return {
            "name": self.name,
            "mean": _finite(interval.mean),
            "lo": _finite(interval.lo),
            "hi": _finite(interval.hi),
            "tasks": interval.n,
            "failed": self.failed,
            "turns": self.turns,
            "parsed": self.parsed,
            "fallback": self.fallback,
            "reply_tokens": self.reply_tokens,
            "metrics": {key: _finite(value) for key, value in self.metrics.items()},
            "returns": dict(self.returns),
        }


def paired_difference(ours: EvalResult, theirs: EvalResult) -> Interval:
    """Mean of ours - theirs over the tasks that both finished. Raises ConfigError where they share none."""
    shared = [task for task in ours.returns if task in theirs.returns]
    if not shared:
        raise ConfigError(f"{ours.name!r} and {theirs.name!r} share no task, so they can't be compared.")
    return mean_interval([ours.returns[task] - theirs.returns[task] for task in shared])


@dataclass(frozen=True)
class EvalTable:
    """Results beside each other. heading: the world they were had in; compare: (ours, theirs) names of results.

    others: further pairs to compare, with the same meaning.
    """

    heading: str
    results: tuple[EvalResult, ...]
    compare: tuple[str, str] | None = None
    others: tuple[tuple[str, str], ...] = ()

    @property
    def difference(self) -> Interval | None:
        """The paired difference of the two results to compare."""
        return self.differences[self.compare] if self.compare is not None else None

    @property
    def differences(self) -> dict[tuple[str, str], Interval]:
        """Paired differences of all pairs to compare, by (ours, theirs)."""
        named = {result.name: result for result in self.results}
        pairs = (*((self.compare,) if self.compare else ()), *self.others)
        return {(ours, theirs): paired_difference(named[ours], named[theirs]) for ours, theirs in pairs}

    def render(self) -> RenderableType:
        """The table for a terminal; what else was measured of the replies stands in a table below."""
        table = Table(box=SIMPLE, pad_edge=False)
        table.add_column("policy", no_wrap=True)
        for column in ("mean return", "95 % interval", "tasks", "parsed", "tokens"):
            table.add_column(column, justify="right", no_wrap=True)
        for result in self.results:
            interval = result.interval
            table.add_row(
                result.name,
                number(interval.mean),
                f"{number(interval.lo)} .. {number(interval.hi)}" if interval.n > 1 else "-",
                str(interval.n) + (f" ({result.failed} failed)" if result.failed else ""),
                "-" if result.parsed is None else f"{result.parsed:.1%}",
                "-" if result.reply_tokens is None else f"{result.reply_tokens:.1f}",
            )
        measured = {result.name: result.metrics for result in self.results if result.metrics}
        below = [_metric_rows(measured)] if measured else []
        return Stack(Text(self.heading), table, *map(Text, self._comparisons()), *below)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        told = [_difference_json(pair, interval) for pair, interval in self.differences.items()]
        return {
            "heading": self.heading,
            "results": [result.to_json() for result in self.results],
            "difference": told[0] if self.compare else None,
            "differences": told,
        }

    def _comparisons(self) -> list[str]:
        return [
            f"{ours} - {theirs}, task by task: {difference(interval)} over {interval.n} tasks"
            for (ours, theirs), interval in self.differences.items()
        ]


@dataclass(frozen=True)
class MetricTable:
    """Held-out metrics of data. results: metrics by name of the model, over all records.

    by_record: name of the model -> record -> that record's share of what is a mean over records; with `against`, the
    others are compared with that model, record by record.
    """

    heading: str
    results: Mapping[str, Mapping[str, float]]
    by_record: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    against: str | None = None

    @property
    def differences(self) -> dict[tuple[str, str], dict[str, Interval]]:
        """Paired differences by (ours, theirs), then by metric; of metrics that every record has."""
        if self.against is None or self.against not in self.by_record:
            return {}
        theirs = self.by_record[self.against]
        found: dict[tuple[str, str], dict[str, Interval]] = {}
        for name, ours in self.by_record.items():
            if name == self.against:
                continue
            shared = [record for record in ours if record in theirs]
            metrics = [key for key in (ours[shared[0]] if shared else {}) if key in self.results[name]]
            found[name, self.against] = {
                key: mean_interval([ours[r][key] - theirs[r][key] for r in shared])
                for key in metrics
                if all(key in ours[r] and key in theirs[r] for r in shared)
            }
        return found

    def render(self) -> RenderableType:
        """The table for a terminal."""
        compared = [part for pair, found in self.differences.items() for part in _difference_rows(pair, found)]
        return Stack(Text(self.heading), _metric_rows(self.results), *compared)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        told: dict[str, Any] = {
            "heading": self.heading,
            "metrics": {name: {k: _finite(v) for k, v in values.items()} for name, values in self.results.items()},
        }
        if self.differences:
            told["differences"] = [
                {"metric": metric, **_difference_json(pair, interval)}
                for pair, metrics in self.differences.items()
                for metric, interval in metrics.items()
            ]
        return {"held_out": told}


def _metric_rows(results: Mapping[str, Mapping[str, float]]) -> Table:
    """A row a metric and a column a model; the other way round where so many models would not fit beside each other."""
    table = Table(box=SIMPLE, pad_edge=False)
    metrics = list(dict.fromkeys(key for values in results.values() for key in values))
    across = len(results) <= MODELS_ACROSS
    table.add_column("metric" if across else "policy", no_wrap=True)
    for name in results if across else metrics:
        table.add_column(name, justify="right", no_wrap=True)
    if across:
        for metric in metrics:
            table.add_row(metric, *(number(values.get(metric, math.nan)) for values in results.values()))
    else:
        for name, values in results.items():
            table.add_row(name, *(number(values.get(metric, math.nan)) for metric in metrics))
    return table


def _difference_rows(pair: tuple[str, str], found: Mapping[str, Interval]) -> tuple[Text, Table]:
    """A heading, and a row a metric with the paired difference of two models."""
    records = next(iter(found.values())).n if found else 0
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("metric", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for metric, interval in found.items():
        between = f"{number(interval.lo)} .. {number(interval.hi)}" if interval.n > 1 else "-"
        table.add_row(metric, f"{interval.mean:+.3f}", between)
    return Text(f"{pair[0]} - {pair[1]}, record by record ({records})"), table


def _difference_json(pair: tuple[str, str], interval: Interval) -> dict[str, Any]:
    return {
        "of": list(pair),
        "mean": _finite(interval.mean),
        "lo": _finite(interval.lo),
        "hi": _finite(interval.hi),
        "tasks": interval.n,
    }


def evaluate_policy(
    family: EnvFamily,
    tasks: Sequence[Task],
    engine: Engine,
    chat: Chat,
    sampling: Sampling,
    seed: int,
    max_context: int | None = None,
    *,
    rewards: Sequence[Reward] = (),
    metrics: Sequence[Metric] = (),
    name: str = "policy",
    progress: Progress | None = None,
    keep: list[Group] | None = None,
) -> EvalResult:
    """Play every task, as often as the metric that wants the most attempts. Raises as `sapwood.rollout.collect` does.

    With more attempts than one, the return of a task is their mean. keep: a list that gets what was played.
    """
    groups = collect(
        family,
        tasks,
        max((metric.attempts for metric in metrics), default=1),
        engine,
        chat,
        sampling,
        seed,
        max_context=max_context,
        rewards=rewards,
        progress=progress and (lambda done, total: progress(name, done, total)),
    )
    if keep is not None:
        keep += groups
    result = summarise(name, groups, by_reward=not family.pays)
    measured: dict[str, float] = {}
    for metric in metrics:
        measured |= metric.compute(groups)
    return replace(result, metrics={**result.metrics, **measured})


def summarise(name: str, groups: Sequence[Group], *, by_reward: bool = False) -> EvalResult:
    """The result of episodes already played; the members of a group are averaged.

    by_reward: the world pays nothing itself, so the weighted reward stands for the return.
    """
    returns: dict[str, float] = {}
    for group in groups:
        valid = [t for t in group.trajectories if t.error is None]
        played = [t.reward if by_reward else _physical_return(t) for t in valid]
        if played:
            returns[group.task.id] = math.fsum(played) / len(played)
    trajectories = [t for group in groups for t in group.trajectories]
    turns = [turn for t in trajectories if t.error is None for turn in t.turns]
    return EvalResult(
        name,
        returns,
        failed=sum(t.error is not None for t in trajectories),
        turns=len(turns),
        parsed=_share(turn.info["parsed"] != "failed" for turn in turns if "parsed" in turn.info),
        fallback=_share(turn.info["fallback"] for turn in turns if "fallback" in turn.info),
        reply_tokens=_share(turn.token_ids.size for turn in turns),
        metrics=_part_means(trajectories),
    )


def _part_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means of the reward parts, where there are several to tell apart."""
    valid = [t for t in trajectories if t.error is None]
    names = sorted({name for t in valid for name in t.reward_parts})
    if len(names) < 2:
        return {}
    return {
        f"reward/{name}": _share(t.reward_parts[name] for t in valid if name in t.reward_parts) or 0.0 for name in names
    }


def evaluate_baselines(
    family: EnvFamily, tasks: Sequence[Task], progress: Progress | None = None
) -> dict[str, EvalResult]:
    """The family's controllers without a language model on the same tasks, by name."""
    results = {}
    for name, controller in family.baselines().items():
        returns = {}
        for done, task in enumerate(tasks, 1):
            returns[task.id] = float(controller(task))
            if progress is not None:
                progress(name, done, len(tasks))
        results[name] = EvalResult(name, returns)
    return results


def heading(family: EnvFamily, tasks: Sequence[Task], sampling: Sampling) -> str:
    """What a table's numbers were had with: the family's `describe()`, or its options that differ from the defaults."""
    describe = getattr(family, "describe", None)
    if describe is not None:
        world = str(describe())
    else:
        options = ", ".join(f"{k} {v}" for k, v in family.model_dump(mode="json", exclude_defaults=True).items())
        world = type(family).__name__ + (f" ({options})" if options else "")
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    return f"{world}: {len(tasks)} held-out tasks, {how}, at most {sampling.max_new_tokens} tokens a reply"


def run_rollout(
    recipe: Recipe, split: Split, count: int, out: Path | None = None, progress: Progress | None = None
) -> EvalResult:
    """Play `count` tasks, algorithm.group_size episodes each, with the recipe's model, and reward them.

    out: a JSONL file for one record per episode; it appears once all were played. Raises StorageError where it can't
    be written.
    """
    family, rewards, sampling = _family(recipe, progress), recipe.build_rewards(), recipe.sampling()
    tasks = family.tasks(split, count, recipe.run.seed)
    policy = load_policy(recipe.model)
    if rewards:
        from sapwood.models.roles import Models

        bind_all(rewards, Models(policy))
    engine, chat = build_engine(recipe, policy), build_chat(policy, recipe.model)
    members = int(recipe.algorithm.get("group_size", 1))
    played: list[Group] = []
    with JsonLines(out) as lines:
        for first in range(0, max(len(tasks), 1), CHUNK):
            before = first * members
            groups = collect(
                family,
                tasks[first : first + CHUNK],
                members,
                engine,
                chat,
                sampling,
                recipe.run.seed,
                max_context=policy.max_context,
                rewards=rewards,
                first_task=first,
                progress=progress and _shifted(progress, split, before, len(tasks) * members),
            )
            for record in records(groups, (), _decode_with_controls(chat)):
                lines.write({**record, "group": record["group"] + first})
            played += groups
    return summarise(split, played, by_reward=not family.pays)


def _family(recipe: Recipe, progress: Progress | None) -> EnvFamily:
    """The world to play: the recipe's, or the prompts of its data where an algorithm learns from rollouts on them."""
    if recipe.env is not None or recipe.data is None or not recipe.plays:
        return recipe.build_env()
    train, held_out = open_data(recipe.data, "rollouts", recipe.run.seed, progress)
    return DataPrompts(train=train, held_out=held_out)


def _shifted(progress: Progress, name: str, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(name, before + done, total)


def _decode_with_controls(chat: Chat) -> Callable[[Ids], str]:
    return lambda ids: chat.decode(ids, skip_special_tokens=False)


def _physical_return(trajectory: Trajectory) -> float:
    return math.fsum(_physical(turn) for turn in trajectory.turns)


def _physical(turn: Turn) -> float:
    return float(next((turn.info[key] for key in PHYSICAL if key in turn.info), turn.reward))


def _share(values: Iterable[float]) -> float | None:
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def number(value: float) -> str:
    """Three decimals, or two digits of a small number; whole thousands without any; a dash for what is not finite."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1000 and value.is_integer():
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def difference(interval: Interval) -> str:
    """A difference with its interval, in words."""
    told = f"{interval.mean:+.3f}"
    return f"{told} ({number(interval.lo)} .. {number(interval.hi)})" if interval.n > 1 else told
