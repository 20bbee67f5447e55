"""Sapwood's side of every benchmark, as a worker: spec["task"] picks what one measurement does.

step: sampling, credit, forward, backward and optimiser step of GRPO. sample: sampling alone. tree: forward and
backward over given rows. peak: the same, beside the matrix-product peak of this process. train: a step of the loop, as
a recipe describes it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _worker import Measure, serve

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.grpo import GRPO
from sapwood.engines import Completion, Request, Sampling
from sapwood.models.forward import forward_rows
from sapwood.models.load import Policy, load_policy
from sapwood.sections import LoraSection, ModelSection
from sapwood.types import Group, Row, Task, Trajectory, Turn

Spec = dict[str, Any]


def policy_of(spec: Spec) -> Policy:
    """The model with fresh adapters on every linear layer."""
    lora = LoraSection(rank=spec["rank"], alpha=2.0 * spec["rank"])
    return load_policy(ModelSection(name=spec["model"], dtype=spec["dtype"], lora=lora))


def sampler(policy: Policy) -> Any:
    """The local engine, holding this policy."""
    from sapwood.engines.local import LocalEngine

    return LocalEngine(policy, policy.tokenizer)


def requests(spec: Spec, seed: int) -> list[Request]:
    """group requests for every prompt; each sample is an episode of its own, prompts are shared by the engine."""
    work = spec["workload"]
    group, new = work["shape"]["group"], work["shape"]["new_tokens"]
    sampling = Sampling(temperature=1.0, max_new_tokens=new, ignore_eos=True)
    prompts = [np.asarray(prompt, dtype=np.int64) for prompt in work["prompt_ids"]]
    return [
        Request(id=i, token_ids=prompts[i // group], sampling=sampling, seed=1_000 * seed + i, episode=f"{seed}/{i}")
        for i in range(len(prompts) * group)
    ]


def checked(completions: Sequence[Completion], new_tokens: int) -> None:
    """Raises RuntimeError unless every reply has the asked length."""
    lengths = {len(completion.token_ids) for completion in completions}
    if lengths != {new_tokens}:
        raise RuntimeError(f"replies of {sorted(lengths)} tokens, asked for {new_tokens}")


def groups_of(asked: Sequence[Request], completions: Sequence[Completion], group: int) -> tuple[list[Group], list[Row]]:
    """Groups with a reward that differs between samples, and their rows."""
    groups: list[Group] = []
    rows: list[Row] = []
    for i, (request, completion) in enumerate(zip(asked, completions, strict=True)):
        reward = float(int(completion.token_ids.sum()) % 11)
        turn = Turn(
            prompt_ids=request.token_ids,
            token_ids=completion.token_ids,
            sampled_logprobs=completion.logprobs,
            kept_logmass=completion.kept_logmass,
            stop_reason=completion.stop_reason,
            text="",
            reward=reward,
        )
        if i % group == 0:
            groups.append(Group(Task(id=str(i // group)), []))
        task = groups[-1].task
        groups[-1].trajectories.append(Trajectory(task, [turn], terminated=True, reward=reward))
        row = plain_row(request.token_ids, completion.token_ids, i // group, i % group)
        row.sampled_logprobs, row.kept_logmass, row.reward = completion.logprobs, completion.kept_logmass, reward
        rows.append(row)
    return groups, rows


def plain_row(prompt: np.ndarray, reply: np.ndarray, group: int, member: int) -> Row:
    """A row whose reply is scored."""
    mask = np.r_[np.zeros(len(prompt), bool), np.ones(len(reply), bool)]
    turn = np.zeros(len(reply), np.int32)
    return Row(np.concatenate([prompt, reply]), mask, turn, group=group, member=member)


def workload_rows(spec: Spec, size: int) -> list[Row]:
    """The workload's prompts with `size` of their given replies each."""
    work = spec["workload"]
    group = work["shape"]["group"]
    return [
        plain_row(np.asarray(prompt), np.asarray(work["reply_ids"][p * group + g]), p, g)
        for p, prompt in enumerate(work["prompt_ids"])
        for g in range(size)
    ]


def step_task(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """One GRPO step, beta 0, one update of all rows, AdamW."""
    policy = policy_of(spec)
    engine = sampler(policy)
    group, new = spec["workload"]["shape"]["group"], spec["workload"]["shape"]["new_tokens"]
    algorithm = GRPO(group_size=group)
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=spec["learning_rate"], weight_decay=0.0)
    steps = 0

    def measure(arguments: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        start = time.perf_counter()
        asked = requests(spec, steps)
        completions = engine.generate(asked)
        checked(completions, new)
        sampled = time.perf_counter()
        groups, rows = groups_of(asked, completions, group)
        rows, _ = algorithm.credit(groups, rows)
        policy.model.train()
        logprobs, entropies = forward_rows(policy.model, rows, entropy=False)
        output = algorithm.loss(Forward(logprobs, entropies), RowBatch.of(rows), Totals.of(rows))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        policy.model.eval()
        engine.load(policy)
        end = time.perf_counter()
        return {"seconds": end - start, "sampling_seconds": sampled - start, "tokens": len(asked) * new}

    return measure, {"torch_threads": torch.get_num_threads()}


def sample_task(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Sampling right after a weight update: nothing is cached, and taking the weights counts."""
    policy = policy_of(spec)
    engine = sampler(policy)
    new = spec["workload"]["shape"]["new_tokens"]
    calls = 0

    def measure(arguments: dict[str, Any]) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        asked = requests(spec, calls)
        start = time.perf_counter()
        engine.load(policy)
        completions = engine.generate(asked)
        seconds = time.perf_counter() - start
        checked(completions, new)
        return {"seconds": seconds, "tokens": len(asked) * new}

    return measure, {"torch_threads": torch.get_num_threads()}


def tree_task(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Forward and backward over the workload's rows, the mean negative log-likelihood as loss."""
    from sapwood.tree import TokenTree

    policy = policy_of(spec)
    policy.model.train()
    peaks: list[float] = []

    def measure(arguments: dict[str, Any]) -> dict[str, Any]:
        rows = workload_rows(spec, arguments["group"])
        for parameter in policy.parameters():
            parameter.grad = None
        tree = TokenTree.of(rows)
        if spec["task"] == "peak":
            peaks.append(matmul_peak(getattr(torch, spec["dtype"]), len(tree)))
        start = time.perf_counter()
        logprobs, _ = forward_rows(policy.model, rows, entropy=False)
        (-logprobs.mean()).backward()
        result = {"seconds": time.perf_counter() - start, "nodes": len(tree)}
        if spec["task"] == "peak":
            peaks.append(matmul_peak(getattr(torch, spec["dtype"]), len(tree)))
            result["peak_flops"] = max(peaks)
        return result

    def facts() -> dict[str, Any]:
        tree = TokenTree.of(workload_rows(spec, spec["workload"]["shape"]["group"]))
        return {
            "depths": tree.trie.positions.tolist(),
            "head_nodes": len(tree.score_node),
            "torch_threads": torch.get_num_threads(),
        }

    return measure, facts()


def matmul_peak(dtype: torch.dtype, nodes: int, seconds: float = 0.4) -> float:
    """The most FLOP/s that torch.mm reaches over square matrices and the shapes of this model's layers."""
    best = 0.0
    for n, k, m in [(s, s, s) for s in (1024, 2048)] + [(nodes, 576, 1536), (nodes, 1536, 576), (1024, 576, 49152)]:
        a, b = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype).t()
        out = torch.mm(a, b)
        deadline = time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            end = time.perf_counter()
            best = max(best, 2 * n * k * m / (end - start))
            if end > deadline:
                break
    return best


def train_task(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """A step of the loop: see _loop.py."""
    from _loop import train_task as task

    return task(spec)


TASKS = {"step": step_task, "sample": sample_task, "tree": tree_task, "peak": tree_task, "train": train_task}


def set_up(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    torch.set_num_threads(spec["threads"])
    return TASKS[spec["task"]](spec)


if __name__ == "__main__":
    serve(set_up)
