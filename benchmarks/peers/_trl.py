"""What TRL's workers share: options of a step that ends after itself, LoRA, and a callback that times steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from _worker import Channel
from peft import LoraConfig
from transformers import TrainerCallback


class Steps(TrainerCallback):
    """Hands each step to the parent: waits for a request before it and answers with its seconds after it.

    facts: told when set-up is over; answer: what a measurement reports beside its seconds.
    """

    def __init__(self, channel: Channel, facts: dict[str, Any], answer: Callable[[], dict[str, Any]] = dict) -> None:
        self.channel, self.facts, self.answer = channel, facts, answer
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
        self.channel.reply(seconds=time.perf_counter() - self.start, **self.answer())
        control.should_training_stop = self.channel.wait() is None
        return control


def common(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Options that every trainer here gets."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        # Weights in the dtype of the run: autocast would cast frozen fp32 weights anew for every product.
        "model_init_kwargs": {"dtype": spec["dtype"]},
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1_000_000,
        "seed": 0,
    }


def lora(spec: dict[str, Any], task_type: str = "CAUSAL_LM") -> LoraConfig:
    """Adapters on every linear layer."""
    rank = spec["rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task_type)  # type: ignore[arg-type]
