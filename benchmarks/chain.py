"""The chain on real work: SFT -> reward model -> PPO, DPO and GRPO, each over several seeds, with shuffled twins.

    python benchmarks/chain.py                       # all of it: a few hours on 2 cores; goes on where it stopped
    python benchmarks/chain.py --only grpo --seeds 1
    python benchmarks/chain.py --report              # the table and curves of what is there

Every job is a `sapwood` command that docs/results.md shows. Runs go to runs/chain; the figures to
benchmarks/results/chain.json, docs/results.md (between its markers) and docs/images/chain.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sapwood.evaluate import mean_interval
from sapwood.run import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/chain")
RESULTS = ROOT / "benchmarks" / "results" / "chain.json"
SHUFFLED = '[{{name: "examples/chain/shuffled.py:Shuffled", of: {0}}}]'
REWARDS = {"grpo": "{name: env}", "ppo": "{name: reward_model, path: runs/chain/reward}"}
METHODS = ("dpo", "grpo", "ppo")


@dataclass(frozen=True)
class Job:
    """A command and the file that says it is done."""

    name: str
    command: tuple[str, ...]
    done: Path


def train(name: str, recipe: str, *overrides: str) -> Job:
    """A training run in a folder of its own."""
    folder = RUNS / name
    command = ("train", f"recipes/chain/{recipe}.yaml", f"run.dir={folder}", *overrides)
    return Job(name, command, folder / "evaluation.json")


def preparation() -> list[Job]:
    """What every method starts from, in order."""
    rollouts, grpo = RUNS / "rollouts.jsonl", "recipes/chain/grpo.yaml"
    asked = ("run.seed=100", "algorithm.group_size=4", "--split", "train", "--tasks", "1000", "--out", str(rollouts))
    jobs = [train("sft", "sft"), Job("rollouts", ("rollout", grpo, *asked), rollouts)]
    for name, flags in (("pairs", ()), ("pairs_shuffled", ("--shuffle",))):
        out = RUNS / f"{name}.jsonl"
        command = ("data", "pairs", str(rollouts), "--answers", "--per-task", "2", *flags, "--out", str(out))
        jobs.append(Job(name, command, out))
    return [*jobs, train("reward", "reward")]


def learning(seeds: int, twins: int, only: tuple[str, ...]) -> list[Job]:
    """Every method with every seed, and its twin, longest first."""
    jobs = []
    for kind, count in (("", seeds), ("twin", twins)):
        for seed in range(count):
            for method in reversed(METHODS):
                if method in only:
                    jobs.append(_learner(method, seed, kind == "twin"))
    return jobs


def _learner(method: str, seed: int, twin: bool) -> Job:
    overrides = [f"run.seed={seed}"]
    if twin and method == "dpo":
        overrides.append("data.path=runs/chain/pairs_shuffled.jsonl")
    elif twin:
        overrides.append(f"rewards={SHUFFLED.format(REWARDS[method])}")
    return train(f"{method}{'_twin' if twin else ''}_{seed}", method, *overrides)


def run(job: Job) -> None:
    """Run a job unless it is done; what an interrupted one left is set aside first."""
    if (ROOT / job.done).exists():
        return
    folder = ROOT / RUNS / job.name
    if folder.is_dir():
        shutil.rmtree(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    log = ROOT / RUNS / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print("sapwood", *job.command, flush=True)
    with log.open("w") as out:
        binary = Path(sys.executable).with_name("sapwood")
        failed = subprocess.run([str(binary), *job.command], cwd=ROOT, env=environment, stdout=out, stderr=out)
    if failed.returncode:
        raise SystemExit(f"{job.name} failed: see {log}")


def outcome(folder: Path) -> dict[str, float] | None:
    """Accuracy before and after of a finished run."""
    path = folder / "evaluation.json"
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    means = {result["name"]: result["mean"] for result in told["results"]}
    return {
        "before": means["base model"],
        "after": means["trained model"],
        "difference": told["difference"]["mean"],
        "low": told["difference"]["lo"],
        "high": told["difference"]["hi"],
        "tasks": told["difference"]["tasks"],
    }


def gather(seeds: int) -> dict[str, object]:
    """All outcomes; over seeds, the mean difference with its 95 % t interval."""
    table: dict[str, object] = {}
    for method in (*METHODS, *(f"{method}_twin" for method in METHODS)):
        runs = [found for seed in range(seeds) if (found := outcome(ROOT / RUNS / f"{method}_{seed}"))]
        if runs:
            interval = mean_interval([found["difference"] for found in runs])
            over = {"mean": interval.mean, "low": interval.lo, "high": interval.hi, "seeds": interval.n}
            table[method] = {"runs": runs, "difference": {k: v if math.isfinite(v) else None for k, v in over.items()}}
    sft, reward = ROOT / RUNS / "sft", ROOT / RUNS / "reward"
    if (sft / "evaluation.json").exists():
        results = json.loads((sft / "evaluation.json").read_text())["results"]
        table["sft"] = {result["name"]: {k: result[k] for k in ("mean", "lo", "hi", "tasks")} for result in results}
    if (reward / "evaluation.json").exists():
        table["reward"] = json.loads((reward / "evaluation.json").read_text())["held_out"]["metrics"]
    return table


def rows(table: dict[str, object]) -> list[str]:
    """The table of docs/results.md."""
    lines = ["| run | seeds | before | after | difference | 95 % interval over seeds |", "|---|---|---|---|---|---|"]
    for method, entry in table.items():
        if method in ("sft", "reward") or not isinstance(entry, dict):
            continue
        runs, over = entry["runs"], entry["difference"]
        before, after = (float(np.mean([r[key] for r in runs])) for key in ("before", "after"))
        interval = "-" if over["low"] is None else f"{over['low']:+.1%} .. {over['high']:+.1%}"
        name = method.replace("_twin", ", shuffled twin").upper().replace(", SHUFFLED TWIN", ", shuffled twin")
        lines.append(f"| {name} | {len(runs)} | {before:.1%} | {after:.1%} | {over['mean']:+.1%} | {interval} |")
    return lines


def curves(path: Path, seeds: int) -> None:
    """Held-out accuracy over the steps, a panel a method, twins in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, method in zip(figure.subplots(1, 3, sharey=True), METHODS, strict=True):
        for name, colour in ((f"{method}_twin", "0.6"), (method, "#1f6f4a")):
            for seed in range(seeds):
                metrics = ROOT / RUNS / f"{name}_{seed}" / "metrics.jsonl"
                if metrics.exists():
                    found = [(r["step"], r["eval/return"]) for r in read_metrics(metrics) if "eval/return" in r]
                    axis.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=3, linewidth=1.3)
        axis.set_title(f"{method.upper()} (grey: shuffled twin)", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out accuracy", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report(seeds: int) -> None:
    """Write the figures of what is finished."""
    table = gather(seeds)
    RESULTS.write_text(json.dumps(table, indent=2) + "\n")
    curves(ROOT / "docs" / "images" / "chain.png", seeds)
    page = ROOT / "docs" / "results.md"
    if page.exists():
        begin, end = "<!-- chain -->", "<!-- /chain -->"
        text = page.read_text()
        head, _, rest = text.partition(begin)
        page.write_text(head + begin + "\n\n" + "\n".join(rows(table)) + "\n\n" + end + rest.partition(end)[2])
    print("\n".join(rows(table)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--twins", type=int, default=3, help="seeds of the shuffled twins")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args()
    if not given.report:
        for job in preparation():
            run(job)
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(run, learning(given.seeds, given.twins, tuple(given.only))))
    report(max(given.seeds, given.twins))


if __name__ == "__main__":
    main()
