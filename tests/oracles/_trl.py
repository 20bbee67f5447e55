"""What the comparisons with TRL share: rows in both shapes, and a model that answers as TRL's fused head does.

TRL's methods run unbound on a stand-in `self`; the model behind them is a tiny one in transformers' eager attention,
on padded batches. Sapwood computes the same rows with a copy of it through the token tree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tests.conftest import VOCABULARY
from torch import Tensor, nn

from sapwood.models.forward import forward_rows
from sapwood.types import Row


class Fused(nn.Module):
    """A model that returns what TRL's fused LM head returns, computed from plain logits."""

    is_gradient_checkpointing = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **options: Any) -> SimpleNamespace:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
        targets, mask = labels[:, 1:], labels[:, 1:] != -100
        logp = torch.log_softmax(logits, -1)
        picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(
            log_probs=picked * mask,
            entropy=-(logp.exp() * logp).sum(-1) * mask,
            mean_logits=logits.mean(-1),
            is_top1=(logits.argmax(-1) == targets) & mask,
            label_mask=mask,
        )


def stand_in(**fields: Any) -> SimpleNamespace:
    """A trainer's `self` on one process: every collective is the identity."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1
    )
    return SimpleNamespace(
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def draw_row(generator: np.random.Generator, prompt: np.ndarray, tokens: int, **fields: Any) -> Row:
    """A random reply of so many scored tokens to a prompt."""
    ids = np.concatenate([prompt, generator.integers(0, VOCABULARY, tokens)]).astype(np.int64)
    mask = np.arange(len(ids)) >= len(prompt)
    return Row(ids, mask, np.zeros(tokens, np.int32), **fields)


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The rows as TRL's collators give them: input_ids, attention_mask, completion_mask [B, T]."""
    width = max(row.token_ids.size for row in rows)

    def pad(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([torch.from_numpy(np.pad(a.astype(np.int64), (0, width - a.size))) for a in arrays])

    return {
        "input_ids": pad([row.token_ids for row in rows]),
        "attention_mask": pad([np.ones_like(row.token_ids) for row in rows]),
        "completion_mask": pad([row.loss_mask for row in rows]),
    }


@torch.no_grad()
def fill(model: nn.Module, rows: Sequence[Row], name: str) -> None:
    """Score the rows without gradient into this array, as `Models.score` does."""
    logprobs, _ = forward_rows(model, rows, entropy=False)
    for row, values in zip(rows, logprobs.split([row.scored for row in rows]), strict=True):
        setattr(row, name, values.numpy())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss by every weight that it depends on."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Gradients agree, relative to the largest entry of each weight's. They mustn't all vanish."""
    assert ours.keys() == theirs.keys()
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-4
    for name, gradient in theirs.items():
        atol = relative * max(float(gradient.abs().max()), 1e-6)
        torch.testing.assert_close(
            ours[name], gradient, rtol=relative, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
