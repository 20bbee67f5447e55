"""The optimiser step: parameter groups, learning-rate schedule, loss scaling and gradient clipping behind one class."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.errors import MissingExtra
from sapwood.ops.schedules import learning_rate
from sapwood.sections import OptimSection


@dataclass
class Plateau:
    """Lowers the learning rate where a metric stops improving. scale: what the rate is multiplied by."""

    metric: str
    higher_is_better: bool
    factor: float
    patience: int
    scale: float = 1.0
    best: float = math.nan
    waited: int = 0

    def see(self, value: float) -> None:
        """One measurement of the metric."""
        if improves(value, self.best, self.higher_is_better):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.scale, self.waited = self.scale * self.factor, 0


@dataclass
class EarlyStopping:
    """Says when a metric hasn't improved by more than min_delta for `patience` measurements."""

    metric: str
    higher_is_better: bool
    patience: int
    min_delta: float = 0.0
    best: float = math.nan
    waited: int = 0

    def see(self, value: float) -> bool:
        """One measurement of the metric; True to stop."""
        if improves(value, self.best, self.higher_is_better, self.min_delta):
            self.best, self.waited = value, 0
            return False
        self.waited += 1
        return self.waited >= self.patience


def counters(watcher: Plateau | EarlyStopping) -> dict[str, float]:
    """What a watcher has seen so far, to checkpoint."""
    return {name: getattr(watcher, name) for name in _COUNTERS if hasattr(watcher, name)}


def set_counters(watcher: Plateau | EarlyStopping, state: Mapping[str, float]) -> None:
    """Take up what `counters` gave."""
    for name in _COUNTERS:
        if name in state:
            setattr(watcher, name, type(getattr(watcher, name))(state[name]))


_COUNTERS = ("scale", "best", "waited")


def improves(value: float, best: float, higher_is_better: bool, min_delta: float = 0.0) -> bool:
    """Whether a value beats the best one so far (NaN: none yet) by more than min_delta."""
    if math.isnan(value):
        return False
    if math.isnan(best):
        return True
    return value > best + min_delta if higher_is_better else value < best - min_delta


def higher_is_better(metric: str) -> bool:
    """Losses, divergences and their like should fall; everything else is taken to be better the higher it is."""
    falling = ("loss", "perplexity", "kl", "gap", "grad_norm", "error", "nll")
    return not any(word in metric.rpartition("/")[2] for word in falling)


@dataclass
class Stepper:
    """AdamW over named parameter groups. `total`: the run's steps; loss_scaling: for float16 products."""

    section: OptimSection
    groups: Mapping[str, Sequence[nn.Parameter]]
    total: int
    loss_scaling: bool = False
    plateau: Plateau | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)  # pyright: ignore[reportPrivateImportUsage]

    def __post_init__(self) -> None:
        section = self.section
        named = {name: list(parameters) for name, parameters in self.groups.items() if len(parameters)}
        self._peaks = {name: self._peak(name) for name in named}
        groups = [{"params": named[name], "lr": self._peaks[name], "name": name} for name in named]
        options: dict[str, Any] = {
            "lr": section.learning_rate,
            "betas": section.betas,
            "eps": section.eps,
            "weight_decay": section.weight_decay,
        }
        self.optimizer = _optimizer_class(section.name)(groups, **options)
        device = next(iter(named.values()))[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.loss_scaling)  # pyright: ignore[reportPrivateImportUsage]

    def _peak(self, name: str) -> float:
        section = self.section
        if name.startswith("critic") and section.critic_learning_rate is not None:
            return section.critic_learning_rate
        if name.endswith("head") and section.head_learning_rate is not None:
            return section.head_learning_rate
        return section.learning_rate

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def schedule(self, step: int) -> float:
        """Set every group's learning rate for step 1..total; returns the policy's."""
        section = self.section
        peak = section.learning_rate
        rate = learning_rate(
            step,
            peak=peak,
            schedule="constant" if section.schedule == "plateau" else section.schedule,
            warmup=section.warmup_steps,
            total=self.total,
            minimum=section.min_learning_rate,
        )
        if self.plateau is not None:
            rate = max(rate * self.plateau.scale, min(rate, section.min_learning_rate))
        for group in self.optimizer.param_groups:
            group["lr"] = self._peaks[group["name"]] * rate / peak
        return rate

    def state(self) -> dict[str, Any]:
        """Moments and loss scale, to checkpoint; tensors are not copied."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; rates, decay and betas are those of the recipe, not those of the state.

        Raises ValueError where moments that are there already (`memory.prepare`) would be lost or get another shape.
        """
        shapes = {parameter: _shapes(kept) for parameter, kept in self.optimizer.state.items()}
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        if any(_shapes(self.optimizer.state[parameter]) != known for parameter, known in shapes.items()):
            raise ValueError("moments of the optimiser are missing, or of another shape than what they belong to")
        if self.loss_scaling and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss."""
        self.scaler.scale(loss).backward()

    def clip(self) -> dict[str, float]:
        """Clip to max_grad_norm over all groups together. Metrics: grad_norm before clipping, and the loss scale.

        Where a loss scale was too high the norm isn't finite; `step` then leaves the weights and lowers the scale.
        """
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.section.max_grad_norm))
        return {"grad_norm": norm, "loss_scale": self.scaler.get_scale()} if self.loss_scaling else {"grad_norm": norm}

    def skip(self) -> None:
        """Leave the weights as they are, after `clip`."""
        self.zero_grad()
        if self.loss_scaling:
            self.scaler.update()

    def step(self) -> None:
        """Apply the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def _optimizer_class(name: str) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize", "optim.name: adamw_8bit")
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit


def _shapes(kept: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """The shapes of an optimiser's tensors for one parameter."""
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in kept.items()}
