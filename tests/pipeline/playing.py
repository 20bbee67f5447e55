"""Language models for the pipeline's tests: a tiny one with room for a building's prompts, and one that is scripted."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch

from sapwood.engines import Request
from sapwood.engines.scripted import ScriptedEngine
from sapwood.models.load import ModelChoice, Policy, load_policy
from sapwood.progress import Progress
from tests.chats import tokenizer


def silent() -> Progress:
    """Reports to nobody."""
    return Progress(stream=io.StringIO())


def save_model(folder: Path, seed: int = 0) -> Path:
    """A random two-layer Llama with the tests' tokenizer and a context of 4,096 tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    made = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=made.eos_token_id,
        bos_token_id=made.bos_token_id,
        pad_token_id=made.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def policy_of(folder: Path) -> Policy:
    return load_policy(ModelChoice(name=str(folder)))


class Player(ScriptedEngine):
    """Says what `reply(member, prompt)` gives; stops working after `limit` replies, as if killed."""

    def __init__(self, reply: Callable[[int, str], str], limit: int | None = None) -> None:
        super().__init__(tokenizer(), lambda prompt, request: reply(int(request.episode.rpartition("/")[2]), prompt))
        self.requests: list[Request] = []
        self.limit = limit

    def submit(self, request: Request) -> None:
        if self.limit is not None and len(self.requests) == self.limit:
            raise KeyboardInterrupt
        self.requests.append(request)
        super().submit(request)
