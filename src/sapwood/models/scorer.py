"""Reward models that judge whole rows: an adapter and a head on the policy's base, or a model of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sapwood.errors import ModelError
from sapwood.models.adapters import AdapterFile, add_adapter, fill_adapter, named_adapter
from sapwood.models.critic import value_head
from sapwood.models.export import open_model
from sapwood.models.forward import Batch, Hidden
from sapwood.models.load import ModelChoice, Policy, called, find_adapter, is_adapter, load_policy, scalar_head
from sapwood.models.role import role
from sapwood.models.sources import at
from sapwood.paths import expanded
from sapwood.tree import pack
from sapwood.types import Floats, Row

#: PEFT's name of the first reward model's adapter on the policy's base; further ones are numbered.
REWARD = "reward"


@dataclass(frozen=True)
class Scorer:
    """A frozen reward model. policy: its trunk, under its adapter; head: [.., H] -> [.., 1] in fp32."""

    policy: Policy
    head: nn.Module

    @property
    def tokenizer(self) -> Any:
        """What its rows have to be tokenised with."""
        return self.policy.tokenizer

    @torch.no_grad()
    def score(self, rows: Sequence[Row], token_budget: int = 8192) -> Floats:
        """Scores [R] of the rows, read at each one's last token; at most token_budget distinct tokens at a time."""
        model, found = self.policy.model, np.zeros(len(rows), np.float32)
        index: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            index.setdefault(id(row), []).append(i)
        training = model.training
        model.eval()
        # A row that is longer than the budget still has to be read.
        budget = max([token_budget, *(len(row.token_ids) for row in rows)])
        for batch in pack(rows, budget):
            with role(self.policy.role):
                hidden = Hidden.of(model, Batch.of(batch, self.policy.device))
            for row, score in zip(batch, hidden.scalars(self.head)[1].tolist(), strict=True):
                found[index[id(row)]] = score
        model.train(training)
        return found


def load_scorer(
    path: str | Path,
    policy: Policy | None = None,
    *,
    dtype: str = "auto",
    quantize: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> Scorer:
    """The reward model at `path`: a run, checkpoint, adapter or model folder, or a hub id.

    policy: where its frozen base is the one that the reward model's adapter was trained on, it is shared, unless dtype
    or quantize ask for a base of its own. Raises ModelError for what can't be opened or has no trained scalar head.
    """
    with called("rewards: reward_model's path"):
        return _load(path, policy, (dtype, quantize, device), trust_remote_code, cache_dir)


def _load(
    path: str | Path,
    policy: Policy | None,
    placing: tuple[str, str, str],
    trust_remote_code: bool,
    cache_dir: Path | None,
) -> Scorer:
    start, (dtype, quantize, device) = expanded(path), placing
    folder = find_adapter(start) if start.is_dir() else None
    if folder is not None and is_adapter(folder) and policy is not None and (dtype, quantize) == ("auto", "auto"):
        file = AdapterFile.read(folder)
        if policy.has_lora and file.base == policy.public_name and file.shareable:
            return _on_base(policy, file)
    settings = {
        "dtype": dtype,
        "quantize": "none" if quantize == "auto" else quantize,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "cache_dir": cache_dir,
    }
    if folder is None:
        own = load_policy(ModelChoice(name=str(path), **settings), head="scalar")
    else:
        own = open_model(folder, **settings)
    if not own.trained_head:
        raise _no_head(path)
    own.model.requires_grad_(False).eval()
    return Scorer(own, scalar_head(own.model))


def _no_head(path: str | Path) -> ModelError:
    return ModelError(
        f"{at('name')}{path} has no trained scalar head, so it is no reward model; train one with algorithm: reward."
    )


def _on_base(policy: Policy, file: AdapterFile) -> Scorer:
    if file.head is None:
        raise _no_head(file.folder)
    taken = policy.model.peft_config
    name = next(name for i in range(1, len(taken) + 2) if (name := REWARD if i == 1 else f"{REWARD}{i}") not in taken)
    add_adapter(policy.model, name, file.config, seed=0)
    fill_adapter(policy.model, name, file)
    for parameter in named_adapter(policy.model, name).values():
        parameter.requires_grad_(False)
    head = value_head(policy).requires_grad_(False)
    head.weight.copy_(file.head)
    return Scorer(policy.view(name), head)
