"""The roles of a run over one base model: the policy that learns and the reference that it is held to.

The reference is the policy at step 0. Where the policy is an adapter that starts at zero, that is the base with
adapters off and costs no memory; an adapter with a past is kept as a copy of its own weights; a fully trained model
needs a frozen copy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.models.forward import forward_rows
from sapwood.models.load import Policy
from sapwood.ops.batch import Forward, Needs
from sapwood.types import Row


class Models:
    """Policy and reference. `reference` asks for the latter to be kept."""

    def __init__(self, policy: Policy, *, reference: bool = False) -> None:
        self.policy = policy
        self._adapter_start: list[Tensor] | None = None
        self._frozen_copy: Any = None
        if not reference or (policy.has_lora and policy.starts_at_base):
            return
        if policy.has_lora:
            self._adapter_start = [p.detach().clone() for p in policy.parameters()]
        else:
            self._frozen_copy = copy.deepcopy(policy.model).requires_grad_(False)

    def forward(self, rows: Sequence[Row], *, entropy_grad: bool = False) -> Forward:
        """The training forward of a micro-batch: log-probabilities and entropies of its scored tokens."""
        logprobs, entropies = forward_rows(
            self.policy.model, rows, device=self.policy.device, entropy_grad=entropy_grad
        )
        return Forward(logprobs, entropies)

    def score(self, batches: Sequence[Sequence[Row]], needs: Needs) -> None:
        """Fill the rows' old and reference log-probabilities, as asked, without gradients and in eval mode.

        The batches should be those of the first update, so that its ratios start at exactly 1.
        """
        if not (needs.old_logprobs or needs.reference_logprobs):
            return
        training = self.policy.model.training
        self.policy.model.eval()
        with torch.no_grad():
            if needs.old_logprobs:
                self._fill(self.policy.model, batches, "old_logprobs")
            if needs.reference_logprobs:
                with self._reference() as model:
                    self._fill(model, batches, "reference_logprobs")
        self.policy.model.train(training)

    def _fill(self, model: Any, batches: Sequence[Sequence[Row]], name: str) -> None:
        for rows in batches:
            logprobs, _ = forward_rows(model, rows, device=self.policy.device, entropy=False)
            parts = logprobs.cpu().split([row.scored for row in rows])
            for row, part in zip(rows, parts, strict=True):
                setattr(row, name, part.numpy())

    @contextlib.contextmanager
    def _reference(self) -> Iterator[Any]:
        model = self.policy.model
        if self._frozen_copy is not None:
            yield self._frozen_copy
        elif self._adapter_start is not None:
            # The adapter's own weights step aside for its starting ones: no copy of the base is made.
            learned = [p.detach().clone() for p in self.policy.parameters()]
            self._set(self._adapter_start)
            try:
                yield model
            finally:
                self._set(learned)
        else:
            with model.disable_adapter():
                yield model

    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.policy.parameters(), values, strict=True):
            parameter.data.copy_(value)
