"""Stage `select`: a few hundred good and different decisions out of a controller's days, to show in prompts.

The best steps by `rank` are kept (`preselect`), their standardised observations are put into clusters by k-means, and
of each cluster the best are taken: good ones of every kind of state, and not the same calm night many times.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sapwood.envs.hvac import fewshot
from sapwood.envs.hvac.files import replace
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import DataError, MissingExtra
from sapwood.pipeline.trajectories import Decision, Episode, TrajectoryFile, check_world, read
from sapwood.progress import Progress
from sapwood.sections import Positive, Section

EXAMPLES, PICTURE = "few_shot_examples_structured.json", "clusters.png"
#: Colours of up to 24 clusters.
PALETTE = (
    "#1f6f4a", "#c27a1a", "#2f5f93", "#7d3c6e", "#2b8a8a", "#a63a2b", "#86862a", "#6b6b6b",
    "#5aa67f", "#e0ad66", "#7ea6d1", "#b888ac", "#7cc2c2", "#d58a80", "#bdbd6d", "#a8a8a8",
    "#0f3a26", "#70460f", "#18314d", "#421f3a", "#164848", "#5c2018", "#4a4a17", "#3a3a3a",
)  # fmt: skip

Floats = NDArray[np.float64]


class SelectOptions(Section):
    """Choosing examples. preselect: steps that are kept before clustering, the best by `rank`; clusters: of k-means
    over the standardised observations; per_cluster: examples of each, the best by `rank`.

    rank: "reward" (the physical reward of the step, which says as much about the weather as about the action) or
    "advantage" (reward + gamma * value of the next state - value of the state, by the recorded critic; an episode's
    last step, whose next state is not recorded, is left out). gamma: of the advantage.
    """

    preselect: Positive = 2000
    clusters: Annotated[int, Field(ge=1, le=1000)] = 12
    per_cluster: Positive = 20
    rank: Literal["reward", "advantage"] = "reward"
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99


@dataclass(frozen=True)
class SelectResult:
    """What the stage made. steps: read; preselected: kept by rank; sizes: examples by cluster."""

    examples: Path
    picture: Path
    steps: int
    preselected: int
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Examples in all."""
        return sum(self.sizes)


@dataclass(frozen=True)
class _Step:
    """A candidate: its place, and what it is ranked by."""

    episode: Episode
    decision: Decision
    worth: float


def run(
    options: SelectOptions,
    family: Hvac,
    trajectory: Path,
    out_dir: Path,
    progress: Progress | None = None,
    *,
    seed: int = 0,
) -> SelectResult:
    """Choose examples from a trajectory file: `few_shot_examples_structured.json` and `clusters.png`.

    Raises DataError where the file is of another world or has no states in words, and StorageError.
    """
    progress = progress or Progress()
    file = read(trajectory)
    check_world(file, family)
    candidates = list(_candidates(file, options))
    if not candidates:
        raise DataError(
            f"{trajectory}: none of its steps can be ranked by {options.rank}: the last step of an episode has no next "
            "value; set select.rank=reward, or env.train_horizon=2 for longer training episodes."
        )
    # Stable: of equal worth the earlier.
    kept = sorted(candidates, key=lambda step: -step.worth)[: options.preselect]
    observations = np.array([step.decision.observation for step in kept])
    mean, scale = observations.mean(axis=0), observations.std(axis=0)
    scale[scale < 1e-9] = 1.0
    standard = (observations - mean) / scale
    labels = _clusters(standard, [float(np.mean(step.decision.action)) for step in kept], options.clusters, seed)
    chosen = [np.flatnonzero(labels == cluster)[: options.per_cluster] for cluster in range(int(labels.max()) + 1)]
    result = SelectResult(
        out_dir / EXAMPLES, out_dir / PICTURE, file.count, len(kept), tuple(len(places) for places in chosen)
    )
    source = {
        "file": trajectory.name,
        "sha256": hashlib.sha256(trajectory.read_bytes()).hexdigest(),
        "controller": file.controller,
        "steps": file.count,
        "preselected": len(kept),
    }
    head = {
        "format": fewshot.FORMAT,
        "world": dict(file.world),
        "source": source,
        "rule": {**options.model_dump(), "seed": seed},
        "mean": mean.tolist(),
        "scale": scale.tolist(),
    }
    replace(result.picture, iter([_picture(file, kept, standard, labels, chosen)]))
    replace(result.examples, _chunks(head, kept, chosen, options))
    fewshot.check_shots(fewshot.load_shots(str(result.examples)), family)  # what was written can be used
    for note in _shortfalls(options, result):
        progress.note(note)
    progress.note(f"select: {result.count} examples in {len(result.sizes)} clusters, of {file.count:,} steps.")
    return result


def _candidates(file: TrajectoryFile, options: SelectOptions) -> Iterator[_Step]:
    """All steps that can be examples, with what they are ranked by."""
    name = file.source or "the trajectory file"
    for episode in file.episodes:
        for place, decision in enumerate(episode.steps):
            if decision.reply is not None:
                raise DataError(
                    f"{name}: recorded from a language model ({file.controller}), whose replies are no examples; give "
                    "the ppo_trajectory.json of `sapwood pipeline RECIPE --stage ppo`."
                )
            if decision.state is None:
                raise DataError(
                    f"{name}: episode {episode.task}, step {decision.step} has no state in words, which a prompt "
                    "shows; record it again with `sapwood pipeline RECIPE --stage ppo`."
                )
            if options.rank == "reward":
                yield _Step(episode, decision, decision.reward)
                continue
            following = episode.steps[place + 1] if place + 1 < len(episode.steps) else None
            if decision.value is None or (following is not None and following.value is None):
                raise DataError(
                    f"{name}: select.rank advantage needs a critic's value at every step, and episode {episode.task}, "
                    f"step {decision.step} has none; use select.rank=reward, or a file of stage ppo."
                )
            if following is not None and following.value is not None and following.step == decision.step + 1:
                worth = decision.reward + options.gamma * following.value - decision.value
                yield _Step(episode, decision, worth)


def _clusters(standard: Floats, powers: Sequence[float], count: int, seed: int) -> NDArray[np.int64]:
    """A cluster of each row [N], numbered from the strongest mean cooling to the strongest heating."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise MissingExtra("scikit-learn", "pipeline", "choosing examples by clusters") from None
    count = min(count, len(np.unique(standard, axis=0)))
    drawn = int(np.random.default_rng([seed, 6]).integers(2**31))
    means_of = KMeans(n_clusters=count, n_init=10, random_state=drawn)  # pyright: ignore[reportArgumentType]  (an int too)
    labels = means_of.fit_predict(standard)
    found = np.unique(labels)
    means = [float(np.mean(np.asarray(powers)[labels == label])) for label in found]
    order = {int(found[place]): number for number, place in enumerate(np.argsort(means, kind="stable"))}
    return np.array([order[int(label)] for label in labels], np.int64)


def _shortfalls(options: SelectOptions, result: SelectResult) -> Iterator[str]:
    """Where there was less than asked for, in words."""
    if result.preselected < options.preselect:
        yield f"select: {result.preselected:,} steps are fewer than select.preselect {options.preselect:,}; all count."
    if len(result.sizes) < options.clusters:
        yield f"select: {len(result.sizes)} clusters and not {options.clusters}: there are no more different states."
    short = [size for size in result.sizes if size < options.per_cluster]
    if short:
        yield (
            f"select: {len(short)} of {len(result.sizes)} clusters have fewer than {options.per_cluster} states (the "
            f"smallest {min(short)}), so there are {result.count} examples and not "
            f"{options.clusters * options.per_cluster}."
        )


def _chunks(
    head: Mapping[str, Any], kept: Sequence[_Step], chosen: Sequence[NDArray[np.intp]], options: SelectOptions
) -> Iterator[bytes]:
    """The file, one example a line."""
    yield b"{\n"
    for name, content in head.items():
        yield _json(name) + b": " + _json(content) + b",\n"
    yield b'"examples": ['
    first = True
    for cluster, places in enumerate(chosen):
        for rank, place in enumerate(places):
            step = kept[int(place)]
            yield (b"\n" if first else b",\n") + _json(_row(step, cluster, rank, options))
            first = False
    yield b"\n]\n}\n"


def _row(step: _Step, cluster: int, rank: int, options: SelectOptions) -> dict[str, Any]:
    episode, decision = step.episode, step.decision
    worth = {"advantage": step.worth} if options.rank == "advantage" else {}
    return {
        "cluster": cluster,
        "rank": rank,
        "state": decision.state,
        "observation": decision.observation,
        "action": decision.action,
        "reward": decision.reward,
        **worth,
        "task": episode.task,
        "day": episode.day,
        "hour": episode.hour,
        "step": decision.step,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def principal(standard: Floats) -> tuple[Floats, Floats]:
    """Coordinates [N, 2] of rows along their two principal components, and the share of variance of each [2]."""
    centred = standard - standard.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    if len(singular) < 2:
        axes, singular = np.vstack([axes, np.zeros_like(axes)])[:2], np.array([*singular, 0.0])[:2]
    # The sign of an axis is arbitrary: its largest loading is positive.
    signs = np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])
    total = float((singular**2).sum()) or 1.0
    return centred @ (axes[:2].T * np.where(signs == 0, 1.0, signs)), singular[:2] ** 2 / total


def _picture(
    file: TrajectoryFile,
    kept: Sequence[_Step],
    standard: Floats,
    labels: NDArray[np.int64],
    chosen: Sequence[NDArray[np.intp]],
) -> bytes:
    """Kept steps by cluster, and the examples: principal components, outdoors against indoors and against power."""
    from sapwood.canvas import Sheet, room

    places, shares = principal(standard)
    names = list(file.world["observation"])
    zones = len(file.world["zones"])
    outdoors = names.index("outdoor temperature") if "outdoor temperature" in names else zones
    observed = np.array([step.decision.observation for step in kept])
    inside, outside = observed[:, :zones].mean(axis=1), observed[:, outdoors]
    powers = np.array([float(np.mean(step.decision.action)) for step in kept])
    worth = np.array([step.worth for step in kept])
    views = (
        (f"Principal components ({shares[0]:.0%} and {shares[1]:.0%} of variance)", places[:, 0], places[:, 1]),
        ("Outdoors against mean zone temperature, C", outside, inside),
        ("Outdoors, C, against mean power", outside, powers),
        ("Outdoors, C, against what it is ranked by", outside, worth),
    )
    total = sum(map(len, chosen))
    title = f"{total} examples of {len(kept):,} steps in {len(chosen)} clusters"
    sheet = Sheet(len(views), 2, title)
    for index, (name, x, y) in enumerate(views):
        plot = sheet.plot(index, name)
        plot.scale(room(x.tolist()), room(y.tolist()))
        for cluster, some in enumerate(chosen):
            colour = PALETTE[cluster % len(PALETTE)]
            all_of_it = np.flatnonzero(labels == cluster)
            dots: dict[str, Any] = {"ls": "", "color": colour, "markeredgewidth": 0}
            plot.line(x[all_of_it].tolist(), y[all_of_it].tolist(), "", marker=".", ms=3, alpha=0.35, **dots)
            plot.line(
                x[some].tolist(), y[some].tolist(), "", marker="o", ms=3.6, ls="", color=colour, mec="white", mew=0.4
            )
    made = io.BytesIO()
    sheet.figure.savefig(made, format="png", dpi=110, metadata={"Software": None})
    return made.getvalue()
