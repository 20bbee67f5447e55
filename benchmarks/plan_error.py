"""What `sapwood train --plan` tells, against what the run then takes: peak memory, and time.

    .venv/bin/python benchmarks/plan_error.py [--only NAME ...] [--quick] [--tiny]

Every recipe runs as `sapwood train` for a few steps, in a process of its own, and is planned with the same overrides
in another. A run's memory is its peak resident memory (VmHWM), read until it ends; its time is that of the whole
process. ours: planned; peer: measured; ratio: planned / measured. The time's `ours` is the middle of the range.

The two constants of the plan that stand for the allocator were fitted to runs of the recipes marked `fitted`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _harness import LOGS, REPOSITORY, BenchmarkError, Options, Row, machine, publish, say

#: The longest time that one run may take.
LIMIT = 1800
_FEW = ("run.epochs=null", "optim.warmup_steps=1")


@dataclass(frozen=True)
class Case:
    """A recipe with overrides. fitted: the plan's constants were fitted to it."""

    name: str
    what: str
    recipe: str
    steps: int
    overrides: tuple[str, ...] = ()
    fitted: bool = False

    def arguments(self, folder: Path, steps: int) -> list[str]:
        """Of `sapwood train`."""
        return [self.recipe, *self.overrides, f"run.steps={steps}", f"run.dir={folder / self.name}"]


CASES = (
    Case("grpo_hvac", "GRPO in a world, LoRA", "recipes/hvac_demo.yaml", 4, ("eval.baselines=false",), fitted=True),
    Case("grpo", "GRPO on prompts, LoRA", "recipes/smollm2/grpo.yaml", 4, ("eval.tasks=16",)),
    Case(
        "rloo", "RLOO on prompts, LoRA", "recipes/smollm2/rloo.yaml", 4, ("eval.tasks=16", "engine.max_new_tokens=48")
    ),
    Case("ppo", "PPO, a critic on one base, LoRA", "recipes/smollm2/ppo.yaml", 3, ("eval.tasks=16",), fitted=True),
    Case("sft", "SFT, LoRA", "recipes/smollm2/sft.yaml", 8, _FEW, fitted=True),
    Case("sft_full", "SFT, all weights", "recipes/smollm2/sft.yaml", 4, (*_FEW, "model.lora=null"), fitted=True),
    Case(
        "sft_checkpointed",
        "SFT, LoRA, gradient checkpointing, 64 records a step",
        "recipes/smollm2/sft.yaml",
        4,
        (*_FEW, "model.gradient_checkpointing=true", "optim.batch_size=64"),
        fitted=True,
    ),
    Case("sft_bf16", "SFT, LoRA, bfloat16", "recipes/smollm2/sft.yaml", 4, (*_FEW, "model.dtype=bfloat16")),
    Case("sft_8bit", "SFT, LoRA, 8-bit base", "recipes/smollm2/sft.yaml", 4, (*_FEW, "model.quantize=8bit")),
    Case("dpo", "DPO, LoRA", "recipes/smollm2/dpo.yaml", 6, _FEW, fitted=True),
    Case("dpo_full", "DPO, all weights, a frozen reference", "recipes/smollm2/dpo.yaml", 4, (*_FEW, "model.lora=null")),
    Case("kto", "KTO, LoRA", "recipes/smollm2/kto.yaml", 6, _FEW),
    Case("reward", "reward model, LoRA", "recipes/smollm2/reward.yaml", 6, _FEW, fitted=True),
)


def planned(case: Case, folder: Path, steps: int, options: Options) -> dict[str, Any]:
    """The plan as JSON."""
    done = subprocess.run(
        [*_SAPWOOD, "train", *case.arguments(folder, steps), "--plan", "--json"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=_environment(options),
        timeout=LIMIT,
        check=False,
    )
    if not done.stdout:
        raise BenchmarkError(f"the plan of {case.name}: {_last(done.stderr)}")
    return json.loads(done.stdout)


def measured(case: Case, folder: Path, steps: int, options: Options) -> tuple[float, float]:
    """(peak resident memory in MiB, seconds) of the run."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"plan_error_{case.name}.log"
    began, peak = time.perf_counter(), 0
    with log.open("w") as file:
        process = subprocess.Popen(
            [*_SAPWOOD, "train", *case.arguments(folder, steps)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=_environment(options),
        )
        try:
            while process.poll() is None:
                peak = max(peak, _high_water(process.pid))
                if time.perf_counter() - began > LIMIT:
                    raise BenchmarkError(f"{case.name} did not finish within {LIMIT} s")
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise BenchmarkError(f"{case.name}: {_last(log.read_text())}")
    return peak / 1024, time.perf_counter() - began


_SAPWOOD = (sys.executable, "-m", "sapwood.cli")


def _environment(options: Options) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}


def _high_water(pid: int) -> int:
    """KiB; 0 where the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def compare(case: Case, options: Options, facts: dict[str, Any]) -> list[Row]:
    """The rows of one recipe: memory and time."""
    steps = 2 if options.tiny else case.steps
    with tempfile.TemporaryDirectory() as scratch:
        made = planned(case, Path(scratch), steps, options)
        peak, seconds = measured(case, Path(scratch), steps, options)
    memory = made["memory"]
    ours, most = memory["peak"] / 2**20, memory["at_most"] / 2**20
    low, high = made["time"]["seconds"]
    say(
        f"{case.name}: planned {ours:,.0f} MiB, measured {peak:,.0f}; {low:.0f} to {high:.0f} s, measured {seconds:.0f}"
    )
    common = {"shape": f"{case.what}, {steps} steps", "dtype": "-", "machine": facts, "peer_name": "measured"}
    fitted = "; fitted" if case.fitted else ""
    return [
        Row(
            name=f"plan_memory_{case.name}",
            ours=ours,
            peer=peak,
            ratio=ours / peak,
            unit="MiB peak RSS",
            note=f"error {ours / peak - 1:+.1%}, peak while {memory['peak_phase']}, {most:,.0f} MiB at most{fitted}",
            **common,
        ),
        Row(
            name=f"plan_time_{case.name}",
            ours=(low + high) / 2,
            peer=seconds,
            ratio=(low + high) / 2 / seconds,
            unit="s",
            note=f"planned {low:.0f} to {high:.0f} s",
            **common,
        ),
    ]


def run(options: Options, only: list[str] | None = None) -> None:
    """Measure, print and write; rows of recipes that are left out stay."""
    facts, failed = machine(options.threads), []
    for case in CASES:
        if only and case.name not in only:
            continue
        if options.quick and not only and case.name not in ("grpo_hvac", "sft", "sft_full", "dpo", "ppo"):
            continue
        try:
            publish("plan_error", compare(case, options, facts), options)
        except BenchmarkError as error:
            failed.append(str(error))
            say(failed[-1])
    if failed:
        raise BenchmarkError("; ".join(failed))


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="some of the recipes")
    arguments = parser.parse_args()
    run(Options.of(arguments), arguments.only)


if __name__ == "__main__":
    main()
