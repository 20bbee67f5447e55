"""TRL's SFTTrainer as a worker: one measurement is one optimiser step over the workload's demonstrations.

spec["packing"]: "bfd" (best-fit decreasing; position ids, on a CPU an attention mask, keep documents apart) or "none"
(padded rows). spec["max_length"]: tokens of a pack.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from _trl import Steps, common, lora
from _worker import Channel
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def trainer(spec: dict[str, Any], demos: list[dict[str, Any]], epochs: int, folder: str) -> SFTTrainer:
    """A trainer whose epoch is one step over all demonstrations; the loss is on the answers."""
    packed = spec["packing"] != "none"
    rows = [
        {
            "input_ids": demo["prompt_ids"] + demo["answer_ids"],
            "labels": [-100] * len(demo["prompt_ids"]) + demo["answer_ids"],
        }
        for demo in demos
    ]
    config = SFTConfig(
        **common(spec, folder),
        packing=packed,
        packing_strategy=spec["packing"] if packed else "bfd",
        max_length=spec["max_length"],
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=len(demos),  # more than there are batches: an epoch's end is a step's end
        num_train_epochs=epochs,
    )
    return SFTTrainer(model=spec["model"], args=config, train_dataset=Dataset.from_list(rows), peft_config=lora(spec))


def main() -> None:
    channel = Channel()
    spec = channel.spec
    torch.set_num_threads(spec["threads"])
    demos = spec["workload"]["demos"]
    with tempfile.TemporaryDirectory() as folder:
        measured = trainer(spec, demos, 1_000, folder)
        trained = sum(label != -100 for row in measured.train_dataset for label in row["labels"])
        if trained != sum(len(demo["answer_ids"]) for demo in demos):
            raise RuntimeError(f"TRL trains on {trained} tokens, not on those of all answers")
        facts = {"torch_threads": torch.get_num_threads(), "packs": len(measured.train_dataset)}
        measured.add_callback(Steps(channel, facts, lambda: {"tokens": trained}))
        measured.train()
    channel.finish()


if __name__ == "__main__":
    main()
