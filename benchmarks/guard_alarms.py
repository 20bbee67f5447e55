"""How often the guards cry wolf, and how soon they see one: synthetic runs, noisy throughout, half of them sick.

    .venv/bin/python benchmarks/guard_alarms.py [--runs 150]

A healthy run of rollouts has a rising reward and held-out return, falling entropy, growing KL and lengths; one of data
a falling loss. A sick one is healthy up to a step drawn at random, then one thing goes wrong by itself. The noise of a
metric, the shape of its curve and the number of steps (40, 120 or 400) are drawn for each run.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sapwood.guards import Watch
from sapwood.sections import GuardsSection

OPTIONS = {"optim.max_gap": 0.1, "optim.max_grad_norm": 1.0, "optim.batch_size": 16, "algorithm.updates": 4}
Metrics = dict[str, float]
Sickness = Callable[[Metrics, int], None]


def rollouts(rng: np.random.Generator, steps: int) -> Iterator[tuple[int, Metrics]]:
    """A healthy run of GRPO or PPO, evaluated every 20 steps on 64 tasks."""
    start, end, noise = rng.uniform(0.05, 0.5), rng.uniform(0.6, 0.95), rng.uniform(0.02, 0.12)
    entropy, length, growth = rng.uniform(0.3, 3), rng.uniform(5, 300), rng.uniform(-0.5, 1.2)
    for step in range(steps + 1):
        done = 1 / (1 + math.exp(-8 * (step / steps - 0.4)))
        right = start + (end - start) * done
        found: Metrics = {}
        if step:
            found = {
                "reward": right + noise * rng.normal(),
                "reward_std": math.sqrt(right * (1 - right)),
                "entropy": entropy * (1 - 0.6 * done) * math.exp(0.25 * rng.normal()),
                "no_signal_share": float(np.clip(0.1 + 0.3 * done + 0.12 * rng.normal(), 0, 1)),
                "grad_norm": math.exp(0.6 * rng.normal()),
                "gap_k3": abs(1e-4 * rng.normal()),
                "approx_kl": abs(0.01 * rng.normal()),
                "clip_fraction_low": 0.05 * rng.random(),
                "clip_fraction_high": 0.05 * rng.random(),
                "kl": 0.3 * done + 0.05 * rng.normal(),
                "reply_tokens": length * (1 + growth * done) * math.exp(0.1 * rng.normal()),
                "distinct_2": 0.5 - 0.15 * done + 0.05 * rng.normal(),
                "distinct_replies": float(np.clip(0.95 - 0.4 * done + 0.05 * rng.normal(), 0, 1)),
                "cut_share": float(np.clip(0.05 + 0.05 * rng.normal(), 0, 1)),
                "parse_failed_share": float(np.clip(0.3 * (1 - done) + 0.05 * rng.normal(), 0, 1)),
                "failed_share": 0.0,
                "updates": 4.0,
                "value_loss": math.exp(-done + 0.4 * rng.normal()),
                "explained_variance": 0.6 * done + 0.1 * rng.normal(),
            }
        if step % 20 == 0:
            value = right + 0.04 * rng.normal()
            found |= {"eval/return": value, "eval/low": value - 0.12, "eval/high": value + 0.12}
        yield step, found


def data(rng: np.random.Generator, steps: int) -> Iterator[tuple[int, Metrics]]:
    """A healthy run of DPO: the margin grows by raising the chosen reply half as often as by lowering the other."""
    start, end, noise = rng.uniform(1, 3), rng.uniform(0.3, 0.9), rng.uniform(0.03, 0.15)
    for step in range(steps + 1):
        done = 1 - math.exp(-4 * step / steps)
        loss = end + (start - end) * (1 - done)
        found: Metrics = {}
        if step:
            found = {
                "loss": loss + noise * rng.normal(),
                "grad_norm": math.exp(0.6 * rng.normal()),
                "updates": 1.0,
                "epoch": 2 * step / steps,
                "accuracy": float(np.clip(round((0.55 + 0.3 * done + 0.08 * rng.normal()) * 16) / 16, 0, 1)),
                "margin": 3 * done + 0.3 * rng.normal(),
                "reward_chosen": -0.6 * done + 0.2 * rng.normal(),
                "logprob_chosen": -20 - 2 * done + 3 * rng.normal(),
            }
        if step % 20 == 0:
            found["eval/loss"] = loss + 0.05 * done + 0.01 * rng.normal()
        yield step, found


def grows(name: str, per_step: float) -> Sickness:
    """A metric that is multiplied by `per_step` at every step."""

    def spoil(metrics: Metrics, since: int) -> None:
        if name in metrics:
            metrics[name] *= per_step**since

    return spoil


def hacked(metrics: Metrics, since: int) -> None:
    """The training reward goes on to rise, the held-out return falls by a tenth every 20 steps."""
    if "reward" in metrics:
        metrics["reward"] += 0.005 * since
    for name in ("eval/return", "eval/low", "eval/high"):
        if name in metrics:
            metrics[name] -= 0.1 * since / 20


def collapsed(metrics: Metrics, since: int) -> None:
    """Entropy halves every 8 steps, and attempts become alike."""
    if "entropy" in metrics:
        metrics["entropy"] *= 0.5 ** (since / 8)
        metrics["no_signal_share"] = min(metrics["no_signal_share"] + 0.03 * since, 1.0)


def overfitted(metrics: Metrics, since: int) -> None:
    """The held-out loss rises by 15 % of its size every 20 steps."""
    if "eval/loss" in metrics:
        metrics["eval/loss"] *= 1 + 0.15 * since / 20


def displaced(metrics: Metrics, since: int) -> None:
    """From here on the chosen replies lose as much as the margin grows."""
    if "margin" in metrics:
        metrics["reward_chosen"] -= 0.05 * since
        metrics["margin"] += 0.05 * since


#: What goes wrong: the warning that it should raise, the kind of run, and how.
SICK: dict[str, tuple[str, Callable, str, Sickness]] = {
    "entropy and groups collapse": ("entropy_collapse", rollouts, "rollouts", collapsed),
    "KL doubles every 5 steps": ("kl_runaway", rollouts, "rollouts", grows("kl", 2**0.2)),
    "held-out return falls": ("reward_hacking", rollouts, "rollouts", hacked),
    "reward decays by 5 % a step": ("reward_collapse", rollouts, "rollouts", grows("reward", 0.95)),
    "value loss grows by 5 % a step": ("value_divergence", rollouts, "rollouts", grows("value_loss", 1.05)),
    "held-out loss rises": ("overfitting", data, "pairs", overfitted),
    "chosen replies fall too": ("chosen_falls", data, "pairs", displaced),
    "loss grows by 5 % a step": ("loss_divergence", data, "pairs", grows("loss", 1.05)),
}


def alarms(history: Iterator[tuple[int, Metrics]], kind: str) -> list[tuple[int, str]]:
    """(step, name) of every warning of a run."""
    watch = Watch(GuardsSection(), kind, OPTIONS)
    return [(alarm.step, alarm.name) for step, metrics in history for alarm in watch.see(step, metrics)]


def healthy(runs: int) -> dict[str, object]:
    """Warnings of runs in which nothing is wrong."""
    found: collections.Counter[str] = collections.Counter()
    total = 0
    for seed in range(runs):
        for make, kind in ((rollouts, "rollouts"), (data, "pairs"), (data, "demonstrations")):
            rng = np.random.default_rng(seed)
            steps = int(rng.choice([40, 120, 400]))
            total += steps
            found.update(name for _, name in alarms(make(rng, steps), kind))
    return {"runs": 3 * runs, "steps": total, "warnings": dict(found)}


def sick(runs: int) -> list[dict[str, object]]:
    """Of each sickness: the share of runs in which it is named, after how many steps, and what else is said."""
    rows = []
    for what, (name, make, kind, spoil) in SICK.items():
        delays, others = [], collections.Counter()
        for seed in range(runs):
            rng = np.random.default_rng(10_000 + seed)
            steps = 240
            onset = int(rng.integers(60, 120))

            def spoilt(rng=rng, steps=steps, onset=onset, make=make, spoil=spoil) -> Iterator[tuple[int, Metrics]]:
                for step, metrics in make(rng, steps):
                    if step >= onset:
                        spoil(metrics, step - onset)
                    yield step, metrics

            told = alarms(spoilt(), kind)
            others.update({found for step, found in told if found != name})
            first = next((step for step, found in told if found == name), None)
            if first is not None:
                delays.append(first - onset)
        median = float(np.median(delays)) if delays else None
        rows.append({"what": what, "warning": name, "named": len(delays) / runs, "delay": median, "also": dict(others)})
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=150)
    runs = parser.parse_args().runs
    well, ill = healthy(runs), sick(runs)
    print(f"healthy: {well['runs']} runs, {well['steps']:,} steps, warnings {well['warnings'] or 'none'}\n")
    print(f"{'what goes wrong':<32}{'warning':<20}{'named':>7}{'after':>12}  also")
    for row in ill:
        after = "-" if row["delay"] is None else f"{row['delay']:.0f} steps"
        print(f"{row['what']:<32}{row['warning']:<20}{row['named']:>7.0%}{after:>12}  {row['also'] or ''}")
    path = Path(__file__).with_name("results") / "guard_alarms.json"
    path.write_text(json.dumps({"healthy": well, "sick": ill}, indent=2) + "\n")


if __name__ == "__main__":
    main()
