"""A decoder without rotary embeddings and grouped heads, and with dropout: plain rows in training, sampled as it is."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from sapwood.engines import Request, Sampling
from sapwood.engines.local import LocalEngine
from sapwood.models.forward import tree_obstacle
from tests.chats import tokenizer


def gpt2(**options: float):
    torch.manual_seed(0)
    small = GPT2Config(vocab_size=318, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    for name, value in options.items():
        setattr(small, name, value)
    return AutoModelForCausalLM.from_config(small).eval()


def test_dropout_of_attention_keeps_a_model_off_the_tree_but_not_out_of_the_engine() -> None:
    assert tree_obstacle(gpt2()) == "it drops attention weights at random in training"
    assert tree_obstacle(gpt2(), training=False) is None
    assert tree_obstacle(gpt2(attn_pdrop=0.0)) is None


def test_it_samples_what_transformers_does() -> None:
    model = gpt2()
    prompt = np.arange(40, 52)
    sampling = Sampling(temperature=0.0, max_new_tokens=10, ignore_eos=True)
    [done] = LocalEngine(model, tokenizer()).generate([Request(0, prompt, sampling, 0, "e")])
    theirs = model.generate(torch.tensor(prompt)[None], max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert done.token_ids.tolist() == theirs[0, len(prompt) :].tolist()
