"""What a policy earns on held-out tasks, beside controllers without a language model.

Returns are physical: a step counts by its info["physical_reward"] or info["env_reward"] where the environment scales
or shapes what it pays, so that a table compares like with like; in worlds that pay nothing themselves (prompts), the
return is the recipe's weighted reward. Intervals are two-sided 95 % Student t intervals of the
mean over tasks (one episode a task): exact for normal returns, and a good approximation from about 15 tasks on. Two
policies are compared by the mean of their differences task by task, which removes what the tasks have in common.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from scipy.special import stdtrit

from sapwood import plugins
from sapwood.chat import Chat
from sapwood.config import ModelSection, Recipe
from sapwood.engines import Engine, Sampling
from sapwood.envs import EnvFamily, Split
from sapwood.envs.prompts import Prompts
from sapwood.errors import ConfigError, DataError
from sapwood.metrics import Metric
from sapwood.rewards import Reward
from sapwood.rollout import collect, records
from sapwood.run import writing
from sapwood.types import Group, Ids, Task, Trajectory, Turn

if TYPE_CHECKING:
    from sapwood.models.load import Policy

#: progress(what is under way, done, total)
Progress = Callable[[str, int, int], None]

#: Names of a step's unshaped reward in its info, the first that is there counts.
PHYSICAL = ("physical_reward", "env_reward")
#: Tasks that are played, and then written, together by `run_rollout`.
CHUNK = 64


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
    """Results beside each other. heading: the world they were had in; compare: (ours, theirs) names of results."""

    heading: str
    results: tuple[EvalResult, ...]
    compare: tuple[str, str] | None = None

    @property
    def difference(self) -> Interval | None:
        """The paired difference of the two results to compare."""
        if self.compare is None:
            return None
        named = {result.name: result for result in self.results}
        return paired_difference(*(named[name] for name in self.compare))

    def render(self) -> Table:
        """The table for a terminal."""
        table = Table(title=self.heading, caption=self._caption(), caption_justify="left", box=SIMPLE, pad_edge=False)
        table.add_column("policy", no_wrap=True)
        for column in ("mean return", "95 % interval", "tasks", "parsed", "tokens"):
            table.add_column(column, justify="right", no_wrap=True)
        for result in self.results:
            interval = result.interval
            table.add_row(
                result.name,
                _number(interval.mean),
                f"{_number(interval.lo)} .. {_number(interval.hi)}" if interval.n > 1 else "-",
                str(interval.n) + (f" ({result.failed} failed)" if result.failed else ""),
                "-" if result.parsed is None else f"{result.parsed:.1%}",
                "-" if result.reply_tokens is None else f"{result.reply_tokens:.1f}",
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        difference = self.difference
        return {
            "heading": self.heading,
            "results": [result.to_json() for result in self.results],
            "difference": difference
            and {
                "of": list(self.compare or ()),
                "mean": _finite(difference.mean),
                "lo": _finite(difference.lo),
                "hi": _finite(difference.hi),
                "tasks": difference.n,
            },
        }

    def _caption(self) -> str | None:
        difference = self.difference
        if difference is None or self.compare is None:
            return None
        interval = f" ({_number(difference.lo)} .. {_number(difference.hi)})" if difference.n > 1 else ""
        ours, theirs = self.compare
        return f"{ours} - {theirs}, task by task: {difference.mean:+.3f}{interval} over {difference.n} tasks"


@dataclass(frozen=True)
class MetricTable:
    """Held-out metrics of data, before and after. results: metrics by name of the model."""

    heading: str
    results: Mapping[str, Mapping[str, float]]

    def render(self) -> Table:
        """The table for a terminal."""
        table = Table(title=self.heading, box=SIMPLE, pad_edge=False)
        table.add_column("metric", no_wrap=True)
        for name in self.results:
            table.add_column(name, justify="right", no_wrap=True)
        for metric in dict.fromkeys(key for values in self.results.values() for key in values):
            table.add_row(metric, *(_number(values.get(metric, math.nan)) for values in self.results.values()))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return {"held_out": {"heading": self.heading, "metrics": {k: dict(v) for k, v in self.results.items()}}}


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
) -> EvalResult:
    """Play every task, as often as the metric that wants the most attempts. Raises as `sapwood.rollout.collect` does.

    With more attempts than one, the return of a task is their mean.
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
    result = summarise(name, groups)
    measured: dict[str, float] = {}
    for metric in metrics:
        measured |= metric.compute(groups)
    return replace(result, metrics={**result.metrics, **measured})


def summarise(name: str, groups: Sequence[Group]) -> EvalResult:
    """The result of episodes already played; the members of a group are averaged."""
    returns: dict[str, float] = {}
    for group in groups:
        played = [_physical_return(t) for t in group.trajectories if t.error is None]
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
    return {f"reward/{name}": _share(t.reward_parts[name] for t in valid if name in t.reward_parts) or 0.0 for name in names}


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


def run_eval(
    recipe: Recipe, adapter: Path | None = None, count: int | None = None, progress: Progress | None = None
) -> EvalTable:
    """Evaluate a recipe's base model, its trained adapter if there is one, and the world's baselines.

    adapter: an adapter or checkpoint, `model.init_from` of the recipe if None; count: held-out tasks, `eval.tasks` if
    None. All play the same tasks with the same seeds.
    """
    family = recipe.build_env()
    tasks = family.tasks("eval", recipe.eval.task_count if count is None else count, recipe.run.seed)
    rewards, metrics = recipe.build_rewards(), recipe.build_metrics()
    sampling = recipe.sampling().model_copy(update={"temperature": recipe.eval.temperature})
    results = list(evaluate_baselines(family, tasks, progress).values()) if recipe.eval.baselines else []
    trained = adapter or recipe.model.init_from
    variants = {"base": recipe.model.model_copy(update={"init_from": None, "lora": None})}
    if trained is not None:
        variants["trained"] = recipe.model.model_copy(update={"init_from": trained})
    for name, section in variants.items():
        policy = _load_policy(section)
        engine, chat = build_engine(recipe, policy), build_chat(policy, recipe.model)
        results.append(
            evaluate_policy(
                family,
                tasks,
                engine,
                chat,
                sampling,
                recipe.run.seed,
                policy.max_context,
                rewards=rewards,
                metrics=metrics,
                name=name,
                progress=progress,
            )
        )
    compare = ("trained", "base") if trained is not None else None
    return EvalTable(heading(family, tasks, sampling), tuple(results), compare)


def run_rollout(
    recipe: Recipe, split: Split, count: int, out: Path | None = None, progress: Progress | None = None
) -> EvalResult:
    """Play `count` tasks, algorithm.group_size episodes each, with the recipe's model, and reward them.

    out: a JSONL file for one record per episode; it appears once all were played. Raises StorageError where it can't
    be written.
    """
    family, rewards, sampling = recipe.build_env(), recipe.build_rewards(), recipe.sampling()
    tasks = family.tasks(split, count, recipe.run.seed)
    policy = _load_policy(recipe.model)
    engine, chat = build_engine(recipe, policy), build_chat(policy, recipe.model)
    members = int(recipe.algorithm.get("group_size", 1))
    played: list[Group] = []
    with _JsonLines(out) as lines:
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
    return summarise(split, played)


def run_generate(
    model: str | ModelSection,
    prompts: Sequence[str] = (),
    input_path: Path | None = None,
    out_path: Path | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    prompt_field: str = "prompt",
) -> list[dict[str, Any]]:
    """Reply to prompts, or to those of a JSONL file, once each and in order.

    Returns records of prompt, reply, stop_reason and tokens, and writes them to out_path if given. Raises ConfigError
    unless there is exactly one source of prompts.
    """
    if bool(prompts) == (input_path is not None):
        raise ConfigError("give either prompts or an input file with a prompt on every line.")
    items = tuple({prompt_field: prompt} for prompt in prompts)
    family = Prompts(path=input_path, items=items, prompt_field=prompt_field)
    tasks = family.ordered()
    section = ModelSection(name=model, lora=None) if isinstance(model, str) else model
    policy = _load_policy(section)
    engine = _make_engine("local", policy, {})
    chat = build_chat(policy, section)
    told = []
    with _JsonLines(out_path) as lines:
        for first in range(0, len(tasks), CHUNK):
            groups = collect(
                family,
                tasks[first : first + CHUNK],
                1,
                engine,
                chat,
                sampling or Sampling(),  # pyright: ignore[reportCallIssue]  (pydantic's positional defaults)
                seed,
                max_context=policy.max_context,
                first_task=first,
                progress=progress and _shifted(progress, "replies", first, len(tasks)),
            )
            for group in groups:
                [turn] = group.trajectories[0].turns
                record = {
                    "prompt": group.task.prompt[-1].content,
                    "reply": turn.text,
                    "stop_reason": str(turn.stop_reason),
                    "tokens": turn.token_ids.size,
                }
                lines.write(record)
                told.append(record)
    return told


def build_engine(recipe: Recipe, policy: Policy) -> Engine:
    """The recipe's engine on a loaded policy."""
    if recipe.engine is None:
        raise ConfigError("engine is missing: this recipe samples nothing, since it learns from data and has no env.")
    return _make_engine(recipe.engine["name"], policy, recipe.engine_options())


def build_chat(policy: Policy, section: ModelSection) -> Chat:
    """The policy's chat, with the section's template file if it names one. Raises DataError if it can't be read."""
    if section.chat_template is None:
        return Chat(policy.tokenizer)
    try:
        return Chat(policy.tokenizer, section.chat_template.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {section.chat_template} can't be read: {error}.") from error


def _load_policy(section: Any) -> Policy:
    from sapwood.models.load import load_policy  # torch and transformers load only once they are needed

    return load_policy(section)


def _make_engine(name: str, policy: Policy, options: Mapping[str, Any]) -> Engine:
    """An engine is made of the policy, its tokenizer and, if its class or module has `OPTIONS`, those options."""
    cls = plugins.load("engine", name)
    model = getattr(cls, "OPTIONS", None) or getattr(sys.modules[cls.__module__], "OPTIONS", None)
    if model is None:
        return cls(policy, policy.tokenizer)
    return cls(policy, policy.tokenizer, options=model.model_validate(dict(options)))


class _JsonLines:
    """A JSONL file that is written aside and appears when whole; without a path, nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = None

    def __enter__(self) -> _JsonLines:
        if self._path is not None:
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._aside.open("w", encoding="utf-8")
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None and self._path is not None:
            with writing(self._path):
                self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None or self._path is None:
            return
        with writing(self._path):
            self._file.close()
            if kind is None:
                os.replace(self._aside, self._path)
            # After a failure what was played stays readable in the file aside.

    @property
    def _aside(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".part")


def _shifted(progress: Progress, name: str, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(name, before + done, total)


def _decode_with_controls(chat: Chat) -> Callable[[Ids], str]:
    return lambda ids: chat.decode(ids, skip_special_tokens=False)


def _physical_return(trajectory: Trajectory) -> float:
    # Only the environment's own reward is a return in its units; shaping and scores are what stands in for one
    # where the environment pays nothing.
    paid = any(turn.reward or any(key in turn.info for key in PHYSICAL) for turn in trajectory.turns)
    if not paid and set(trajectory.reward_parts) - {"env"}:
        return trajectory.reward
    return math.fsum(_physical(turn) for turn in trajectory.turns)


def _physical(turn: Turn) -> float:
    return float(next((turn.info[key] for key in PHYSICAL if key in turn.info), turn.reward))


def _share(values: Iterable[float]) -> float | None:
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
