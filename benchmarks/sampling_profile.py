"""Where the time of sampling goes: the local engine at the shape of one GRPO step, next to transformers' generate.

python benchmarks/sampling_profile.py [--model PATH_OR_NAME] [--threads 2] [--dtype float32] [--peer] [--ops]

Shape: 4 prompts x 8 samples, 453 shared and 40 own prompt tokens, 32 new tokens. The first run warms up; the best and
the median of the others are printed. --peer also measures generate with the prompt repeated for every sample; --ops
prints the operators of a decode step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from sapwood.engines import Request, Sampling
from sapwood.engines.local import EngineStats, LocalEngine, LocalOptions
from sapwood.models.load import load_model

PROMPTS, SAMPLES, SHARED, OWN, NEW = 4, 8, 453, 40, 32


def requests(vocab: int) -> list[Request]:
    rng = np.random.default_rng([0])
    shared = rng.integers(100, vocab, SHARED)
    prompts = [np.concatenate([shared, rng.integers(100, vocab, OWN)]) for _ in range(PROMPTS)]
    options = Sampling(max_new_tokens=NEW, ignore_eos=True)
    return [Request(i, prompts[i // SAMPLES], options, i, f"e{i}") for i in range(PROMPTS * SAMPLES)]


def ours(model: Any, rounds: int) -> None:
    engine = LocalEngine(model, options=LocalOptions())
    batch = requests(model.config.vocab_size)
    rows = []
    for _ in range(rounds + 1):
        engine.load(model)
        engine.stats = EngineStats()
        start = time.perf_counter()
        engine.generate(batch)
        seconds = time.perf_counter() - start
        stats = engine.stats
        step = 1e3 * stats.decode_seconds / stats.decode_steps
        rows.append((stats.decoded_tokens / seconds, seconds, stats.prefill_seconds, step, stats.prefilled_tokens))
    best = max(rows[1:])
    median = statistics.median(row[0] for row in rows[1:])
    print(f"sapwood   {best[0]:7.1f} tok/s (median {median:.1f})  {best[1]:.2f} s in all", end="")
    print(f"  prefill {best[2]:.2f} s ({best[4]} tokens)  {best[3]:.1f} ms per decode step")


def loading(model: Any) -> None:
    engine = LocalEngine(model, options=LocalOptions())
    for _ in range(2):
        start = time.perf_counter()
        engine.load(model)
        seconds = time.perf_counter() - start
    print(f"load      {seconds:.2f} s")


def theirs(model: Any) -> None:
    batch = torch.from_numpy(np.stack([request.token_ids for request in requests(model.config.vocab_size)]))
    start = time.perf_counter()
    with torch.inference_mode():
        options = {"do_sample": True, "top_k": 0, "min_new_tokens": NEW, "max_new_tokens": NEW}
        model.generate(batch, attention_mask=torch.ones_like(batch), pad_token_id=0, **options)
    seconds = time.perf_counter() - start
    print(f"generate  {PROMPTS * SAMPLES * NEW / seconds:7.1f} tok/s  {seconds:.2f} s in all")


def operators(model: Any) -> None:
    engine = LocalEngine(model, options=LocalOptions())
    for request in requests(model.config.vocab_size):
        engine.submit(request)
    for _ in range(8):
        engine.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(8):
            engine.step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--ops", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, torch.device("cpu"), getattr(torch, args.dtype), "none", False).eval()
    loading(model)
    ours(model, args.rounds)
    if args.peer:
        theirs(model)
    if args.ops:
        operators(model)


if __name__ == "__main__":
    main()
