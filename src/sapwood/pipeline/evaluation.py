"""Stage 6: everyone on the same held-out days: the classical policy, the language model before and after, controllers.

Each plays alone, greedily unless asked otherwise; returns are the physical ones, and energy and comfort, the two norms
that they are made of, are told apart. Every player's days are a trajectory file, so `sapwood report` shows them side
by side.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sapwood.engines.local import LocalOptions
from sapwood.envs import Split
from sapwood.envs.hvac import controllers
from sapwood.envs.hvac.controllers import Controller
from sapwood.envs.hvac.files import replace
from sapwood.envs.hvac.text import Hvac
from sapwood.evaluate import EvalResult, EvalTable, Interval, mean_interval
from sapwood.pipeline import trajectories
from sapwood.pipeline.rollout import RolloutOptions, play_tasks
from sapwood.pipeline.trajectories import TrajectoryFile, Value, play
from sapwood.progress import Progress
from sapwood.report import write_report
from sapwood.sections import ModelSection
from sapwood.source import derive
from sapwood.types import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, PICTURE, PAGE = "evaluation.json", "comparison_plot.png", "report.html"
BASE, TUNED, PPO, GRPO = "base", "finetuned", "ppo", "grpo"
#: Controllers without a language model or a network; each for a task.
CONTROLLERS: dict[str, Callable[[Task], Controller]] = {
    "random": lambda task: controllers.random_controller(task.seed),
    "zero": lambda task: controllers.zero,
    "proportional": lambda task: controllers.proportional,
    "one_step_optimal": lambda task: controllers.one_step_optimal,
}
#: Whose days are on the page.
SHOWN = (PPO, BASE, TUNED, GRPO, "proportional", "one_step_optimal")
#: What is compared pair by pair, where both were played.
PAIRS = ((TUNED, BASE), (GRPO, BASE), (TUNED, GRPO), (TUNED, PPO), (TUNED, "proportional"))


@dataclass(frozen=True)
class Held:
    """Tasks to play. seeds: the tasks of each seed in turn, by their place."""

    tasks: tuple[Task, ...]
    seeds: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(family: Hvac, split: Split, days: int, seeds: Sequence[int]) -> Held:
        """`days` tasks of the split for each seed."""
        found: list[Task] = []
        places: list[tuple[int, int, int]] = []
        for seed in seeds:
            more = family.tasks(split, days, seed)
            places.append((seed, len(found), len(found) + len(more)))
            found += more
        return Held(tuple(found), tuple(places))


@dataclass(frozen=True)
class EvaluationResult:
    """What the stage left. files: a trajectory file of every player; by_seed: mean return of each by seed."""

    path: Path
    picture: Path
    table: EvalTable
    files: Mapping[str, Path]
    by_seed: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def play_model(
    rollout: RolloutOptions,
    family: Hvac,
    model: ModelSection,
    engine: LocalOptions,
    held: Held,
    path: Path,
    progress: Progress,
    seed: int,
    *,
    temperature: float = 0.0,
) -> TrajectoryFile:
    """A language model's days, written to `path`; what an interrupted run of the same left is used.

    rollout: how replies are sampled, temperature and further replies apart.
    """
    options = rollout.model_copy(
        update={"episodes": len(held.tasks), "temperature": (temperature, temperature), "replies_per_state": 1}
    )
    return play_tasks(options, family, held.tasks, model, path, progress, seed, engine.model_dump())


def play_controller(
    name: str, family: Hvac, held: Held, seed: int, make: Callable[[Task], Controller], value: Value | None = None
) -> TrajectoryFile:
    """A controller's days. value: of each observation, where it has a critic."""
    episodes = [play(family, task, make(task), value) for task in held.tasks]
    return trajectories.recorded(family, name, seed, episodes)


def known_controllers(family: Hvac) -> dict[str, Callable[[Task], Controller]]:
    """Those of `CONTROLLERS` that the family's simulator allows."""
    return {name: make for name, make in CONTROLLERS.items() if name in family.baselines()}


def summary(name: str, file: TrajectoryFile) -> EvalResult:
    """Returns by task, with energy and comfort a step, and how replies were read."""
    steps = [step for _, step in file.steps]
    said = [step for step in steps if step.reply is not None]
    mean = {
        "energy": math.fsum(step.energy for step in steps) / len(steps),
        "comfort": math.fsum(step.comfort for step in steps) / len(steps),
    }
    read = sum(step.parsed != "failed" for step in said) / len(said) if said else None
    return EvalResult(
        name,
        {episode.task: episode.total for episode in file.episodes},
        turns=len(steps),
        parsed=read,
        fallback=sum(step.fallback for step in said) / len(said) if said else None,
        reply_tokens=sum(len(step.token_ids) for step in said) / len(said) if said else None,
        metrics=mean,
    )


def table_of(family: Hvac, files: Mapping[str, TrajectoryFile]) -> EvalTable:
    """Players beside each other, in the order given, with the pairs of `PAIRS`."""
    pairs = [pair for pair in PAIRS if pair[0] in files and pair[1] in files]
    results = tuple(summary(name, file) for name, file in files.items())
    return EvalTable(family.describe(), results, pairs[0] if pairs else None, tuple(pairs[1:]))


def seed_means(held: Held, file: TrajectoryFile) -> dict[int, float]:
    """Mean return of each seed's days."""
    return {
        seed: math.fsum(e.total for e in file.episodes[first:last]) / (last - first) for seed, first, last in held.seeds
    }


def publish(family: Hvac, held: Held, files: Mapping[str, TrajectoryFile], out_dir: Path) -> EvaluationResult:
    """Write every player's days, the table and the picture. Files that are there are replaced when these are whole."""
    paths = {name: out_dir / f"{name}_rollout.json" for name in files}
    for name, file in files.items():
        if file.controller != "llm":  # those were written as they were played
            trajectories.write(paths[name], file)
    table = table_of(family, files)
    by_seed = {name: seed_means(held, file) for name, file in files.items()}
    told: dict[str, Any] = table.to_json()
    told["by_seed"] = {name: {str(seed): mean for seed, mean in means.items()} for name, means in by_seed.items()}
    if len(held.seeds) > 1:
        told["over_seeds"] = {name: _plain(mean_interval(list(means.values()))) for name, means in by_seed.items()}
    text = json.dumps(told, indent=2, allow_nan=False) + "\n"
    replace(out_dir / TABLE, [text.encode()])
    replace(out_dir / PICTURE, [_picture(family, table, files)])
    write_report([paths[name] for name in SHOWN if name in paths], out_dir / PAGE)
    return EvaluationResult(out_dir / TABLE, out_dir / PICTURE, table, paths, by_seed)


def _plain(interval: Interval) -> dict[str, float | int | None]:
    lo, hi = (None if math.isnan(bound) else bound for bound in (interval.lo, interval.hi))
    return {"mean": interval.mean, "lo": lo, "hi": hi, "seeds": interval.n}


def evaluation_seeds(seed: int, count: int) -> list[int]:
    """The run's seed itself first, so that one seed plays the days that its recipe's `eval` would."""
    return [seed, *(derive(seed, 97, number) for number in range(1, count))]


# --- the picture -------------------------------------------------------------------------------------------------

_COLOURS = ("#2f5f93", "#1f6f4a", "#c27a1a", "#a63a2b", "#6b4a8a", "#2c2a26", "#8a857a", "#b9b4a8")


def _picture(family: Hvac, table: EvalTable, files: Mapping[str, TrajectoryFile]) -> bytes:
    """Mean returns with intervals; mean reward, energy and comfort by step of the day."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 7.6), layout="constrained")
    figure.suptitle(family.describe(), fontsize=10)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(files)}
    _bars(figure, table, colours)
    for place, (what, label) in enumerate(
        (("reward", "mean reward of a step"), ("energy", "power, norm over zones"), ("comfort", "error, K"))
    ):
        axes = figure.add_subplot(2, 2, place + 2)
        for name, file in files.items():
            if name in ("random", "zero") and what != "energy":
                continue  # an order of magnitude below the others, which would be one line then
            hours = [family.time_res / 3600.0 * step for step in range(max(len(e.steps) for e in file.episodes))]
            axes.plot(hours, _by_step(file, what), color=colours[name], linewidth=1.5, label=name)
        axes.set(xlabel="hours since the episode began", ylabel=label)
        axes.grid(color="#e6e2d9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize=8)
    return _png(figure)


def _bars(figure: Figure, table: EvalTable, colours: Mapping[str, str]) -> None:
    axes = figure.add_subplot(2, 2, 1)
    for row, result in enumerate(table.results):
        interval = result.interval
        axes.barh(row, interval.mean, color=colours[result.name], height=0.7)
        if interval.n > 1:
            axes.plot([interval.lo, interval.hi], [row, row], color="#2c2a26", linewidth=1.2)
        axes.annotate(
            f" {interval.mean:.1f}", (min(interval.lo, interval.mean) if interval.n > 1 else interval.mean, row),
            ha="right", va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(table.results)), [result.name for result in table.results], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="mean return with its 95 % interval over days")
    axes.spines[["top", "right"]].set_visible(False)


def _by_step(file: TrajectoryFile, what: str) -> list[float]:
    longest = max(len(episode.steps) for episode in file.episodes)
    return [
        float(np.mean([getattr(e.steps[step], what) for e in file.episodes if step < len(e.steps)]))
        for step in range(longest)
    ]


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
