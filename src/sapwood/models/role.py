"""Which adapter a forward runs under: a context variable that every LoRA layer reads.

PEFT's own switch, `set_adapter`, is module state: it clears `requires_grad` of the other adapters, and a layer that is
recomputed in the backward pass (gradient checkpointing) would run under whatever was switched on last. A context
variable is read at the call, is captured for the recomputation, and leaves every parameter as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

#: The role without an adapter: the base alone.
BASE = ""
_ADAPTER: ContextVar[str | None] = ContextVar("sapwood_role", default=None)


@contextlib.contextmanager
def role(adapter: str | None) -> Iterator[None]:
    """Forwards inside run under this adapter: its PEFT name, BASE for none, None for the layers' own choice."""
    token = _ADAPTER.set(adapter)
    try:
        yield
    finally:
        _ADAPTER.reset(token)


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: nothing around the forward, its role around the recomputation."""
    return contextlib.nullcontext(), role(_ADAPTER.get())


class _ObeysRole:
    """Answers PEFT's two questions, which adapters and whether any, from the role where one is set."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters whose product is added."""
        chosen = _ADAPTER.get()
        return super().active_adapters if chosen is None else [chosen] if chosen else []  # type: ignore[misc]

    @property
    def disable_adapters(self) -> bool:
        """Whether the base runs alone."""
        chosen = _ADAPTER.get()
        return super().disable_adapters if chosen is None else chosen == BASE  # type: ignore[misc]


@lru_cache
def _obedient(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_ObeysRole, kind), {"__module__": kind.__module__})


def obey_roles(model: nn.Module) -> None:
    """Make every adapter layer of a PEFT model follow `role`, whatever its kind; idempotent."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module) and not isinstance(module, _ObeysRole):
            # Still PEFT's layer in every respect but these two answers.
            object.__setattr__(module, "__class__", _obedient(type(module)))
