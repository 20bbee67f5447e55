"""Self-distillation in a building: does the tuned model beat the untuned one, and how near does it come to PPO?

    python benchmarks/hvac_pipeline.py                  # all of it: hours on 2 cores; goes on where it stopped
    python benchmarks/hvac_pipeline.py --climates Hot_Dry --seeds 1 --twins 0
    python benchmarks/hvac_pipeline.py --report         # the table of what is there

Every run is `sapwood pipeline recipes/hvac_self_distillation.yaml` with its climate and seed, in runs/hvac. A twin
takes the same rollout with its rewards dealt to the replies at random, and goes through distill, finetune and eval. The
figures go to benchmarks/results/hvac_pipeline.json and docs/results.md (between its markers).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.evaluate import mean_interval
from sapwood.pipeline import trajectories
from sapwood.pipeline.trajectories import Decision, Episode, Reply

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/hvac")
RECIPE = "recipes/hvac_self_distillation.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "hvac_pipeline.json"
CLIMATES = ("Hot_Dry", "Cool_Dry")
PLAYERS = ("random", "zero", "base", "finetuned", "grpo", "proportional", "ppo", "one_step_optimal")


def sapwood(name: str, *arguments: str) -> None:
    """Run a command of Sapwood's; what it prints goes to a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    log = ROOT / RUNS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print("sapwood", *arguments, flush=True)
    with log.open("a") as out:
        binary = Path(sys.executable).with_name("sapwood")
        failed = subprocess.run([str(binary), *arguments], cwd=ROOT, env=environment, stdout=out, stderr=out)
    if failed.returncode:
        raise SystemExit(f"{name} failed: see {log}")


def run(climate: str, seed: int, extra: tuple[str, ...]) -> None:
    """The pipeline, and nothing that is up to date."""
    name = f"{climate}_{seed}"
    sapwood(name, "pipeline", RECIPE, f"run.dir={RUNS / name}", f"run.seed={seed}", f"env.climate={climate}", *extra)


def twin(climate: str, seed: int, extra: tuple[str, ...]) -> None:
    """The same with shuffled rewards, from the run's own rollout and its own PPO."""
    name, folder = f"twin_{climate}_{seed}", RUNS / f"twin_{climate}_{seed}"
    if (ROOT / folder / "eval" / "evaluation.json").exists():
        return
    source = RUNS / f"{climate}_{seed}"
    dealt = shuffled(ROOT / source / "03_llm_rollout" / "llm_rollout.json", ROOT / folder / "rollout.json", seed)
    common = (RECIPE, f"run.dir={source}", f"run.seed={seed}", f"env.climate={climate}", *extra, "grpo=null")

    def stage(stage: str, *inputs: str) -> None:
        given = [part for item in inputs for part in ("--input", item)]
        sapwood(name, "pipeline", *common, "--stage", stage, *given, "--out", str(folder / stage))

    stage("distill", f"rollout={dealt}")
    stage("finetune", f"decisions={folder / 'distill' / 'distillation_data.json'}")
    stage("eval", f"adapter={folder / 'finetune' / 'final_model'}")


def shuffled(source: Path, target: Path, seed: int) -> Path:
    """A copy of a rollout with the rewards (and their two norms) of all replies dealt at random."""
    file = trajectories.read(source)
    said: list[Decision | Reply] = [reply for _, step in file.steps for reply in (step, *step.others)]
    order = np.random.default_rng(seed).permutation(len(said))
    dealt = iter([said[i] for i in order])

    def give(reply: Any, **more: Any) -> Any:
        other = next(dealt)
        return dataclasses.replace(reply, reward=other.reward, energy=other.energy, comfort=other.comfort, **more)

    def step_of(step: Decision) -> Decision:
        own = give(step)
        return dataclasses.replace(own, others=tuple(give(other) for other in step.others))

    def episode_of(episode: Episode) -> Episode:
        steps = tuple(step_of(step) for step in episode.steps)
        return dataclasses.replace(episode, steps=steps, total=math.fsum(step.reward for step in steps))

    made = dataclasses.replace(file, episodes=tuple(episode_of(episode) for episode in file.episodes))
    return trajectories.write(target, made)


# --- what came of it ---------------------------------------------------------------------------------------------


def found(path: Path) -> dict[str, dict[str, float]] | None:
    """Every player's mean return, parse rate, energy and comfort; None where the run isn't finished."""
    if not path.exists():
        return None
    return {
        row["name"]: {"return": row["mean"], "parsed": row["parsed"], **row["metrics"]}
        for row in json.loads(path.read_text())["results"]
    }


def gather(climates: tuple[str, ...], seeds: int) -> dict[str, Any]:
    """Of every climate: each player's mean over seeds with its 95 % t interval, and the differences seed by seed."""
    table: dict[str, Any] = {}
    for climate in climates:
        runs = [r for s in range(seeds) if (r := found(ROOT / RUNS / f"{climate}_{s}/05_evaluation/evaluation.json"))]
        twins = [r for s in range(seeds) if (r := found(ROOT / RUNS / f"twin_{climate}_{s}/eval/evaluation.json"))]
        if not runs:
            continue
        players = {
            name: {"returns": [r[name]["return"] for r in runs], "parsed": [r[name]["parsed"] for r in runs],
                   "energy": [r[name]["energy"] for r in runs], "comfort": [r[name]["comfort"] for r in runs]}
            for name in PLAYERS if all(name in r for r in runs)
        }  # fmt: skip
        gains = [r["finetuned"]["return"] - r["base"]["return"] for r in runs]
        closed = [
            (r["finetuned"]["return"] - r["base"]["return"]) / (r["ppo"]["return"] - r["base"]["return"]) for r in runs
        ]
        table[climate] = {"players": players, "gain": gains, "closed": closed}
        if twins:
            table[climate]["twin"] = {
                "returns": [r["finetuned"]["return"] for r in twins],
                "gain": [r["finetuned"]["return"] - r["base"]["return"] for r in twins],
                "parsed": [r["finetuned"]["parsed"] for r in twins],
            }
    return table


def told(values: list[float], sign: bool = False) -> str:
    """A mean with its interval over seeds."""
    interval = mean_interval(values)
    mark = "+" if sign else ""
    between = "" if interval.n < 2 else f" ({interval.lo:{mark}.1f} .. {interval.hi:{mark}.1f})"
    return f"{interval.mean:{mark}.1f}{between}"


def rows(table: dict[str, Any]) -> list[str]:
    """The table of docs/results.md."""
    lines = ["| climate | controller | seeds | mean return (95 % interval over seeds) | error, K | power | parsed |"]
    lines.append("|---|---|---|---|---|---|---|")
    for climate, entry in table.items():
        for name, player in entry["players"].items():
            parsed = "-" if None in player["parsed"] else f"{np.mean(player['parsed']):.1%}"
            numbers = f"{np.mean(player['comfort']):.2f} | {np.mean(player['energy']):.2f}"
            lines.append(
                f"| {climate} | {name} | {len(player['returns'])} | {told(player['returns'])} | {numbers} | {parsed} |"
            )
        if "twin" in entry:
            made = entry["twin"]
            read = f"{np.mean(made['parsed']):.1%}"
            name = f"{climate} | twin, shuffled rewards | {len(made['returns'])}"
            lines.append(f"| {name} | {told(made['returns'])} | - | - | {read} |")
    for climate, entry in table.items():
        text = f"{climate}: tuned - base {told(entry['gain'], True)}, {np.mean(entry['closed']):.0%} of the way to PPO"
        if "twin" in entry:
            text += f"; the twin {told(entry['twin']['gain'], True)}"
        lines += ["", text + "."]
    return lines


def report(climates: tuple[str, ...], seeds: int) -> None:
    """Write the figures of what is finished."""
    table = gather(climates, seeds)
    RESULTS.write_text(json.dumps(table, indent=2) + "\n")
    page = ROOT / "docs" / "results.md"
    begin, end = "<!-- hvac -->", "<!-- /hvac -->"
    text = page.read_text()
    if begin in text:
        head, _, rest = text.partition(begin)
        page.write_text(head + begin + "\n\n" + "\n".join(rows(table)) + "\n\n" + end + rest.partition(end)[2])
    print("\n".join(rows(table)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--climates", nargs="*", default=CLIMATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--twins", type=int, default=3, help="seeds of the shuffled twins")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_intermixed_args()
    climates, extra = tuple(given.climates), tuple(given.overrides)
    if not given.report:
        jobs = [(run, climate, seed) for seed in range(given.seeds) for climate in climates]
        twins = [(twin, climate, seed) for seed in range(given.twins) for climate in climates]
        for batch in (jobs, twins):
            with ThreadPoolExecutor(given.jobs) as pool:
                list(pool.map(lambda job: job[0](job[1], job[2], extra), batch))
    report(climates, max(given.seeds, given.twins))


if __name__ == "__main__":
    main()
