"""The last TRL with a PPOTrainer as a worker: one measurement is one batch, sampling, scoring and all epochs included.

It runs in an environment of its own (make_env_ppo.sh). The policy and the value model are adapters on a base each, the
reference is the policy with its adapters off, the reward model is spec["reward_model"].
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import contextlib

import torch
from _trl import common, lora
from _worker import Channel
from datasets import Dataset
from peft import inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Enough(Exception):
    """The parent wants no more: this trainer's loop looks at no stop flag."""


class Batches(TrainerCallback):
    """Answers each batch with its seconds, from the request to the optimiser's last step."""

    def __init__(self, channel: Channel, new_tokens: int) -> None:
        self.channel, self.new_tokens = channel, new_tokens
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set-up is over."""
        self.channel.ready(torch_threads=torch.get_num_threads())
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer, then wait for the next request."""
        self.channel.reply(seconds=time.perf_counter() - self.start, tokens=args.batch_size * self.new_tokens)
        self._wait()

    def _wait(self) -> None:
        if self.channel.wait() is None:
            raise Enough
        self.start = time.perf_counter()


def value_model(spec: dict[str, Any]) -> Any:
    """A classifier whose trunk learns by adapters and whose head is trained."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(spec["reward_model"], dtype=spec["dtype"])
    model.requires_grad_(False)
    adapters = lora(spec)
    adapters.target_modules = set(LINEAR)
    inject_adapter_in_model(adapters, model.model)
    model.score.requires_grad_(True)
    return model


def trainer(spec: dict[str, Any], channel: Channel, folder: str) -> PPOTrainer:
    """A trainer whose batch is every prompt of the workload, repeated for each sample."""
    work = spec["workload"]
    group, new = work["shape"]["group"], work["shape"]["new_tokens"]
    prompts = [ids for ids in work["prompt_ids"] for _ in range(group)]
    at_once = min(spec["micro_batch"], len(prompts))
    options = common(spec, folder)
    del options["model_init_kwargs"]
    config = PPOConfig(
        **options,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=len(prompts) // at_once,
        local_rollout_forward_batch_size=at_once,
        num_mini_batches=1,
        num_ppo_epochs=spec["epochs"],
        total_episodes=1_000 * len(prompts),
        num_sample_generations=0,
        response_length=new,
        stop_token=None,
        temperature=1.0,
        kl_coef=0.05,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.5,
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(spec["model"], padding_side="left", pad_token="<|endoftext|>")
    policy: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"])
    # A pad token that is sampled would end the response early; end tokens don't, as there is no stop token.
    policy.generation_config.suppress_tokens = [tokenizer.pad_token_id]
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(spec["reward_model"], dtype=spec["dtype"]),
        value_model=value_model(spec),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        data_collator=DataCollatorWithPadding(tokenizer),
        eval_dataset=Dataset.from_list([{"input_ids": prompts[0]}]),
        callbacks=[Batches(channel, new)],
        peft_config=lora(spec),
    )


def main() -> None:
    channel = Channel()
    spec = channel.spec
    torch.set_num_threads(spec["threads"])
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        trainer(spec, channel, folder).train()
    channel.finish()


if __name__ == "__main__":
    main()
