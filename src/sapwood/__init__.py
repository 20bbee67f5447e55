"""Sapwood: reinforcement post-training of language-model agents on token trees.

    import sapwood

    recipe = sapwood.load_recipe("recipes/hvac_demo.yaml", ["run.dir=runs/mine", "run.steps=10"])
    result = sapwood.train(recipe)
    print(result.policy_dir, result.table.difference)

Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapwood.algorithms import Algorithm
    from sapwood.config import Recipe, load_recipe, parse_recipe
    from sapwood.engines import Completion, Engine, Request, Sampling
    from sapwood.envs import Env, EnvFamily, Observation, Step
    from sapwood.errors import SapwoodError
    from sapwood.models.load import load_policy
    from sapwood.rewards import Reward
    from sapwood.rollout import collect, to_rows
    from sapwood.train import train
    from sapwood.tree import TokenTree
    from sapwood.types import Group, Message, Row, Task, Trajectory, Turn

_HOMES = {
    "sapwood.algorithms": ("Algorithm",),
    "sapwood.config": ("Recipe", "load_recipe", "parse_recipe"),
    "sapwood.engines": ("Completion", "Engine", "Request", "Sampling"),
    "sapwood.envs": ("Env", "EnvFamily", "Observation", "Step"),
    "sapwood.errors": ("SapwoodError",),
    "sapwood.models.load": ("load_policy",),
    "sapwood.rewards": ("Reward",),
    "sapwood.rollout": ("collect", "to_rows"),
    "sapwood.train": ("train",),
    "sapwood.tree": ("TokenTree",),
    "sapwood.types": ("Group", "Message", "Row", "Task", "Trajectory", "Turn"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Algorithm",
    "Completion",
    "Engine",
    "Env",
    "EnvFamily",
    "Group",
    "Message",
    "Observation",
    "Recipe",
    "Request",
    "Reward",
    "Row",
    "Sampling",
    "SapwoodError",
    "Step",
    "Task",
    "TokenTree",
    "Trajectory",
    "Turn",
    "collect",
    "load_policy",
    "load_recipe",
    "parse_recipe",
    "to_rows",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sapwood' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
