"""Sapwood: reinforcement post-training of language-model agents on token trees.

    import sapwood

    result = sapwood.train("recipes/hvac_demo.yaml", "run.dir=runs/mine", "run.steps=10")
    print(result.table.difference)
    model = sapwood.load("runs/mine")
    print(model.generate(["The zone is at 27 C."], max_new_tokens=16))

Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# PEFT imports bitsandbytes wherever that is installed, and it warns of casts and of kernels that the dequantised
# product (sapwood.models.quantised) doesn't use. Whichever module of ours comes first, this one came before it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from sapwood.algorithms import Algorithm
    from sapwood.api import MetricsTracker, Model, load, train
    from sapwood.config import Recipe, load_recipe, parse_recipe
    from sapwood.engines import Completion, Engine, Request, Sampling
    from sapwood.envs import Env, EnvFamily, Observation, Step
    from sapwood.errors import SapwoodError
    from sapwood.metrics import Metric
    from sapwood.models.load import load_policy
    from sapwood.rewards import Reward
    from sapwood.rollout import collect, to_rows
    from sapwood.run import Run, read_metrics
    from sapwood.trackers import Tracker
    from sapwood.tree import TokenTree
    from sapwood.types import Group, Message, Row, Task, Trajectory, Turn

_HOMES = {
    "sapwood.algorithms": ("Algorithm",),
    "sapwood.api": ("MetricsTracker", "Model", "load", "train"),
    "sapwood.config": ("Recipe", "load_recipe", "parse_recipe"),
    "sapwood.engines": ("Completion", "Engine", "Request", "Sampling"),
    "sapwood.envs": ("Env", "EnvFamily", "Observation", "Step"),
    "sapwood.errors": ("SapwoodError",),
    "sapwood.metrics": ("Metric",),
    "sapwood.models.load": ("load_policy",),
    "sapwood.rewards": ("Reward",),
    "sapwood.rollout": ("collect", "to_rows"),
    "sapwood.run": ("Run", "read_metrics"),
    "sapwood.trackers": ("Tracker",),
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
    "Metric",
    "MetricsTracker",
    "Model",
    "Observation",
    "Recipe",
    "Request",
    "Reward",
    "Row",
    "Run",
    "Sampling",
    "SapwoodError",
    "Step",
    "Task",
    "TokenTree",
    "Tracker",
    "Trajectory",
    "Turn",
    "collect",
    "load",
    "load_policy",
    "load_recipe",
    "parse_recipe",
    "read_metrics",
    "to_rows",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sapwood' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing a submodule sets it as an attribute here, which must not hide the public function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME_OF):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
