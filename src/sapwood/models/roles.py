"""The roles of a run: the policy that learns, the critic that judges its states, the reference that it is held to.

Roles that share the policy's base are adapters and heads on it, chosen for each forward by `sapwood.models.role`; the
others are models of their own. The reference is the policy at step 0: the base alone where the policy's adapter starts
at zero, a frozen adapter with its starting weights where it has a past, a frozen copy of a fully trained model, or
whatever model is given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sapwood.errors import ModelError
from sapwood.models.adapters import POLICY, AdapterFile, adapter_parameters, add_adapter, copy_adapter, fill_adapter
from sapwood.models.critic import Critic, CriticSection, build_critic
from sapwood.models.forward import Batch, Hidden, token_scores
from sapwood.models.load import Policy, find_adapter, is_adapter, is_classifier, scalar_head
from sapwood.models.precision import mixed_precision
from sapwood.models.role import BASE, role
from sapwood.ops.batch import Forward, Needs
from sapwood.paths import expanded
from sapwood.types import Row

__all__ = ["Critic", "CriticSection", "Models", "build_critic"]

#: PEFT's name of the frozen adapter with the policy's starting weights.
REFERENCE = "reference"
_AUTOCAST = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Models:
    """Every role of a run. needs: what the algorithm will ask for, which decides what is kept.

    reference: a model of its own in place of the policy at step 0; critic: where values are needed. autocast: "none",
    "bfloat16" or "float16", the dtype of the passes' products (mixed precision). Raises ModelError for needs that the
    models can't meet.
    """

    def __init__(
        self,
        policy: Policy,
        needs: Needs | None = None,
        reference: Policy | None = None,
        critic: Critic | None = None,
        autocast: str = "none",
    ) -> None:
        needs = needs or Needs()
        if needs.values and critic is None:
            raise ModelError("the algorithm needs values, and there is no critic: build one with build_critic.")
        if needs.scores != is_classifier(policy.model):
            raise ModelError(
                "the algorithm needs scores: load the policy with head='scalar'."
                if needs.scores
                else "the policy is a sequence classifier, and the algorithm needs a language model: head='lm'."
            )
        self.policy = policy
        self.critic = critic
        self.autocast = _AUTOCAST[autocast]
        self.reference = reference
        if needs.reference_logprobs and reference is None:
            self.reference = _at_start(policy)
        if self.reference is not None:
            self.reference.model.eval()
        self.eval()  # PEFT makes its layers in training mode, and rollouts come before the first update

    def drop_reference(self) -> None:
        """Free a reference that is a model of its own; from here on its log-probabilities can't be asked."""
        if self.reference is not None and self.reference.model is not self.policy.model:
            self.reference = None

    def forward(self, rows: Sequence[Row], needs: Needs | None = None) -> Forward:
        """The training forward of a micro-batch: what `needs` asks for, with gradients."""
        needs = needs or Needs()
        passes = _Passes(Batch.of(rows, self.policy.device), self.autocast)
        empty = torch.zeros(0, device=self.policy.device)
        logprobs, entropies = empty, None
        if needs.logprobs:
            logprobs, entropies = passes.logprobs(self.policy, entropy=needs.entropies, grad=needs.entropy_grad)
        scores = passes.scalars(self.policy, scalar_head(self.policy.model))[1] if needs.scores else None
        values = self._values(passes)[0] if needs.values else None
        return Forward(logprobs, entropies, values, scores)

    def _values(self, passes: _Passes) -> tuple[Tensor, Tensor]:
        assert self.critic is not None
        return passes.scalars(self.critic.policy, self.critic.head, detach=self.critic.detach)

    @torch.no_grad()
    def score(self, batches: Sequence[Sequence[Row]], needs: Needs) -> None:
        """Fill the rows' old and reference log-probabilities, values and bootstrap, as asked; in eval mode.

        The batches should be those of the first update, so that its ratios start at exactly 1.
        """
        if not (needs.old_logprobs or needs.reference_logprobs or needs.values):
            return
        modes = [(model, model.training) for model in self._learners()]
        self.eval()
        for rows in batches:
            passes = _Passes(Batch.of(rows, self.policy.device), self.autocast)
            if needs.old_logprobs:
                _fill(rows, "old_logprobs", passes.logprobs(self.policy, entropy=False)[0])
            if needs.reference_logprobs:
                if self.reference is None:
                    raise ModelError("reference log-probabilities are asked for, and these models keep no reference.")
                _fill(rows, "reference_logprobs", passes.logprobs(self.reference, entropy=False)[0])
            if needs.values:
                values, last = self._values(passes)
                _fill(rows, "values", values)
                for row, value in zip(rows, last.tolist(), strict=True):
                    row.bootstrap = value
        for model, mode in modes:
            model.train(mode)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by group: policy, head (its scalar head), critic, critic_head. No group is empty."""
        policy = self.policy
        groups = {"policy": policy.trunk_parameters()}
        if is_classifier(policy.model):
            groups["head"] = [p for p in scalar_head(policy.model).parameters() if p.requires_grad]
        if self.critic is not None:
            groups["critic"] = self.critic.trunk_parameters()
            groups["critic_head"] = list(self.critic.head.parameters())
        return {name: parameters for name, parameters in groups.items() if parameters}

    def train(self) -> None:
        """Dropout on, for what learns."""
        for model in self._learners():
            model.train()

    def eval(self) -> None:
        """Dropout off."""
        for model in self._learners():
            model.eval()

    def _learners(self) -> list[nn.Module]:
        models = [self.policy.model]
        if self.critic is not None and self.critic.policy.model is not self.policy.model:
            models.append(self.critic.policy.model)
        return models


@dataclass
class _Passes:
    """Forwards over one batch; a trunk runs once for each adapter of each model, whatever is read from it."""

    batch: Batch
    autocast: torch.dtype | None
    _hidden: dict[tuple[int, str | None], Hidden] = field(default_factory=dict)

    def hidden(self, policy: Policy) -> Hidden:
        """The trunk's last hidden states in this policy's role."""
        key = (id(policy.model), policy.role)
        if key not in self._hidden:
            with role(policy.role), mixed_precision(policy.device, self.autocast):
                self._hidden[key] = Hidden.of(policy.model, self.batch)
        return self._hidden[key]

    def logprobs(self, policy: Policy, *, entropy: bool, grad: bool = False) -> tuple[Tensor, Tensor | None]:
        hidden = self.hidden(policy)
        with role(policy.role), mixed_precision(policy.device, self.autocast):
            return token_scores(policy.model, hidden, entropy=entropy, entropy_grad=grad)

    def scalars(self, policy: Policy, head: nn.Module, *, detach: bool = False) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(policy)
        return (hidden.detach() if detach else hidden).scalars(head)


def _fill(rows: Sequence[Row], name: str, packed: Tensor) -> None:
    parts = packed.float().cpu().split([row.scored for row in rows])
    for row, part in zip(rows, parts, strict=True):
        setattr(row, name, np.asarray(part.numpy()))


def reference_on(policy: Policy, start: Path) -> Policy | None:
    """The adapter at `start` (a run, checkpoint or adapter) frozen beside the policy's, or None where it has another
    base than the policy and needs a model of its own. Raises ModelError where there is nothing."""
    folder = find_adapter(expanded(start))
    if not (policy.has_lora and is_adapter(folder)):
        return None
    file = AdapterFile.read(folder)
    if file.base != policy.public_name or not file.shareable or file.is_classifier:
        return None
    add_adapter(policy.model, REFERENCE, file.config, seed=0)
    fill_adapter(policy.model, REFERENCE, file)
    for parameter in adapter_parameters(policy.model, REFERENCE):
        parameter.requires_grad_(False)
    return policy.view(REFERENCE)


def _at_start(policy: Policy) -> Policy:
    """The policy as it is at this moment, kept as cheaply as it allows."""
    if not policy.has_lora:
        return replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False))
    if policy.starts_at_base:
        return policy.view(BASE)
    copy_adapter(policy.model, POLICY, REFERENCE)
    return policy.view(REFERENCE)
