"""Runs to be killed: every algorithm, with adapters and with full weights, with everything that a run remembers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sapwood.envs import Env, EnvFamily, Observation, Step
from sapwood.types import Message, Task

STEPS = 6


class Remembers(EnvFamily):
    """Asks for a word that depends on how often it has been asked: its state outlives the episodes."""

    _asked: int = 0

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        return [Task(f"{split}-{seed}-{i}", seed=i) for i in range(count)]

    def make(self, task: Task) -> Env:
        self._asked += 1
        return _Remembers(self._asked)

    def state(self) -> dict[str, Any]:
        return {"asked": self._asked}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._asked = state["asked"]


class _Remembers(Env):
    def __init__(self, number: int) -> None:
        self.number, self.turns = number, 0

    def start(self) -> Observation:
        return Observation((Message("user", f"visit {self.number}"),))

    def step(self, reply: str) -> Step:
        # Worlds of others draw from the global generators.
        self.turns += 1
        reward = len(reply) % 3 + 0.1 * float(np.random.rand())
        if self.turns == 2:
            return Step(None, reward, terminated=True)
        return Step(Observation((Message("user", f"again {self.number}"),)), reward)


PROMPTS = {
    "name": "prompts",
    "eval_fraction": 0.25,
    "items": [{"prompt": f"{text} {i}"} for i in range(6) for text in ("go", "the lamp")],
}
ROLLOUTS = {
    "env": PROMPTS,
    "rewards": [{"name": "tests.learning:LowTokens"}],
    "engine": {"name": "local", "max_new_tokens": 5, "ignore_eos": True, "temperature": 0.9},
    "eval": {"tasks": 2, "every": 2},
    "samples": {"every": 1},
}
DATA = {"eval": {"every": 2}, "samples": {"every": 2}}
LORA = {"lora": {"rank": 4, "dropout": 0.1}}
WATCHED = {
    "optim": {"schedule": "plateau", "plateau_patience": 0},
    "early_stopping": {"metric": "eval/return", "patience": 5},
}

#: name -> what differs from the plain recipe.
RUNS: dict[str, dict[str, Any]] = {
    "grpo-lora": {**ROLLOUTS, "model": LORA, "algorithm": {"name": "grpo", "group_size": 3, "epochs": 2, "updates": 2}},
    "grpo-full-watched": {
        **ROLLOUTS,
        **WATCHED,
        "model": {"lora": None},
        "algorithm": {"name": "grpo", "group_size": 3},
    },
    "grpo-stateful": {
        **ROLLOUTS,
        "env": {"name": "tests.reliability.runs:Remembers"},
        "rewards": [{"name": "env"}],
        "model": LORA,
        "algorithm": {"name": "grpo", "group_size": 3},
        "trackers": [],
    },
    "ppo-lora": {
        **ROLLOUTS,
        "model": LORA,
        "algorithm": {
            "name": "ppo",
            "group_size": 2,
            "epochs": 2,
            "updates": 2,
            "kl_coef": 0.2,
            "kl_control": "multiplicative",
            "whiten_rewards": "running",
            "target_kl": 0.5,
        },
    },
    "ppo-full": {**ROLLOUTS, "model": {"lora": None}, "algorithm": {"name": "ppo", "group_size": 2, "epochs": 2}},
    "rloo-lora": {**ROLLOUTS, "model": LORA, "algorithm": {"name": "rloo", "group_size": 3}},
    "reinforce-full": {**ROLLOUTS, "model": {"lora": None}, "algorithm": {"name": "reinforce_pp", "group_size": 2}},
    "sft-lora": {**DATA, "model": LORA, "algorithm": "sft", "optim": {"schedule": "cosine", "warmup_steps": 2}},
    "sft-full": {**DATA, "model": {"lora": None}, "algorithm": "sft", "optim": {"gradient_accumulation": 2}},
    "dpo-lora": {**DATA, "model": LORA, "algorithm": "dpo", "reference": {"precompute": True}},
    "dpo-full": {**DATA, "model": {"lora": None}, "algorithm": {"name": "dpo", "loss_type": "ipo"}},
    "kto-lora": {**DATA, "model": LORA, "algorithm": "kto"},
    "reward-lora": {**DATA, "model": LORA, "algorithm": "reward"},
    "distill-lora": {
        **DATA,
        "model": LORA,
        "algorithm": {"name": "distill", "advantage": "return", "clip_high": 1.0},
        "critic": {"kind": "adapter"},
    },
    "distill-full": {**DATA, "model": {"lora": None}, "algorithm": {"name": "distill", "value_coef": 0.0}},
    "reward-full": {**DATA, "model": {"lora": None}, "algorithm": "reward"},
}


def write_data(folder: Path, model: Path | None = None) -> dict[str, Path]:
    """Data files by shape, of 17 records each, so that 6 steps of 4 end in the middle of the second epoch.

    model: whose decisions are recorded, about as many; without it there are no recordings.
    """
    rng = np.random.default_rng(3)
    words = ("lamp", "table", "house", "a green door")
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "pairs": [], "kto": []}
    for number in range(17):
        good, bad = rng.permutation(words)[:2].tolist()
        prompt = f"{number} {good}"
        rows["sft"].append({"prompt": prompt, "response": good})
        rows["pairs"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        rows["kto"].append({"prompt": prompt, "completion": good, "label": bool(number % 2)})
    found = {}
    for name, records in rows.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    if model is not None:
        from tests.recorded import opened, record

        found["recordings"] = record(folder / "recordings.json", opened(model), model, states=9)
    return found


def recipe(name: str, model: Path, data: Mapping[str, Path], folder: Path, **run: Any) -> dict[str, Any]:
    """The recipe of a run by name."""
    made: dict[str, Any] = {
        "run": {"dir": str(folder), "steps": STEPS, "seed": 5, **run},
        "optim": {"learning_rate": 1e-2, "batch_size": 4},
        "checkpoint": {"every": 1, "keep": 2},
    }
    for section, values in RUNS[name].items():
        made[section] = {**made[section], **values} if section in made else values
    made["model"] = {"name": str(model), **made["model"]}
    algorithm = made["algorithm"] if isinstance(made["algorithm"], str) else made["algorithm"]["name"]
    kind = {"sft": "sft", "dpo": "pairs", "reward": "pairs", "kto": "kto", "distill": "recordings"}.get(algorithm)
    if kind is not None:
        made["data"] = {"path": str(data[kind]), "eval_fraction": 0.2}
    return made


def left(run: Path) -> dict[str, str]:
    """What a run left that must repeat byte for byte: file -> digest. Of the training state, its tensors."""
    found = {}
    for name in ("metrics.jsonl", "warnings.jsonl", "evaluation.json"):
        if (run / name).is_file():
            found[name] = _digest((run / name).read_bytes())
    for path in sorted((run / "samples").glob("*")):
        found[f"samples/{path.name}"] = _digest(path.read_bytes())
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    for role in ("policy", "critic"):
        for path in sorted((last / role).rglob("*")):
            if path.is_file():
                found[f"{last.name}/{role}/{path.relative_to(last / role)}"] = _digest(path.read_bytes())
    state = torch.load(last / "training_state.pt", weights_only=True)
    found[f"{last.name}/training_state.pt"] = _digest(_flat(state).encode())
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flat(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _digest(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_flat(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_flat, value)) + "]"
    return repr(value)
