"""How long training waits for its checkpoints: written in the background, or at once.

    .venv/bin/python benchmarks/checkpoint_stall.py [--tiny]

SFT of SmolLM2-135M with a checkpoint after every step: the adapter (rank 16), and all weights with AdamW's moments
(about 1.6 GB a checkpoint). A row's figure is the share of a run's time in which training waited (copying what is
trained, and waiting for the checkpoint before), which with a checkpoint every 50 steps is 50 times smaller.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import BenchmarkError, Options, Row, machine, model_folder, publish, time_ratio

STEPS = 6


def waited(model: str, folder: Path, lora: bool, background: bool, options: Options) -> tuple[float, float]:
    """(seconds of waiting, seconds of a run's steps with it) of a run of its own."""
    run = folder / f"run-{lora}-{background}"
    recipe: dict[str, Any] = {
        "run": {"dir": str(run), "steps": 2 if options.tiny else STEPS},
        "model": {"name": model, "lora": {"rank": 16} if lora else None},
        "data": {"path": str(folder / "data.jsonl"), "eval_fraction": 0},
        "algorithm": "sft",
        "optim": {"batch_size": 8, "learning_rate": 1e-5},
        "checkpoint": {"every": 1, "keep": 1, "background": background},
        "trackers": [],
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    command = [str(Path(sys.executable).with_name("sapwood")), "train", str(path), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise BenchmarkError(done.stderr.strip().splitlines()[-1])
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    # A row tells of the checkpoint after the step before it; the first step has none.
    stall = sum(row["checkpoint_seconds"] for row in rows[1:])
    parts = ("sampling_seconds", "learning_seconds", "loading_seconds", "checkpoint_seconds")
    return stall, sum(row[name] for row in rows[1:] for name in parts)


def run(options: Options) -> None:
    """Measure, print and write."""
    rows = []
    facts = machine(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = "The quick brown fox jumps over the lazy dog and goes home again. " * 6
        records = ({"prompt": f"Tell me story {i}.", "response": text} for i in range(64))
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        for lora, what in ((True, "adapter"), (False, "full")):
            found = {b: waited(model_folder(), folder, lora, b, options) for b in (True, False)}
            shares = {b: stall / total for b, (stall, total) in found.items()}
            step = (found[True][1] - found[True][0]) / max((2 if options.tiny else STEPS) - 1, 1)
            rows.append(
                Row(
                    name=f"checkpoint_stall_{what}",
                    ours=shares[True],
                    peer=shares[False],
                    ratio=time_ratio(shares[True], shares[False]),
                    unit="share of time, every step saved",
                    shape=f"SFT, 8 records a step, {'LoRA rank 16' if lora else 'all weights'}",
                    dtype="float32",
                    machine=facts,
                    peer_name="checkpoint.background: false",
                    note=f"a step without it takes {step:.2f} s",
                    samples={"ours": list(found[True]), "peer": list(found[False])},
                )
            )
    publish("checkpoint_stall", rows, options)


if __name__ == "__main__":
    run(Options.of(Options.parser(__doc__.splitlines()[0]).parse_args()))
