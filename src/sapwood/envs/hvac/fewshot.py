"""Examples for a prompt from a file, as stage `select` of the pipeline writes it, and which of them a prompt shows.

    {"format": 1, "world": {...}, "source": {...}, "rule": {...}, "mean": [n + 4], "scale": [n + 4],
     "examples": [
    {"cluster", "rank", "state", "observation" [n + 4], "action", "reward", "task", "day", "hour", "step"},
    ...
    ]}

state: the state in words; action: powers of a reply; mean and scale: what the observations were standardised with
before they were put into clusters; rank: place in its cluster, 0 the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.files import load_json
from sapwood.envs.hvac.layout import misfit, world_of
from sapwood.envs.hvac.prompt import Candidate, Example, answer
from sapwood.errors import DataError, printable

if TYPE_CHECKING:
    from sapwood.envs.hvac.text import Hvac

FORMAT = 1
#: Options that say what a power or a temperature means: examples from a world with others would teach another rule.
MEANING = ("time_res", "max_power", "target", "powered")
LARGEST = 1e9
POOL_CLUSTERS = 12


@dataclass(frozen=True, eq=False)
class Shots:
    """The examples of a file, by cluster and rank. observations [N, n + 4], clusters [N], powers [N]: mean powers.

    mean, scale [n + 4]: standardise observations. Compared by identity.
    """

    path: str
    world: Mapping[str, Any]
    examples: tuple[Example, ...]
    observations: NDArray[np.float64]
    clusters: NDArray[np.int64]
    powers: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @property
    def by_power(self) -> list[list[int]]:
        """Indices of each cluster by rank, clusters from strong cooling to strong heating."""
        groups = [np.flatnonzero(self.clusters == cluster).tolist() for cluster in np.unique(self.clusters)]
        return sorted(groups, key=lambda group: (float(self.powers[group].mean()), group[0]))


def load_shots(path: str) -> Shots:
    """Read a file of examples. Raises DataError that names the file, the example and the field."""
    try:
        status = Path(path).stat()
    except OSError:
        raise DataError(
            f"examples {path}: there is no such file; make it with `sapwood pipeline RECIPE --stage select`."
        ) from None
    return _loaded(path, status.st_mtime_ns, status.st_size)


def pooled(candidates: Sequence[Candidate], world: Mapping[str, Any]) -> Shots:
    """Worked examples that no file gave, as `POOL_CLUSTERS` equal parts in order of their best power."""
    order = sorted(candidates, key=lambda item: item.power)
    observations = np.array([item.observation for item in order], np.float64)
    return Shots(
        "",
        world,
        tuple(item.example for item in order),
        observations,
        np.arange(len(order)) * min(POOL_CLUSTERS, len(order)) // len(order),
        np.array([item.power for item in order]),
        observations.mean(axis=0),
        np.where(observations.std(axis=0) > 0, observations.std(axis=0), 1.0),
    )


def check_shots(shots: Shots, family: Hvac) -> None:
    """Refuse examples of another building, layout of actions, time step, power or target (DataError)."""
    why, own = misfit(shots.world, family), world_of(family)
    for name in MEANING:
        if not why and shots.world.get(name) != own[name]:
            theirs = printable(str(shots.world.get(name)), 60)
            why = f"its {name} is {theirs}, and this world's is {own[name]}"
    if why:
        raise DataError(
            f"examples {shots.path}: from another world: {why}; make some that fit with `sapwood pipeline RECIPE "
            "--stage select`, or leave `examples` out for worked ones."
        )


def fixed(shots: Shots, count: int) -> tuple[Example, ...]:
    """The same `count` examples for every prompt.

    Of the clusters in order of their mean power the middles of `count` equal parts, and of each the best; where there
    are fewer clusters than examples, all of them, then their second best and so on.
    """
    groups = shots.by_power
    count = min(count, len(shots.examples))
    if count <= len(groups):
        chosen = [groups[(2 * i + 1) * len(groups) // (2 * count)][0] for i in range(count)]
    else:
        rounds = [group[place] for place in range(max(map(len, groups))) for group in groups if place < len(group)]
        chosen = sorted(rounds[:count], key=lambda index: float(shots.powers[index]))
    # Neighbours in the prompt should differ, or a small model copies the last one.
    return tuple(shots.examples[index] for index in chosen[::2] + chosen[1::2])


def nearest(shots: Shots, observation: NDArray[Any], count: int) -> tuple[Example, ...]:
    """The `count` examples with the smallest standardised distance from a state, the nearest last."""
    difference = (shots.observations - np.asarray(observation, np.float64)) / shots.scale
    order = np.argsort((difference**2).sum(axis=1), kind="stable")[:count]
    return tuple(shots.examples[index] for index in order[::-1])


def balanced(shots: Shots, count: int, seed: int) -> tuple[Example, ...]:
    """One example each of `count` clusters, both drawn by seed; more than one where there are fewer clusters."""
    rng = np.random.default_rng([seed, 11])
    left = [[group[i] for i in rng.permutation(len(group))] for group in shots.by_power]
    chosen: list[int] = []
    while len(chosen) < min(count, len(shots.examples)):
        for place in rng.permutation(len(left)):
            if left[place] and len(chosen) < count:
                chosen.append(left[place].pop())
    return tuple(shots.examples[index] for index in chosen)


# --- reading -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _loaded(path: str, stamp: int, size: int) -> Shots:
    found = load_json(Path(path), "file of examples")
    try:
        return _shots(path, found)
    except _Bad as error:
        raise DataError(f"examples {path}: {error}.") from None


class _Bad(Exception):
    """What is wrong, and where."""


def _shots(path: str, found: dict[str, Any]) -> Shots:
    if found.get("format") != FORMAT:
        raise _Bad(
            f'its "format" is {printable(str(found.get("format")), 40)}, not {FORMAT}: not a file of examples that '
            "stage select wrote"
        )
    world, rows = found.get("world"), found.get("examples")
    if not isinstance(world, dict) or not all(_names(world.get(name)) for name in ("observation", "action")):
        raise _Bad("it has no world with names of observation and action")
    width, powers = len(world["observation"]), len(world["action"])
    mean, scale = (_numbers(found, name, width) for name in ("mean", "scale"))
    if min(scale) <= 0:
        raise _Bad("scale has a number that is not positive")
    if not isinstance(rows, list) or not rows:
        raise _Bad("it has no examples")
    made, observations, clusters, means, ranks = [], [], [], [], []
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise _Bad("it is no object")
            action = _numbers(row, "action", powers)
            if max(abs(power) for power in action) > 1.0:
                raise _Bad("action has a power outside -1..1")
            state, reward = row.get("state"), _numbers({"reward": [row.get("reward")]}, "reward", 1)[0]
            if not isinstance(state, str) or not state.strip():
                raise _Bad("state is no text")
            start = {name: row.get(name) for name in ("day", "hour", "step", "task")}
            observations.append(_numbers(row, "observation", width))
            clusters.append(_whole(row, "cluster"))
            ranks.append(_whole(row, "rank"))
        except _Bad as error:
            raise _Bad(f"example {number}: {error}") from None
        made.append(Example(state, answer(action), reward, start))
        means.append(float(np.mean(action)))
    order = sorted(range(len(made)), key=lambda i: (clusters[i], ranks[i]))
    return Shots(
        path,
        world,
        tuple(made[i] for i in order),
        np.array([observations[i] for i in order]),
        np.array([clusters[i] for i in order], np.int64),
        np.array([means[i] for i in order]),
        np.array(mean),
        np.array(scale),
    )


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _numbers(found: Mapping[str, Any], name: str, length: int) -> Sequence[float]:
    values = found.get(name)
    if not isinstance(values, list) or len(values) != length:
        raise _Bad(f"{name} is no list of {length} numbers")
    for value in values:
        # A comparison with NaN is false, so it is refused too.
        if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
            raise _Bad(f"{name} is {printable(str(value), 40)}, not a number within {LARGEST:g}")
    return [float(value) for value in values]


def _whole(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise _Bad(f"{name} is {printable(str(value), 40)}, not a whole number from 0 on")
    return value
