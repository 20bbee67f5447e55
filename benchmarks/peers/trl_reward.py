"""TRL's RewardTrainer as a worker: one measurement is one optimiser step over the workload's pairs."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from _trl import Steps, common, lora
from _worker import Channel
from datasets import Dataset
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer


def trainer(spec: dict[str, Any], pairs: list[dict[str, Any]], epochs: int, folder: str) -> RewardTrainer:
    """A trainer whose epoch is one step over all pairs; the scalar head is trained too."""
    at_once = min(spec["micro_batch"], len(pairs))
    config = RewardConfig(
        **common(spec, folder),
        max_length=None,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=len(pairs) // at_once,
        num_train_epochs=epochs,
    )
    # The classifier looks for the last token that is no padding, so padding must be another token than the end.
    tokenizer: Any = AutoTokenizer.from_pretrained(spec["model"], pad_token="<|endoftext|>")
    adapters = lora(spec, "SEQ_CLS")
    adapters.modules_to_save = ["score"]
    texts = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    return RewardTrainer(
        model=spec["model"],
        args=config,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        peft_config=adapters,
    )


def check(made: RewardTrainer, pairs: list[dict[str, Any]]) -> None:
    """Raises RuntimeError unless TRL has read the workload's ids."""
    for ours, theirs in zip(pairs, made.train_dataset, strict=True):
        for name in ("chosen_ids", "rejected_ids"):
            if ours["prompt_ids"] + ours[name] != theirs[name]:
                raise RuntimeError(f"TRL's {name} are not the workload's")


def main() -> None:
    channel = Channel()
    spec = channel.spec
    torch.set_num_threads(spec["threads"])
    with tempfile.TemporaryDirectory() as folder:
        measured = trainer(spec, spec["workload"]["pairs"], 1_000, folder)
        check(measured, spec["workload"]["pairs"])
        measured.add_callback(Steps(channel, {"torch_threads": torch.get_num_threads()}))
        measured.train()
    channel.finish()


if __name__ == "__main__":
    main()
