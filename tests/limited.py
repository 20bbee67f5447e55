"""Run by tests/test_memory.py in a process of its own, whose address space is limited: python -m tests.limited."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sapwood import memory
from sapwood.engines import Request, Sampling
from sapwood.engines.local import LocalEngine
from sapwood.errors import BudgetError
from sapwood.models.adapters import first_adapter, lora_config
from sapwood.models.forward import enable_tree, forward_rows
from sapwood.sections import LoraSection
from sapwood.tree import pack
from tests.conftest import make_row

MIB = 2**20


@contextmanager
def limited(mib: int) -> Iterator[None]:
    """Address space for so much more than is taken."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + mib * MIB, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def training(lora: bool) -> dict:
    """An update that doesn't fit, halved until it does; the same without a limit."""
    model = small_model()
    enable_tree(model)
    if lora:
        model = first_adapter(model, lora_config(LoraSection(rank=8)), 0, scalar=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at zero, A has no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    rows = [make_row(rng.integers(0, 320, 128), range(64, 128), group=i) for i in range(8)]
    trained = [p for p in model.parameters() if p.requires_grad]

    def update(tokens: int) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for micro in pack(rows, tokens):
            share = -forward_rows(model, micro)[0].sum() / 512
            share.backward()
            loss += float(share.detach())
        return loss, [p.grad.clone() for p in trained]

    update(128)  # code and buffers that don't belong to the update are there
    model.zero_grad(set_to_none=True)
    budget, notes = memory.Budget(1024), []
    with limited(16):
        loss, grads = memory.retry(
            lambda: update(budget.tokens), lambda: notes.append(budget.halve(pack(rows, budget.tokens)))
        )
    with limited(4096):  # more than enough; without any limit another library would multiply
        expected_loss, expected = update(1024)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(grads, expected, strict=True)]
    return {
        "tokens": budget.tokens,
        "halvings": budget.halvings,
        "note": notes[0],
        "loss_error": abs(loss / expected_loss - 1),
        "gradient_error": max(errors),
    }


def too_small() -> str:
    """Less than one row needs."""
    model = small_model()
    enable_tree(model)
    row = make_row(np.arange(900) % 320, range(1, 900))
    budget = memory.Budget(900)
    try:
        with limited(8):
            memory.retry(lambda: forward_rows(model, [row])[0].sum().backward(), lambda: budget.halve([[row]]))
    except BudgetError as error:
        return str(error)
    return "it fitted"


def sampling() -> dict:
    """32 prompts that don't fit side by side."""
    model = small_model()
    rng = np.random.default_rng(0)
    options = Sampling(max_new_tokens=8, ignore_eos=True)
    requests = [Request(i, rng.integers(0, 320, 200), options, i, str(i)) for i in range(32)]
    expected = LocalEngine(model).generate(requests)
    engine = LocalEngine(model)
    engine.generate(requests[:1])
    engine.load(model)
    shrunk = []
    with limited(8):
        got = memory.retry(lambda: engine.generate(requests), lambda: shrunk.append(engine.shrink()))
    return {
        "shrunk": shrunk,
        "rows": engine.options.max_batch,
        "same": all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(got, expected, strict=True)),
    }


def optimizer() -> dict:
    """AdamW's first step without the memory for it: as torch leaves it, and behind `prepare` and `probe`."""

    def made() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
        parameters = [torch.nn.Parameter(torch.ones(2 * MIB)) for _ in range(4)]  # 8 MiB each
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return parameters, torch.optim.AdamW(parameters, lr=0.1)

    def stepped(parameters: list[torch.nn.Parameter]) -> list[bool]:
        return [bool((p != 1).any()) for p in parameters]

    found: dict = {}
    parameters, torch_alone = made()
    memory.prepare(torch_alone)
    # Room for one temporary of a step but not for two: the first parameter's weight decay is applied by then.
    with limited(12):
        try:
            torch_alone.step()
        except RuntimeError as error:
            found["torch"] = memory.is_out_of_memory(error), stepped(parameters)
    parameters, guarded = made()
    memory.prepare(guarded)
    with limited(12):
        try:
            memory.probe(guarded)
        except BudgetError as error:
            found["probe"] = str(error), stepped(parameters)
    parameters, unprepared = made()
    with limited(40):  # its state takes 64
        try:
            memory.prepare(unprepared)
        except BudgetError as error:
            found["prepare"] = str(error), stepped(parameters)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.autograd.set_grad_enabled(True)
    found = {
        "full": training(lora=False),
        "lora": training(lora=True),
        "too_small": too_small(),
        "sampling": sampling(),
        "optimizer": optimizer(),
    }
    print(json.dumps(found))
