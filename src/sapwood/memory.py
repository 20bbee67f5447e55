"""Running out of memory where that can be caught: a GPU's, or a process's own limit (ulimit -v, a container's rlimit).

The loop halves its token budget and computes the update again, with the weights that it began with:

    retry(compute, lambda: log.note(budget.halve(micros)))

The kernel's killer can't be caught: what protects from it is a plan that fits.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch

from sapwood.errors import BudgetError
from sapwood.models.products import memory_limited
from sapwood.tree.trie import distinct_tokens
from sapwood.types import Row

T = TypeVar("T")

#: How allocators that have no exception of their own say it (lower case).
_SENTENCES = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # torch on a CPU
    "cannot allocate memory",  # the system's ENOMEM, mmap
    "not enough memory",  # torch on Windows
    "bad_alloc",  # C++
    "alloc_failed",  # cuBLAS and cuDNN
    "failed to allocate",
    "failed to map segment",  # a library that is loaded late
)
#: oneDNN's, which says the same of a product that it can't do: believed where the process has a limit.
_ONEDNN = ("could not create a primitive", "could not execute a primitive", "could not create a memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or the one that it was raised from, says that memory ran out."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(current, OSError) and current.errno == errno.ENOMEM:
            return True
        if isinstance(current, RuntimeError | ImportError) and _says_so(str(current).lower()):
            return True
        current = current.__cause__
    return False


def _says_so(message: str) -> bool:
    known = (*_SENTENCES, *_ONEDNN) if memory_limited() else _SENTENCES
    return any(sentence in message for sentence in known)


def retry(attempt: Callable[[], T], make_room: Callable[[], object]) -> T:
    """What `attempt` returns; where memory runs out, once more after `make_room`, which raises when there is no more.

    An attempt must leave nothing behind that the next one would count twice (gradients, sums): it, or make_room,
    clears them.
    """
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release(error)
        # Outside of `except`, where nothing holds the failed attempt any more.
        make_room()


def release(error: BaseException) -> None:
    """Free what a failed computation still holds: tensors of the error's frames, cycles, caches of the allocators."""
    current: BaseException | None = error
    while current is not None:
        traceback.clear_frames(current.__traceback__)
        current = current.__cause__ or current.__context__
    del current
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache
def _malloc_trim() -> Any:
    """glibc's function that gives freed memory back; other C libraries have none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


@dataclass
class Budget:
    """The token budget of a run: what the recipe asks for, halved where memory ran out.

    asked: optim.token_budget; tokens: what holds; halvings: how often it was halved.
    """

    asked: int
    tokens: int = field(init=False)
    halvings: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = self.asked

    def halve(self, micros: Sequence[Sequence[Row]], *, atomic: bool = False) -> str:
        """Halve what the largest of these micro-batches held, as far as every row still fits; a sentence for the log.

        micros: those that were computed when memory ran out; atomic: the rows of a group can't be parted. Raises
        BudgetError, with what to change, where they are as small as they get.
        """
        costs = [distinct_tokens([row.token_ids for row in micro]) for micro in micros]
        largest, least = max(costs, default=0), largest_unit(micros, atomic=atomic)
        if largest <= least:
            unit = "pair" if atomic else "row"
            raise BudgetError(
                f"memory ran out in a micro-batch of one {unit} of {largest:,} tokens, which can't be split; set "
                "model.gradient_checkpointing=true, shorten prompts or replies (data.max_length, "
                "engine.max_new_tokens), quantise the base (model.quantize) or choose a smaller model."
            )
        before, self.tokens = self.tokens, max(min(self.tokens, largest) // 2, least)
        self.halvings += 1
        return (
            f"memory ran out in a micro-batch of {largest:,} tokens: the token budget is {self.tokens:,} in place of "
            f"{before:,} from here on, and the update is computed again. Set optim.token_budget={self.tokens} for the "
            "next run: it changes no result, rounding apart."
        )

    def state(self) -> dict[str, int]:
        """What a resumed run takes up."""
        return {"asked": self.asked, "tokens": self.tokens, "halvings": self.halvings}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Take up what `state` gave, unless the recipe asks for another budget by now."""
        if state["asked"] == self.asked:
            self.tokens, self.halvings = int(state["tokens"]), int(state["halvings"])


def largest_unit(micros: Sequence[Sequence[Row]], *, atomic: bool) -> int:
    """Distinct tokens of the largest row, or group of rows, that has to be computed at once."""
    if not atomic:
        return max((len(row.token_ids) for micro in micros for row in micro), default=0)
    groups: dict[int, list[Row]] = {}
    for micro in micros:
        for row in micro:
            groups.setdefault(row.group, []).append(row)
    return max((distinct_tokens([row.token_ids for row in rows]) for rows in groups.values()), default=0)


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state of every parameter before the first update, as its first step would.

    Otherwise that step, whose state takes two more copies of what is trained, may be the first to run out of memory,
    with some weights stepped and others not. Other optimisers are left alone. Raises BudgetError where it doesn't fit.
    """
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
        return
    try:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state or not parameter.requires_grad:
                    continue
                # Not one by one, so that no state is there in part.
                state |= {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BudgetError(
            f"the optimiser's state, two copies of what is trained, doesn't fit in memory; {_SMALLER}"
        ) from error


def probe(optimizer: torch.optim.Optimizer) -> None:
    """Take, and give back, as much memory as a step of the optimiser needs on its way; call it right before the step.

    A step that runs out half-way leaves some weights stepped and others not, which nothing can undo; here it runs out
    before any is touched. On a CPU a step goes parameter by parameter and holds two copies of one; on a GPU it goes
    over lists of them and holds a copy of all. Raises BudgetError where there isn't so much.
    """
    needed: dict[torch.device, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            size, device = parameter.numel() * parameter.element_size(), parameter.device
            known = needed.get(device, 0)
            needed[device] = known + size if device.type == "cuda" else max(known, 2 * size)
    try:
        for device, size in needed.items():
            torch.empty(size, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BudgetError(
            f"memory ran out before the optimiser's step, so the weights are those of the step before; {_SMALLER}"
        ) from error


_SMALLER = (
    "train an adapter (model.lora) or a smaller one (model.lora.rank), use optim.name=adamw_8bit, or a smaller model."
)
