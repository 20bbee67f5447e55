"""A task that a tiny random model can learn, and its twin that no one can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sapwood.envs import Env, EnvFamily
from sapwood.rewards import Reward
from sapwood.types import Group, Task

LOW = 160  # half of the tiny tokenizer's vocabulary


class LowTokens(Reward):
    """The share of a reply's tokens in the lower half of the vocabulary: about one half before training."""

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        return [[{"low": float(np.mean(t.turns[0].token_ids < LOW))} for t in group.trajectories] for group in groups]


class ShuffledLowTokens(LowTokens):
    """The same rewards dealt to the trajectories at random: nothing to learn, and the same noise."""

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        scores = super().score(groups)
        flat = [parts for group in scores for parts in group]
        tokens = sum(int(t.turns[0].token_ids.sum()) for group in groups for t in group.trajectories)
        order = np.random.default_rng(tokens).permutation(len(flat))
        dealt = iter([flat[i] for i in order])
        return [[next(dealt) for _ in group] for group in scores]


class Broken(EnvFamily):
    """Every environment raises."""

    def tasks(self, split, count, seed) -> list[Task]:
        return [Task(f"{split}-{i}") for i in range(count)]

    def make(self, task: Task) -> Env:
        raise RuntimeError("the building burnt down")


def save_tiny_model(folder: Path, seed: int = 0, **changes: int) -> Path:
    """A random two-layer Llama with the tests' tokenizer, as a transformers folder. changes: of its config."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.chats import tokenizer

    made = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=made.eos_token_id,
        bos_token_id=made.bos_token_id,
        pad_token_id=made.eos_token_id,
    )
    config.update(changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
