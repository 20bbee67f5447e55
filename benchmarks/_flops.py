"""FLOPs that a LoRA forward and backward over a token tree needs: the useful ones, recomputation not counted.

A multiply-add is 2 FLOPs. Counted, for N distinct tokens:
  linear layers   forward 2 p N and gradient of the input 2 p N (p weights; frozen, so no weight gradient); the first
                  layer's q, k and v need no gradient of their input, as the embeddings are frozen
  LoRA            per adapter 2 r (in + out) N, three times: forward, gradient of the input, gradients of A and B
  attention       per layer and (query, key) pair 4 H forward (scores, weighted sum) and 8 H backward (four products),
                  H = heads x head size; pairs exactly: a token at depth d (from 0) sees d + 1 keys
  LM head         2 V H forward and 2 V H backward for each distinct position that predicts a scored token
Norms, activations, rotary embeddings, softmax and the optimiser are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def linear_shapes(config: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(name, in, out) of a Llama-like layer's linear modules, from its config.json."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    return [
        ("q", hidden, queries),
        ("k", hidden, keys),
        ("v", hidden, keys),
        ("o", queries, hidden),
        ("gate", hidden, inner),
        ("up", hidden, inner),
        ("down", inner, hidden),
    ]


def pairs(depths: Iterable[int]) -> int:
    """(query, key) pairs of tokens at these depths."""
    return sum(depth + 1 for depth in depths)


def tree_flops(config: Mapping[str, Any], depths: list[int], head_nodes: int, rank: int) -> dict[str, int]:
    """FLOPs by part, and their "total", of forward and backward over nodes at `depths`."""
    layers, nodes = config["num_hidden_layers"], len(depths)
    shapes = linear_shapes(config)
    weights = sum(a * b for _, a, b in shapes)
    first = sum(a * b for name, a, b in shapes if name in "qkv")
    adapters = sum(rank * (a + b) for _, a, b in shapes)
    first_adapters = sum(rank * a for name, a, _ in shapes if name in "qkv")
    width = next(b for name, _, b in shapes if name == "q")
    parts = {
        "linear": 2 * nodes * (2 * layers * weights - first),
        "lora": 2 * nodes * (3 * layers * adapters - first_adapters),
        "attention": 12 * width * layers * pairs(depths),
        "head": 4 * config["vocab_size"] * config["hidden_size"] * head_nodes,
    }
    return parts | {"total": sum(parts.values())}
