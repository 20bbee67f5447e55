"""Fixtures shared by all tests: tiny random models of every supported family, and random tries of rows."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from sapwood.types import Row

torch.set_num_threads(1)
VOCABULARY = 61


def tiny_config(family: str):
    """A two- or three-layer config; sliding windows are shorter than most tests' trunks."""
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GemmaConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    makers = {
        "llama": lambda: LlamaConfig(**common, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**common),
        "qwen3": lambda: Qwen3Config(**common),
        "mistral": lambda: MistralConfig(**common, sliding_window=None),
        "mistral-window": lambda: MistralConfig(**common, sliding_window=5),
        "gemma": lambda: GemmaConfig(**common),
        "gemma2": lambda: Gemma2Config(**common, sliding_window=5, query_pre_attn_scalar=8),
        "gemma3": lambda: Gemma3TextConfig(**common, sliding_window=5, query_pre_attn_scalar=8),
    }
    return makers[family]()


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "mistral-window", "gemma", "gemma2", "gemma3")


def tiny_model(family: str = "llama", seed: int = 0):
    """A random model in transformers' eager attention: the oracle. Copies of it are routed through the tree."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # larger than the default, so that attention is far from uniform
                parameter.mul_(4.0 if "embed" not in name else 1.0)
    return model.eval()


def tree_copy(model):
    """The same weights, routed through the token tree."""
    from sapwood.models.forward import enable_tree

    twin = copy.deepcopy(model)
    enable_tree(twin)
    return twin


def make_row(tokens, scored, temperature: float = 1.0, group: int = 0) -> Row:
    """A row that scores the given positions (a bool mask or a list of indices)."""
    ids = np.asarray(tokens, dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    mask[np.asarray(scored, dtype=None if len(scored) else np.int64)] = True
    return Row(ids, mask, np.zeros(int(mask.sum()), dtype=np.int32), temperature=temperature, group=group)


def random_rows(seed: int, depth: int, *, longest: int = 6, children: int = 3) -> list[Row]:
    """Rows of a random trie: ragged, rows that are prefixes of others, an identical pair and an unscored row."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []

    def grow(prefix: np.ndarray, left: int) -> None:
        sequence = np.concatenate([prefix, rng.integers(0, VOCABULARY, rng.integers(1, longest + 1))])
        mask = rng.random(len(sequence)) < 0.6
        mask[0] = False
        rows.append(make_row(sequence, mask, temperature=float(rng.choice([1.0, 0.7]))))
        for _ in range(int(rng.integers(1, children + 1)) if left else 0):
            grow(sequence, left - 1)

    grow(np.empty(0, dtype=np.int64), depth)
    rows.append(rows[-1])
    rows.append(make_row(rows[0].token_ids, []))
    return rows


@pytest.fixture
def llama():
    return tiny_model("llama")
