"""The padded way as a worker: one row per sample with the prompt repeated, logits only for the reply, LoRA backward."""

from __future__ import annotations

import time
from typing import Any

import torch
from _worker import Measure, serve
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def set_up(spec: dict[str, Any]) -> tuple[Measure, dict[str, Any]]:
    torch.set_num_threads(spec["threads"])
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"])
    rank = spec["rank"]
    model: Any = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()
    work = spec["workload"]
    group, new = work["shape"]["group"], work["shape"]["new_tokens"]

    def batch_loss(rows: list[list[int]], total: int) -> None:
        ids = torch.tensor(rows)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=new + 1).logits[:, :-1].float()
        picked = torch.log_softmax(logits, -1).gather(-1, ids[:, -new:, None])
        (-picked.sum() / (total * new)).backward()

    def measure(arguments: dict[str, Any]) -> dict[str, Any]:
        size, at_once = arguments["group"], arguments["micro_batch"]
        replies = work["reply_ids"]
        rows = [prompt + replies[p * group + g] for p, prompt in enumerate(work["prompt_ids"]) for g in range(size)]
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        for first in range(0, len(rows), at_once):
            batch_loss(rows[first : first + at_once], len(rows))
        return {"seconds": time.perf_counter() - start, "tokens": sum(map(len, rows))}

    short = torch.tensor([work["prompt_ids"][0][:32]])
    model(input_ids=short, logits_to_keep=2).logits.float().sum().backward()
    return measure, {"torch_threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(set_up)
