"""Pipelines that can't be right: recipes, trajectory files, examples and policies, given to one stage by itself."""

from __future__ import annotations

import json
import random
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tests.reliability.fuzz import Case, Way
from tests.reliability.malformed_recipes import cli
from tests.reliability.mutate import MARK, YAML_VALUES, at, damage, encodings, misspelt, no_file, places, put, remove

FILE = "pipeline.yaml"
RECIPE: dict[str, Any] = {
    "run": {"dir": "run"},
    "env": {"name": "hvac", "control": "uniform", "horizon": 3, "few_shot": 2, "history": 0},
    "ppo": {"total_steps": 64, "rollout_steps": 24, "n_envs": 2, "record_days": 6},
    "select": {"preselect": 12, "clusters": 3, "per_cluster": 2},
    "rollout": {"episodes": 4, "replies_per_state": 2},
}
_folder = Path()


def prepare(folder: Path) -> None:
    """Import the stages, and make the files that are damaged later."""
    global _folder
    _folder = folder
    from sapwood.envs.hvac.layout import world_of
    from sapwood.pipeline import distill, ppo, select, stages  # noqa: F401
    from sapwood.pipeline.recipe import parse_pipeline
    from sapwood.pipeline.trajectories import Decision, Episode, Reply, TrajectoryFile, prompt_id, write
    from sapwood.types import Message

    made = folder / "made"
    recipe = parse_pipeline({**RECIPE, "run": {"dir": str(made)}})
    family = recipe.family
    ppo.run(recipe.ppo, family, made)
    select.run(recipe.select, family, made / ppo.TRAJECTORY, made)
    trunk = (Message("system", "Choose a power."),)
    episodes = []
    for number, task in enumerate(family.tasks("train", 4, 0)):
        steps = tuple(
            Decision(
                i, tuple(20.0 + i for _ in range(10)), (0.1 * i,), -1.0 - i - number, 0.1, 1.0, prompt=prompt_id(trunk),
                state=f"{i} C", reply='{"power": 0.1}', parsed="json", temperature=0.5, token_ids=(5, 6),
                sampled_logprobs=(-0.5, -0.1), kept_logmass=(0.0, 0.0),
                others=(Reply('{"power": 0.5}', (0.5,), -2.0 - i, "json", False, 0.1, 1.0, (5,), (-0.5,), (0.0,)),),
            )
            for i in range(3)
        )  # fmt: skip
        day, hour = int(task.metadata["day"]), int(task.metadata["hour"])
        episodes.append(Episode(task.id, day, hour, task.seed, sum(step.reward for step in steps), steps))
    model = {"name": "tiny"}
    write(
        made / "rollout.json",
        TrajectoryFile("llm", 0, world_of(family), tuple(episodes), model, {prompt_id(trunk): trunk}),
    )


@lru_cache(1)
def _resolved() -> str:
    from sapwood.pipeline.recipe import dump_pipeline, parse_pipeline

    return dump_pipeline(parse_pipeline(RECIPE))


def _recipe(rng: random.Random) -> Any:
    return yaml.safe_load(_resolved()) if rng.random() < 0.6 else json.loads(json.dumps(RECIPE))


def recipe_value(rng: random.Random, folder: Path) -> Case:
    """A value that no option means, or a key that is lost or misspelt."""
    data = _recipe(rng)
    place = rng.choice(list(places(data)))
    key = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
    kind = rng.random()
    if kind < 0.2:
        remove(data, place)
    elif kind < 0.4 and isinstance(place[-1], str):
        value = at(data, place)
        remove(data, place)
        put(data, (*place[:-1], misspelt(place[-1], rng)), value)
    else:
        put(data, place, MARK)
    text = yaml.safe_dump(data, sort_keys=False, width=10**6).replace(f"'{MARK}'", rng.choice(YAML_VALUES), 1)
    (folder / FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    return Case(cli("pipeline", "--dry-run", FILE), (FILE, key))


def recipe_bytes(rng: random.Random, folder: Path) -> Case:
    """Bytes flipped, lost, repeated or put in."""
    (folder / FILE).write_bytes(damage(_resolved().encode(), rng))
    return Case(cli("pipeline", "--dry-run", FILE), (FILE,))


_VALUES = (
    *(None, True, False, 0, -1, 1.5, 1e308, -1e308, 10**400, "", "x", "\x1b[2J", "\ud800", "../../x", [], {}, [[]]),
    *(float("nan"), float("inf"), [None], {"a": 1}, "1" * 5000, [0.0] * 1000, "json", -(2**70), {"__class__": "x"}),
)


def _file_of(rng: random.Random) -> tuple[str, str, str]:
    """(file, stage, input's name) of a stage that reads it."""
    return rng.choice(
        (
            ("ppo_trajectory.json", "select", "trajectory"),
            ("rollout.json", "distill", "rollout"),
            ("few_shot_examples_structured.json", "rollout", "examples"),
        )
    )


def _stage(folder: Path, stage: str, name: str, file: str) -> Case:
    """The stage on a file. What it would need a model for ends before: there is none of that name."""
    data = {**RECIPE, "model": {"name": "./nothing"}}
    (folder / FILE).write_text(yaml.safe_dump(data))
    named = (file, FILE, "./nothing") if stage == "rollout" else (file,)
    arguments = ("pipeline", FILE, "--stage", stage, "--input", f"{name}={file}", "--out", "out")
    return Case(cli(*arguments), named, kept=(file,))


def file_value(rng: random.Random, folder: Path) -> Case:
    """A value of a trajectory or example file that is none there, a key that is lost, or one too many."""
    file, stage, name = _file_of(rng)
    data = json.loads((_folder / "made" / file).read_text())
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.choice(list(places(data)))
        if rng.random() < 0.25:
            remove(data, place)
        else:
            put(data, place, rng.choice(_VALUES))
    (folder / file).write_text(json.dumps(data))
    return _stage(folder, stage, name, file)


def file_bytes(rng: random.Random, folder: Path) -> Case:
    """Such a file with bytes flipped, in another encoding, or no file at all."""
    file, stage, name = _file_of(rng)
    content = (_folder / "made" / file).read_bytes()
    kind = rng.random()
    if kind < 0.7:
        (folder / file).write_bytes(damage(content, rng))
    elif kind < 0.9:
        (folder / file).write_bytes(rng.choice(list(encodings(content.decode()).values())))
    else:
        no_file(folder / file, rng, pipe=False)
    return _stage(folder, stage, name, file)


def policy_file(rng: random.Random, folder: Path) -> Case:
    """A policy that isn't ours, or is damaged."""
    content = (_folder / "made" / "ppo_final.zip").read_bytes()
    (folder / "policy.zip").write_bytes(damage(content, rng) if rng.random() < 0.8 else rng.randbytes(200))
    shutil.copy(_folder / "made" / "rollout.json", folder / "rollout.json")
    (folder / FILE).write_text(yaml.safe_dump({**RECIPE, "distill": {"rank": "value"}}))
    inputs = ("--input", "rollout=rollout.json", "--input", "ppo=policy.zip")
    return Case(
        cli("pipeline", FILE, "--stage", "distill", *inputs, "--out", "out"), ("policy.zip",), kept=("policy.zip",)
    )


WAYS: dict[str, Way] = {
    "recipe value": recipe_value,
    "recipe bytes": recipe_bytes,
    "file value": file_value,
    "file bytes": file_bytes,
    "policy file": policy_file,
}
