"""The critic: what a state is worth, from the policy's base or from a model of its own.

kind "adapter": an adapter of its own and a scalar head on the policy's frozen base; "head": a scalar head on the
policy's own hidden states, so one pass serves both; "model": a model of its own, with its own base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from sapwood.errors import ModelError
from sapwood.models.adapters import POLICY, AdapterFile, LoraSection, add_adapter, fill_adapter, lora_config
from sapwood.models.forward import causal_lm
from sapwood.models.load import (
    ModelChoice,
    ModelSection,
    Policy,
    called,
    find_adapter,
    is_adapter,
    known_name,
    load_policy,
    public_name,
    scalar_head,
    vocabulary_difference,
)
from sapwood.paths import expanded

#: PEFT's name of the critic's adapter.
CRITIC = "critic"


class CriticSection(Protocol):
    """The `critic` section of a recipe."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def name(self) -> str | None: ...  # noqa: D102
    @property
    def init_from(self) -> Path | None: ...  # noqa: D102
    @property
    def lora(self) -> LoraSection | None: ...  # noqa: D102
    @property
    def detach(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class CriticChoice:
    """A `critic` section made in code."""

    kind: str = "auto"
    name: str | None = None
    init_from: Path | None = None
    lora: LoraSection | None = None
    detach: bool = False


@dataclass(frozen=True)
class Critic:
    """Values of states. policy: whose trunk, under which adapter; head: [.., H] -> [.., 1] in fp32.

    detach: of kind "head", the value loss doesn't reach the policy's trunk.
    """

    kind: str
    policy: Policy
    head: nn.Module
    detach: bool = False

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that are the critic's alone, without its head."""
        return [] if self.kind == "head" else self.policy.trunk_parameters()

    def describe(self) -> str:
        """What it is and how much of it is trained, in words."""
        trained = sum(p.numel() for p in (*self.trunk_parameters(), *self.head.parameters()))
        what = {
            "adapter": "an adapter and a head on the policy's base",
            "head": "a head on the policy's hidden states" + (", detached" if self.detach else ""),
            "model": f"{type(causal_lm(self.policy.model)).__name__} of its own",
        }
        return f"{what[self.kind]}, {trained:,} parameters are trained"


def build_critic(policy: Policy, section: CriticSection | None, model: ModelSection, seed: int = 0) -> Critic:
    """The critic of a recipe's `critic` section; `model` is the policy's section, whose settings it inherits.

    Without a section, or of kind "auto", it is an adapter where the policy is one and a model of its own otherwise.
    Raises ModelError for a kind that the policy can't carry, or a model with another vocabulary.
    """
    section = section or CriticChoice()
    kind = _kind(policy, section)
    if kind == "head":
        return Critic(kind, policy, value_head(policy), section.detach)
    if kind == "adapter":
        return _adapter_critic(policy, section, seed)
    return _own_model(policy, section, model, seed)


def _kind(policy: Policy, section: CriticSection) -> str:
    if section.kind == "adapter" and not policy.has_lora:
        raise ModelError(
            "critic.kind: adapter needs a frozen base to share, but the policy trains all of its weights; use "
            "critic.kind: model or head, or give model.lora."
        )
    if section.kind != "auto":
        return section.kind
    if section.name is not None or not policy.has_lora:
        return "model"
    if section.init_from is not None:
        start = _start(section.init_from)
        return "adapter" if is_adapter(start) and AdapterFile.read(start).base == policy.public_name else "model"
    return "adapter"


def value_head(policy: Policy) -> nn.Linear:
    """A scalar head [H] -> [1] at zero, in fp32.

    At zero the first advantages are the rewards to come, not noise of a random head; the head moves with the first
    update, and the trunk below it from the second on, in a direction that means something.
    """
    weight = causal_lm(policy.model).get_input_embeddings().weight
    config = causal_lm(policy.model).config.get_text_config()
    head = nn.Linear(config.hidden_size, 1, bias=False, device=weight.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    return head


def _adapter_critic(policy: Policy, section: CriticSection, seed: int) -> Critic:
    file = None
    if section.init_from is not None:
        start = _start(section.init_from)
        if not is_adapter(start):
            raise ModelError(f"critic.init_from: {start} is a whole model, not an adapter; set critic.kind: model.")
        file = AdapterFile.read(start)
        if file.base != policy.public_name:
            raise ModelError(
                f"critic.init_from: {start} is an adapter of {file.base}, and the policy's base is "
                f"{policy.public_name}; set critic.kind: model."
            )
        _check_no_lora(section, start)
    config = policy.model.peft_config[POLICY]
    if file is not None:
        config = file.config
    elif section.lora is not None:
        config = lora_config(section.lora)
    # Another draw than the policy's, which used the seed itself.
    add_adapter(policy.model, CRITIC, config, seed + 1)
    head = value_head(policy)
    if file is not None:
        fill_adapter(policy.model, CRITIC, file)
        if file.head is not None:
            head.weight.data.copy_(file.head)
    return Critic("adapter", policy.view(CRITIC), head)


def _start(init_from: Path) -> Path:
    with called("critic.name", "critic.init_from"):
        return find_adapter(expanded(init_from), CRITIC)


def _check_no_lora(section: CriticSection, start: Path) -> None:
    if section.lora is not None:
        raise ModelError(
            f"critic.lora has no effect: critic.init_from goes on with the adapter {start}, which has a rank of its "
            "own; remove critic.lora."
        )


def _own_model(policy: Policy, section: CriticSection, model: ModelSection, seed: int) -> Critic:
    lora = section.lora or model.lora
    name, init_from, role = section.name or model.name, section.init_from, CRITIC
    if init_from is not None and is_adapter(start := _start(init_from)):
        _check_no_lora(section, start)
        if section.name is None:
            name = known_name(AdapterFile.read(start).base)
    if section.name is None and init_from is None:
        init_from, role = model.init_from, "policy"  # what the policy starts from
    choice = ModelChoice.like(model, name=name, init_from=init_from, lora=lora)
    option = "critic.name" if section.name is not None or section.init_from is None else "critic.init_from"
    with called(option, "critic.init_from"):
        own = load_policy(choice, seed + 1, head="scalar", role=role)
    check_vocabulary(option, name, own.tokenizer, policy)
    head = scalar_head(own.model)
    if not own.trained_head:
        nn.init.zeros_(next(head.parameters()))
    return Critic("model", own, head)


def check_vocabulary(option: str, name: str, tokenizer: object, policy: Policy) -> None:
    """Raises ModelError where another model doesn't read the policy's tokens as the policy does."""
    difference = vocabulary_difference(tokenizer, policy.tokenizer)
    if difference is not None:
        raise ModelError(
            f"{option}: {public_name(name)} has another vocabulary than the policy ({difference}), so it can't read "
            "the policy's tokens; choose a model of the policy's family."
        )
