"""TRL's GRPOTrainer as a worker: one measurement is one optimiser step, sampling included."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from _trl import Steps, common, lora
from _worker import Channel
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


class Reward:
    """A reward that differs between samples and costs nothing; it also sees that every reply has the asked length."""

    __name__ = "reward"

    def __init__(self, new_tokens: int) -> None:
        self.new_tokens = new_tokens

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """One number per reply."""
        lengths = {len(ids) for ids in completion_ids}
        if lengths != {self.new_tokens}:
            raise RuntimeError(f"replies of {sorted(lengths)} tokens, asked for {self.new_tokens}")
        return [float(sum(ids) % 11) for ids in completion_ids]


def trainer(
    spec: dict[str, Any], texts: list[str], group: int, new_tokens: int, steps: int, folder: str
) -> GRPOTrainer:
    """A trainer whose step is len(texts) prompts x group samples."""
    samples = len(texts) * group
    at_once = min(spec["micro_batch"], samples)
    config = GRPOConfig(
        **common(spec, folder),
        beta=0.0,
        num_iterations=1,
        num_generations=group,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=samples // at_once,
        max_completion_length=new_tokens,
        generation_kwargs={"min_new_tokens": new_tokens},
        temperature=1.0,
        max_steps=steps,
        shuffle_dataset=False,
    )
    return GRPOTrainer(
        model=spec["model"],
        reward_funcs=Reward(new_tokens),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts] * 8),
        peft_config=lora(spec),
    )


def main() -> None:
    channel = Channel()
    spec = channel.spec
    torch.set_num_threads(spec["threads"])
    work = spec["workload"]
    shape = work["shape"]
    with tempfile.TemporaryDirectory() as folder:
        # The warm-up is a whole step of a small shape: a step of the full one takes minutes on a CPU.
        trainer(spec, [work["texts"][0][:200]], 2, 2, 1, folder).train()
        measured = trainer(spec, work["texts"], shape["group"], shape["new_tokens"], 1_000, folder)
        encoded = measured.processing_class(work["texts"])["input_ids"]
        if encoded != work["prompt_ids"]:
            raise RuntimeError("TRL's tokenizer does not give the workload's prompt ids")
        measured.add_callback(Steps(channel, {"torch_threads": torch.get_num_threads()}))
        measured.train()
    channel.finish()


if __name__ == "__main__":
    main()
