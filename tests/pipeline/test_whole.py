"""All stages on the bundled model, as the shipped recipe has them, with everything small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    *("ppo.total_steps=4096", "ppo.record_days=60", "select.preselect=100", "select.clusters=4"),
    *("select.per_cluster=3", "rollout.episodes=6", "rollout.at_once=2", "finetune.epochs=1", "eval.days=3"),
    *("grpo.steps=1", "grpo.batch_size=2", "grpo.group_size=2", "run.rounds=2", "run.validation_days=2"),
)


def command(folder: Path, *more: str) -> list[str]:
    recipe = str(ROOT / "recipes" / "hvac_self_distillation.yaml")
    return [sys.executable, "-m", "sapwood.cli", "pipeline", recipe, f"run.dir={folder}", *SMALL, *more]


def run(folder: Path, *more: str) -> list[dict]:
    done = subprocess.run(
        command(folder, "--json", *more), capture_output=True, text=True, check=False, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["stages"]


def results(folder: Path) -> dict[str, dict]:
    return {
        row["name"]: row for row in json.loads((folder / "05_evaluation" / "evaluation.json").read_text())["results"]
    }


@pytest.mark.slow
@pytest.mark.smollm
def test_all_stages_killed_half_way_come_to_the_same(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stages = run(whole)
    names = [stage["stage"] for stage in stages]
    assert names[:5] == ["ppo", "select", "rollout", "distill", "finetune"]
    assert names[-2:] == ["grpo", "eval"]
    assert set(results(whole)) >= {"random", "proportional", "ppo", "base", "finetuned", "grpo"}
    assert all(stage["skipped"] for stage in run(whole))

    waiting = iter(("03_llm_rollout/llm_rollout.*.jsonl*", "04_finetuning/metrics.jsonl"))
    for pattern in waiting:
        process = subprocess.Popen(
            command(cut), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + 600
        while not any(cut.glob(pattern)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert process.poll() is None, pattern
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(cut)
    assert {name: row["returns"] for name, row in results(cut).items()} == {
        name: row["returns"] for name, row in results(whole).items()
    }
