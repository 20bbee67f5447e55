"""Tiny random decoders of several families."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

VOCAB = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_scaled": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_windowed": ("Mistral", {"sliding_window": 7}),
    "gemma2": ("Gemma2", {"tie_word_embeddings": False, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {"tie_word_embeddings": False, "sliding_window": 5, "query_pre_attn_scalar": 8}),
}
FAMILIES = tuple(_FAMILIES)


def tiny(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode whose norms and biases are random too."""
    name, extra = _FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **extra, **changes})
    cls = getattr(transformers, "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM")
    torch.manual_seed(seed)
    # Eager attention is transformers' reference: its SDPA path leaves Gemma 2's softcap out.
    config._attn_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.isfinite().all(), key
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def prompt(seed: int, length: int) -> np.ndarray:
    """Token ids that no special token is among."""
    return np.random.default_rng([7, seed]).integers(3, VOCAB, length).astype(np.int64)


@torch.no_grad()
def greedy(model: Any, token_ids: np.ndarray, count: int) -> list[int]:
    """What transformers' own generate says."""
    ids = torch.tensor(token_ids)[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    return out[0, len(token_ids) :].tolist()
