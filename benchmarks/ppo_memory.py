"""Peak memory of a PPO update: policy, critic, reference and reward model on one base, or each a model of its own.

    .venv/bin/python benchmarks/ppo_memory.py [--bf16] [--tiny]

Each side is a process of its own that loads its models, scores a batch with all four, and makes one AdamW step; its
figure is its peak resident memory. "separate" are four models with LoRA where they learn; "separate, full" trains all
weights of policy and critic. All use the token tree and the same rows, so only the sharing differs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import BenchmarkError, Options, Row, machine, model_folder, publish, time_ratio

#: (prompts, samples of each, shared tokens of a prompt, new tokens).
STEP = (4, 4, 200, 64)
TINY = (2, 2, 8, 4)
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def side(spec: dict[str, Any]) -> dict[str, float]:
    """One side, in this process: peak memory in MiB and the bytes of parameters that it holds."""
    import torch

    from sapwood.ops.batch import Needs, RowBatch
    from sapwood.tree import pack

    torch.set_num_threads(spec["threads"])
    needs = Needs(old_logprobs=True, reference_logprobs=True, values=True)
    models, scorer = _roles(spec, needs)
    rows = _rows(spec)
    batches = pack(rows, 2048)
    models.score(batches, needs)
    scorer.score(rows)
    groups = models.parameter_groups()
    optimizer = torch.optim.AdamW([p for group in groups.values() for p in group], lr=1e-5)
    models.train()
    for batch in batches:
        forward, told = models.forward(batch, needs), RowBatch.of(batch)
        assert forward.values is not None
        assert told.old_logprobs is not None
        ratio = (forward.logprobs - told.old_logprobs).exp()
        (-(ratio * 0.1).sum() + (forward.values - 1).pow(2).sum()).backward()
    optimizer.step()
    kept = {
        p.data_ptr(): p.numel() * p.element_size()
        for model in (models.policy, models.critic and models.critic.policy, models.reference, scorer.policy)
        if model is not None
        for p in model.model.parameters()
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak / 1024, "parameters": sum(kept.values()) / 2**20}


def _roles(spec: dict[str, Any], needs: Any) -> tuple[Any, Any]:
    from sapwood.models.load import load_policy
    from sapwood.models.roles import Models, build_critic
    from sapwood.models.scorer import load_scorer
    from sapwood.sections import CriticSection, LoraSection, ModelSection

    lora = None if spec["side"] == "full" else LoraSection(rank=16)
    section = ModelSection(name=spec["model"], dtype=spec["dtype"], lora=lora)
    policy = load_policy(section)
    if spec["side"] == "shared":
        critic = build_critic(policy, CriticSection(kind="adapter"), section)
        return Models(policy, needs, critic=critic), load_scorer(spec["reward"], policy)
    critic = build_critic(policy, CriticSection(kind="model"), section)
    reference = load_policy(section.model_copy(update={"lora": None}))
    reference.model.requires_grad_(False)
    return Models(policy, needs, reference, critic), load_scorer(spec["reward"], dtype=spec["dtype"])


def _rows(spec: dict[str, Any]) -> list[Any]:
    import numpy as np

    from sapwood.types import Row

    prompts, samples, shared, new = spec["shape"]
    rng, rows = np.random.default_rng(0), []
    for g in range(prompts):
        prompt = rng.integers(100, spec["vocabulary"], shared)
        for m in range(samples):
            ids = np.concatenate([prompt, rng.integers(100, spec["vocabulary"], new)])
            mask = np.arange(len(ids)) >= shared
            rows.append(Row(ids, mask, np.zeros(new, np.int32), group=g, member=m))
    return rows


def make_reward_model(model: str, folder: Path, dtype: str) -> int:
    """Save a reward model's adapter on this base; returns the vocabulary's size."""
    from sapwood import checkpoint
    from sapwood.models.load import load_policy
    from sapwood.sections import LoraSection, ModelSection

    policy = load_policy(ModelSection(name=model, dtype=dtype, lora=LoraSection(rank=16)), head="scalar")
    checkpoint.save(policy, folder, 1, 1)
    return int(policy.model.config.vocab_size)


def measure(dtype: str, options: Options) -> list[Row]:
    """The rows of one dtype: one base against four with adapters, and against four of which two are fully trained."""
    facts = machine(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        spec = {"dtype": dtype, "threads": options.threads, "shape": TINY if options.tiny else STEP}
        spec |= {"model": model_folder(), "reward": scratch}
        spec["vocabulary"] = _child(spec | {"side": "reward"})["vocabulary"]
        found = {name: _child(spec | {"side": name}) for name in ("shared", "separate", "full")}
    prompts, samples, shared, new = spec["shape"]
    ours = found["shared"]
    return [
        Row(
            name=f"ppo_memory_{name}_{_SHORT[dtype]}",
            ours=ours["peak"],
            peer=found[side_name]["peak"],
            ratio=time_ratio(ours["peak"], found[side_name]["peak"]),
            unit="MiB peak RSS",
            shape=f"{prompts} prompts x {samples}, {shared} + {new} tokens",
            dtype=dtype,
            machine=facts,
            peer_name=peer,
            note=f"parameters: {ours['parameters']:.0f} MiB against {found[side_name]['parameters']:.0f} MiB",
        )
        for name, side_name, peer in (
            ("adapters", "separate", "four models, LoRA on policy and critic"),
            ("full", "full", "four models, policy and critic fully trained"),
        )
    ]


def _child(spec: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--side", json.dumps(spec)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise BenchmarkError(f"{spec['side']}: {done.stderr.strip().splitlines()[-1][:400]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(options: Options) -> None:
    """Measure, print and write."""
    for dtype in options.dtypes:
        publish("ppo_memory", measure(dtype, options), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--side", help="what the benchmark passes to its own processes")
    arguments = parser.parse_args()
    if arguments.side is None:
        run(Options.of(arguments))
        return
    spec = json.loads(arguments.side)
    if spec["side"] == "reward":
        vocabulary = make_reward_model(spec["model"], Path(spec["reward"]), spec["dtype"])
        print(json.dumps({"vocabulary": vocabulary}))
    else:
        print(json.dumps(side(spec)))


if __name__ == "__main__":
    main()
