"""vLLM's CPU engine as a worker, in this process, prefix caching on; cold resets the prefix cache first."""

from __future__ import annotations

import time
from typing import Any

import torch
from _worker import Measure, serve
from vllm import LLM, SamplingParams


def set_up(spec: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    work = spec["workload"]
    group, new = work["shape"]["group"], work["shape"]["new_tokens"]
    longest = max(len(prompt) for prompt in work["prompt_ids"]) + new
    engine = LLM(
        model=spec["model"],
        dtype=spec["dtype"],
        enforce_eager=spec["eager"],
        enable_prefix_caching=True,
        max_model_len=longest,
        max_num_seqs=max(len(work["prompt_ids"]) * group, 2),
        seed=0,
    )
    # Neither log-probabilities nor a seed per request are asked for, though training needs the first: both slow it.
    options = SamplingParams(temperature=1.0, max_tokens=new, min_tokens=new, ignore_eos=True)
    requests: Any = [{"prompt_token_ids": prompt} for prompt in work["prompt_ids"] for _ in range(group)]

    def measure(arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["cold"] and not engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        start = time.perf_counter()
        outputs = engine.generate(requests, options, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        if tokens != len(requests) * new:
            raise RuntimeError(f"vLLM gave {tokens} tokens, asked for {len(requests) * new}")
        return {"seconds": seconds, "tokens": tokens}

    measure({"cold": True})
    return measure, {"torch_threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(set_up)
