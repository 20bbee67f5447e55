"""transformers `generate` as a worker: the prompt repeated for every sample, one batch of all of them."""

from __future__ import annotations

import time
from typing import Any

import torch
from _worker import Measure, serve
from transformers import AutoModelForCausalLM


def set_up(spec: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    torch.set_num_threads(spec["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"]).eval()
    work = spec["workload"]
    group, new = work["shape"]["group"], work["shape"]["new_tokens"]
    ids = torch.tensor([prompt for prompt in work["prompt_ids"] for _ in range(group)])

    def sample(batch: torch.Tensor, tokens: int) -> torch.Tensor:
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            **options,
        )

    def measure(arguments: dict[str, Any]) -> dict[str, Any]:
        model.set_attn_implementation(arguments["attention"])
        start = time.perf_counter()
        output = sample(ids, new)
        seconds = time.perf_counter() - start
        if output.shape != (len(ids), ids.shape[1] + new):
            raise RuntimeError(f"generate gave {tuple(output.shape)}")
        return {"seconds": seconds, "tokens": len(ids) * new}

    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        sample(ids[:2, :16], 2)
    return measure, {"torch_threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(set_up)
