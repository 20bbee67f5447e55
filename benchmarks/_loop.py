"""Sapwood's own training loop as a worker's task: one measurement is one step of the recipe in spec["recipe"].

Nothing is left out: a step reads or samples its groups, tokenises them, scores, assigns credit and updates, exactly as
`sapwood train` does.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _worker import Measure

from sapwood.config import Recipe, parse_recipe
from sapwood.progress import Progress
from sapwood.run import Run
from sapwood.train import Trainer
from sapwood.types import Group, Message

Spec = dict[str, Any]
Pairs = list[tuple[list[int], list[int]]]

#: The conversation as bare text, each reply closed by the end token: the ids that TRL makes of plain strings.
_PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def train_task(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Steps of a recipe over spec["records"]. Raises RuntimeError where the loop's tokens aren't spec["rows"].

    A row of spec["rows"] is prompt and reply; where nothing is recorded (rollouts) it is the prompt alone.
    """
    trainer = _trainer(spec)
    rollouts = trainer.algorithm.learns_from == "rollouts"
    _check(_prompts(trainer, spec) if rollouts else _rows(trainer.parts.source.groups(1)), spec["rows"])
    steps = 0

    def measure(arguments: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        start = time.perf_counter()
        metrics, timing = trainer.step(steps)
        seconds = time.perf_counter() - start
        tokens = timing["sampled_tokens" if rollouts else "tokens"]
        if tokens != spec["tokens"]:
            raise RuntimeError(f"{tokens:.0f} tokens are trained on, not {spec['tokens']}")
        told = {"updates": metrics["updates"], "loss": metrics["loss"], "gathering_seconds": timing["sampling_seconds"]}
        return {"seconds": seconds, "tokens": tokens, **told}

    return measure, {"torch_threads": torch.get_num_threads()}


def _trainer(spec: Spec) -> Trainer:
    folder = Path(tempfile.mkdtemp(prefix="sapwood-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    recipe = _recipe(spec, folder)
    return Trainer.of(recipe, Run.create(recipe), Progress(stream=Path(os.devnull).open("w")))


def _recipe(spec: Spec, folder: Path) -> Recipe:
    """The spec's recipe with the settings that all benchmarks share; its data is spec["records"]."""
    records, template = folder / "records.jsonl", folder / "plain.jinja"
    records.write_text("".join(json.dumps(record) + "\n" for record in spec["records"]))
    template.write_text(_PLAIN)
    shared: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "steps": 1_000},
        "model": {
            "name": spec["model"],
            "dtype": spec["dtype"],
            "lora": {"rank": spec["rank"]},
            "chat_template": str(template),
        },
        "data": {"sources": [{"path": str(records), **spec.get("fields", {})}], "eval_fraction": 0.0},
        "optim": {"learning_rate": spec["learning_rate"], "batch_size": len(spec["records"]), "token_budget": 16_384},
        "eval": {"at_start": False},
        "samples": {"every": 0},
    }
    return parse_recipe({**shared, **spec["recipe"]})


def _rows(groups: Sequence[Group]) -> Pairs:
    return [(t.turns[0].prompt_ids.tolist(), t.turns[0].token_ids.tolist()) for g in groups for t in g.trajectories]


def _prompts(trainer: Trainer, spec: Spec) -> Pairs:
    return [(trainer.chat.start((Message("user", record["prompt"]),)).tolist(), []) for record in spec["records"]]


def _check(made: Pairs, rows: Sequence[Mapping[str, list[int]]]) -> None:
    if sorted(made) != sorted((row["prompt_ids"], row["reply_ids"]) for row in rows):
        raise RuntimeError("the loop's tokens are not the workload's")
