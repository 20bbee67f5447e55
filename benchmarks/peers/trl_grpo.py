"""TRL's GRPOTrainer as a worker: one measurement is one optimiser step, sampling included."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from _worker import Channel
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
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


class Steps(TrainerCallback):
    """Hands each step to the parent: waits for a request before it and answers with its seconds after it."""

    def __init__(self, channel: Channel, facts: dict[str, Any]) -> None:
        self.channel, self.facts = channel, facts
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set-up is over."""
        self.channel.ready(**self.facts)
        if self.channel.wait() is None:
            raise SystemExit("no step was asked for")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Answer, then wait for the next request."""
        self.channel.reply(seconds=time.perf_counter() - self.start)
        control.should_training_stop = self.channel.wait() is None
        return control


def trainer(
    spec: dict[str, Any], texts: list[str], group: int, new_tokens: int, steps: int, folder: str
) -> GRPOTrainer:
    """A trainer whose step is len(texts) prompts x group samples."""
    rank = spec["rank"]
    samples = len(texts) * group
    at_once = min(spec["micro_batch"], samples)
    bf16 = spec["dtype"] == "bfloat16"
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=False,
        # Weights in the dtype of the run: autocast would cast frozen fp32 weights anew for every product.
        model_init_kwargs={"dtype": spec["dtype"]},
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
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
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1_000_000,
        seed=0,
    )
    return GRPOTrainer(
        model=spec["model"],
        reward_funcs=Reward(new_tokens),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts] * 8),
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
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
