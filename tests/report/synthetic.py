"""Run folders made up from a seed, as training with each algorithm leaves them: enough to try the report on."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

START = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
SAYINGS = (
    "The zone is {warm} than people like, and outside it is {warm} still.",
    "Nobody is in before eight, so there is time.",
    "Power costs more from noon on; less of it is better as long as the zone stays in its bounds.",
    "The last action was too {strong}: the temperature went past the target.",
    "Half of the people leave at five, and their heat with them.",
    "The walls keep the heat of the day for some hours.",
    "A smaller change than the last one should hold it near 24 C.",
    "The sun comes in from the west at this hour.",
)


@dataclass(frozen=True)
class Shape:
    """How large a made-up run is. text: put in the place of every text that a stranger may have written."""

    algorithm: str = "grpo"
    steps: int = 60
    done: int | None = None
    tasks: int = 4
    attempts: int = 4
    tokens: int = 40
    samples_every: int = 10
    eval_every: int = 20
    eval_tasks: int = 24
    turns: int = 1
    seed: int = 0
    text: str | None = None
    state: str = "finish"


def make_run(folder: Path, shape: Shape | None = None, **options: Any) -> Path:
    """Write a run folder; returns it."""
    shape = shape or Shape(**options)
    rng = random.Random(f"{shape.algorithm} {shape.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    last = shape.steps if shape.done is None else shape.done
    (folder / "recipe.yaml").write_text(yaml.safe_dump(_recipe(folder, shape), sort_keys=False, allow_unicode=True))
    _json(folder / "environment.json", _environment(shape))
    _lines(folder / "metrics.jsonl", [_metrics(step, shape, rng) for step in range(last + 1)])
    _lines(folder / "timing.jsonl", [_timing(step, rng) for step in range(1, last + 1)])
    _lines(folder / "warnings.jsonl", _warnings(last, shape))
    _lines(folder / "events.jsonl", _events(last, shape))
    if last == shape.steps:
        _json(folder / "evaluation.json", _evaluation(shape, rng))
    (folder / "samples").mkdir(exist_ok=True)
    for step in range(shape.samples_every, last + 1, shape.samples_every) if shape.samples_every else ():
        write_samples(folder / "samples" / f"step_{step:06d}.jsonl.gz", _groups(step, shape, rng, "train"))
    if shape.algorithm in ("grpo", "ppo"):
        for step in (0, *range(shape.eval_every, last + 1, shape.eval_every)) if shape.eval_every else ():
            write_samples(folder / "samples" / f"eval_{step:06d}.jsonl.gz", _groups(step, shape, rng, "eval"))
    for step in range(20, last + 1, 20):
        (folder / "checkpoints" / f"step_{step:06d}" / "policy").mkdir(parents=True, exist_ok=True)
    return folder


def write_samples(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Records as a file of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        file.write(text.encode("utf-8"))
    return path


def record(
    task: str, reply: str, tokens: Sequence[str], reward: float = 0.5, *, rng: random.Random | None = None, **given: Any
) -> dict[str, Any]:
    """A trajectory of one turn. given: fields that replace its own, those of the turn with the prefix `turn_`."""
    rng = rng or random.Random(0)
    sampled = [round(-rng.expovariate(1.6), 6) for _ in tokens]
    turn: dict[str, Any] = {
        "prompt": f"<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n",
        "reply": reply,
        "prompt_ids": [1, 2, 3],
        "token_ids": [rng.randrange(49152) for _ in tokens],
        "tokens": list(tokens),
        "sampled_logprobs": sampled,
        "logprobs": [round(x + rng.gauss(0, 0.05), 6) for x in sampled],
        "ratios": [round(math.exp(rng.gauss(0, 0.08)), 6) for _ in tokens],
        "advantages": [round(2 * reward - 1 + rng.gauss(0, 0.15), 6) for _ in tokens],
        "stop_reason": "eos",
        "reward": reward,
        "restart": False,
        "info": {"parsed": "json", "fallback": False, "energy_kwh": round(rng.random(), 3)},
    }
    turn |= {key.removeprefix("turn_"): value for key, value in given.items() if key.startswith("turn_")}
    whole = {
        "step": 0,
        "task": task,
        "messages": [],
        "answer": None,
        "group": 0,
        "member": 0,
        "reward": reward,
        "reward_parts": {"env": reward, "format": 1.0},
        "terminated": True,
        "truncated": False,
        "error": None,
        "turns": [turn],
    }
    return whole | {key: value for key, value in given.items() if not key.startswith("turn_")}


def _recipe(folder: Path, shape: Shape) -> dict[str, Any]:
    told = shape.text
    env = {"name": "hvac", "building": told or "OfficeSmall", "climate": "Hot_Dry", "horizon": 8}
    data = {"sources": [{"path": told or "pairs.jsonl", "weight": None}], "eval_fraction": 0.1, "max_length": 512}
    plays = shape.algorithm in ("grpo", "ppo")
    options = {"grpo": {"group_size": shape.attempts, "clip_high": 0.28}, "ppo": {"gamma": 0.99}, "dpo": {"beta": 0.1}}
    return {
        "run": {"dir": str(folder), "steps": shape.steps, "epochs": None, "seed": shape.seed},
        "model": {
            "name": told or "smollm2-135m",
            "init_from": None,
            "dtype": "auto",
            "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"},
            "quantize": "none",
        },
        "env": env if plays else None,
        "data": None if plays else data,
        "rewards": [{"name": "env", "weight": 1.0}, {"name": "format", "weight": 0.1}] if plays else None,
        "algorithm": {"name": shape.algorithm, **options.get(shape.algorithm, {}), **({told: told} if told else {})},
        "engine": {"name": "local", "temperature": 1.0, "max_new_tokens": 48} if plays else None,
        "optim": {"name": "adamw", "learning_rate": 3e-4 / (shape.seed + 1), "schedule": "cosine", "warmup_steps": 5},
        "eval": {"every": shape.eval_every, "tasks": shape.eval_tasks, "temperature": 0.0},
        "trackers": [],
    }


def _environment(shape: Shape) -> dict[str, Any]:
    return {
        "command": ["train", shape.text or "recipes/office.yaml", f"run.seed={shape.seed}"],
        "cores": 2,
        "cpu": shape.text or "AMD EPYC",
        "git": {"commit": "1e9f2c3d4b5a69788796a5b4c3d2e1f001020304", "modified": False},
        "memory_bytes": 25276502016,
        "packages": {"torch": "2.13.0+cpu", "transformers": "5.19.0", **({shape.text: "1"} if shape.text else {})},
        "platform": "Linux",
        "python": "3.11.7",
        "sapwood": "0.1.0",
        "seed": shape.seed,
    }


def _metrics(step: int, shape: Shape, rng: random.Random) -> dict[str, Any]:
    """A record of metrics.jsonl; learning is a saturating curve with noise."""
    gain = _gain(step, shape)
    found: dict[str, Any] = {"step": step}
    if step % shape.eval_every == 0 or step == shape.steps:
        found |= _held_out_metrics(shape, gain, rng)
    if step == 0:
        return found
    noise = rng.gauss
    warm = min(1.0, step / 5) * 0.5 * (1 + math.cos(math.pi * step / shape.steps))
    found |= {
        "loss": 0.9 * math.exp(-1.5 * gain) + noise(0, 0.04),
        "grad_norm": 1.4 * math.exp(noise(0, 0.3)),
        "learning_rate": 3e-4 / (shape.seed + 1) * warm,
        "reply_tokens": shape.tokens * (1 + 0.25 * gain) + noise(0, 2),
        "updates": 1,
    }
    if shape.text:
        found |= {shape.text: gain, f"eval/{shape.text}": gain, f"reward/{shape.text}": gain}
    if shape.algorithm == "sft":
        nll = 2.1 - 1.3 * gain + noise(0, 0.03)
        return found | {"nll": nll, "perplexity": math.exp(nll), "entropy": 1.4 - 0.5 * gain, "epoch": step / 20}
    if shape.algorithm == "dpo":
        margin = 1.8 * gain + noise(0, 0.1)
        return found | {
            "accuracy": 0.5 + 0.4 * gain + noise(0, 0.03),
            "margin": margin,
            "reward_chosen": 0.3 * gain,
            "reward_rejected": 0.3 * gain - margin,
            "epoch": step / 30,
        }
    reward = -1.0 + 1.4 * gain + noise(0, 0.12)
    found |= {
        "reward": reward,
        "reward/env": reward - 0.1,
        "reward/format": 0.6 + 0.4 * gain,
        "reward_std": 0.4 + noise(0, 0.03),
        "policy_loss": noise(0, 0.02),
        "entropy": 1.1 - 0.55 * gain + noise(0, 0.04),
        "kl": 0.02 * gain + abs(noise(0, 0.002)),
        "approx_kl": abs(noise(0, 0.001)),
        "ratio": 1 + noise(0, 0.004),
        "clip_fraction_high": abs(noise(0, 0.01)),
        "gap_k3": abs(noise(0, 1e-6)),
        "truncated_share": max(0.0, noise(0.04, 0.02)),
    }
    if shape.algorithm == "ppo":
        found |= {"value_loss": 0.8 * math.exp(-2 * gain) + abs(noise(0, 0.03)), "explained_variance": 0.8 * gain}
    return found


def _gain(step: int, shape: Shape) -> float:
    """How much has been learnt, 0 to nearly 1; the larger the seed, the slower."""
    return 1 - math.exp(-2.4 * step / shape.steps / (1 + 0.7 * shape.seed))


def _held_out_metrics(shape: Shape, gain: float, rng: random.Random) -> dict[str, Any]:
    if shape.algorithm == "sft":
        return {
            "eval/loss": 2.2 - 1.2 * gain,
            "eval/nll": 2.2 - 1.2 * gain,
            "eval/perplexity": math.exp(2.2 - 1.2 * gain),
        }
    if shape.algorithm == "dpo":
        return {"eval/loss": 0.69 - 0.3 * gain, "eval/accuracy": 0.5 + 0.35 * gain, "eval/margin": 1.4 * gain}
    mean = -52 + 34 * gain + rng.gauss(0, 1.2)
    return {"eval/return": mean, "eval/low": mean - 9, "eval/high": mean + 9, "eval/parsed": 0.88 + 0.12 * gain}


def _timing(step: int, rng: random.Random) -> dict[str, Any]:
    sampling, learning = 4.5 + rng.random(), 3.0 + rng.random()
    return {
        "step": step,
        "sampling_seconds": sampling,
        "learning_seconds": learning,
        "loading_seconds": 0.17,
        "tokens_per_second": 640 / sampling,
        "trained_tokens_per_second": 640 / learning,
        "sampled_tokens": 640,
    }


def _warnings(last: int, shape: Shape) -> list[dict[str, Any]]:
    steps = [step for step in (18, 19, 20, 41) if step <= last]
    told = shape.text
    return [
        {
            "step": step,
            "name": told or ("entropy_collapse" if step < 40 else "kl_runaway"),
            "message": told
            or f"entropy fell to {0.4 - step / 1000:.3f} nats a token, below a third of what it began with",
            "remedies": [
                told or "raise algorithm.entropy_coef",
                "lower optim.learning_rate",
                "raise engine.temperature",
            ],
            "metrics": {told or ("entropy" if step < 40 else "kl"): 0.4 - step / 1000},
        }
        for step in steps
    ]


def _events(last: int, shape: Shape) -> list[dict[str, Any]]:
    def event(step: int, kind: str, message: str) -> dict[str, Any]:
        time = (START + timedelta(seconds=8 * step)).isoformat()
        return {"time": time, "step": step, "kind": kind, "message": shape.text or message}

    if shape.text:
        return [{"time": shape.text, "step": 1, "kind": shape.text, "message": shape.text}, event(last, "finish", "")]

    found = [event(0, "start", f"{shape.steps} steps")]
    found += [event(step, "checkpoint", f"checkpoints/step_{step:06d}") for step in range(20, last + 1, 20)]
    if last > 30:
        found.append(event(30, "memory", "out of memory: the token budget is halved to 4,096 and the step repeated"))
    if shape.state in ("finish", "stop"):
        found.append(event(last, shape.state, "all steps are done" if shape.state == "finish" else "stopped by Ctrl-C"))
    return found


def _evaluation(shape: Shape, rng: random.Random) -> dict[str, Any]:
    told = shape.text
    base, trained = told or "base model", f"{told} trained" if told else "trained model"
    if shape.algorithm in ("sft", "dpo"):
        names = ("loss", "nll", "perplexity") if shape.algorithm == "sft" else ("loss", "accuracy", "margin")
        values = {name: rng.random() for name in (*names, *([told] if told else []))}
        differences = [
            {"metric": name, "of": [trained, base], "mean": -0.2, "lo": -0.3, "hi": -0.1, "tasks": 158}
            for name in names
        ]
        return {
            "held_out": {
                "heading": told or "pairs held out: 158 records",
                "metrics": {base: values, trained: {name: value * 0.7 for name, value in values.items()}},
                "differences": differences,
            }
        }
    tasks = [f"{told or 'office'}-{i}" for i in range(shape.eval_tasks)]
    means = {"random": -71.8, "zero": -56.8, "proportional": -16.9, base: -52.5, trained: -21.8}
    returns = {name: {task: rng.gauss(mean, 16) for task in tasks} for name, mean in means.items()}
    results = [
        {
            "name": name,
            "mean": mean,
            "lo": mean - 8,
            "hi": mean + 8,
            "tasks": shape.eval_tasks,
            "failed": 0,
            "turns": 8 * shape.eval_tasks,
            "parsed": None if name in ("random", "zero", "proportional") else 0.89 if name == base else 1.0,
            "fallback": None if name in ("random", "zero", "proportional") else 0.11 if name == base else 0.0,
            "reply_tokens": None if name in ("random", "zero", "proportional") else 8.7,
            "metrics": {"reward/env": mean, **({told: 1.0} if told else {})},
            "returns": returns[name],
        }
        for name, mean in means.items()
    ]
    difference = {"of": [trained, base], "mean": 30.7, "lo": 19.2, "hi": 42.2, "tasks": shape.eval_tasks}
    heading = told or f"HVAC OfficeSmall, Hot_Dry, days never trained on: {shape.eval_tasks} held-out tasks, greedy"
    return {"heading": heading, "results": results, "difference": difference, "differences": [difference]}


def _groups(step: int, shape: Shape, rng: random.Random, split: str) -> list[dict[str, Any]]:
    held_out = split == "eval"
    tasks = shape.eval_tasks if held_out else shape.tasks
    members = 1 if held_out else {"sft": 1, "dpo": 2}.get(shape.algorithm, shape.attempts)
    gain = _gain(step, shape)
    found = []
    for group in range(tasks):
        hour = random.Random(f"{split} {group if held_out else (step, group)}").randrange(24)
        name = f"{shape.text or 'office'}-{split}-{group if held_out else step * 100 + group}"
        for member in range(members):
            found.append(_trajectory(step, shape, rng, name, hour, group, member, gain))
    for turn in [turn for one in found for turn in one["turns"] if held_out]:
        turn |= {"advantages": None, "ratios": None, "logprobs": None}  # nothing is learnt from them
    return found


def _trajectory(
    step: int, shape: Shape, rng: random.Random, name: str, hour: int, group: int, member: int, gain: float
) -> dict[str, Any]:
    told = shape.text
    data = shape.algorithm in ("sft", "dpo")
    reward = round(-1.2 + 1.5 * gain + rng.gauss(0, 0.35), 4) if not data else float(member == 0)
    fails = rng.random() < 0.12 * (1 - gain)
    made = record(
        name,
        "",
        [],
        reward,
        rng=rng,
        step=step,
        group=group,
        member=member,
        messages=[
            {"role": told or "system", "content": told or "You run the heating and cooling of a small office."},
            {"role": "user", "content": told or f"It is {hour}:00. The zone is at 27.4 C, outside 34.1 C. What power?"},
        ],
        answer=told if told else None,
        reward_parts={"env": reward - 0.1, "format": 0.0 if fails else 1.0, **({told: 1.0} if told else {})},
        truncated=rng.random() < 0.04,
        error=told or ("the simulator did not answer within 60 s" if rng.random() < 0.01 else None),
    )
    made["turns"] = [
        _made_turn(shape, rng, hour + i, reward, fails, data, told, first=i == 0) for i in range(shape.turns)
    ]
    return made


def _made_turn(
    shape: Shape, rng: random.Random, hour: int, reward: float, fails: bool, data: bool, told: str | None, first: bool
) -> dict[str, Any]:
    tokens: list[str] = []
    while len(tokens) < shape.tokens - 10:
        warm, strong = rng.choice(("warmer", "cooler")), rng.choice(("strong", "weak"))
        said = rng.choice(SAYINGS).format(warm=warm, strong=strong)
        tokens += re.findall(r" ?\w+|[^\w ]", f" {said}" if tokens else said)
    tokens += ["\n", '{"', "power", '":', f" {rng.randrange(-90, 90)}", "}"]
    if told:
        tokens = [told[i : i + 3] for i in range(0, len(told), 3)]
    turn = record("", "".join(tokens), [*tokens, "<|im_end|>"], reward, rng=rng)["turns"][0]
    turn["prompt"] = told or (
        f"<|im_start|>system\nYou run the heating and cooling of a small office.<|im_end|>\n<|im_start|>user\nIt is "
        f"{hour % 24}:00. The zone is at 27.4 C, outside 34.1 C. What power?<|im_end|>\n<|im_start|>assistant\n"
    )
    if not first:
        turn["prompt"] = (
            told or f"<|im_start|>user\nIt is {hour % 24}:00. The zone is at 25.1 C.<|im_end|>\n<|im_start|>assistant\n"
        )
    if shape.algorithm == "ppo":  # credit a token, of which the last ones decide
        n = len(turn["tokens"])
        turn["advantages"] = [round((i / n) ** 3 * reward + rng.gauss(0, 0.25), 6) for i in range(n)]
    turn["stop_reason"] = told or ("length" if rng.random() < 0.05 else "eos")
    if data:
        turn |= {"sampled_logprobs": [], "info": {}}
    else:
        turn["info"] = {"parsed": "failed" if fails else "json", "fallback": fails, **({told: told} if told else {})}
    return turn


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item, sort_keys=True) + "\n" for item in records), encoding="utf-8")
