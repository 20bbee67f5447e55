"""Going on with a run: from which checkpoint, and with which recipe.

A run goes on bit for bit where its recipe is the same. Options that a run can take up at any step may change, and what
that means is said; those that its state rests on may not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from sapwood import checkpoint
from sapwood.config import Recipe
from sapwood.environment import PACKAGES, version
from sapwood.errors import ConfigError, SapwoodError, StorageError, printable
from sapwood.memory import is_out_of_memory
from sapwood.models.load import Policy, is_classifier, load_classifier, load_model
from sapwood.models.roles import Models
from sapwood.ops.schedules import learning_rate

#: Options that the state of a run rests on, as sections or single keys, and why they can't change.
FIXED: dict[str, str] = {
    "run.seed": "it decides which tasks and samples come next",
    "model": "the weights and the optimiser's state are of this model",
    "reference": "the policy is held to it from the first step on",
    "critic": "its weights and the optimiser's state are of this critic",
    "env": "tasks are drawn from it",
    "data": "the place in it would be another",
    "algorithm.name": "its state is another",
    "optim.name": "its state is another",
}
#: Keys below FIXED sections that change no state.
FREE = frozenset({"model.device", "model.device_map", "model.cache_dir", "model.gradient_checkpointing", "model.tree"})


@dataclass(frozen=True)
class Start:
    """Where a run goes on. step: updates made (0: from the beginning); pending: the evaluation after them isn't.

    folder, state: of the checkpoint; aside: later ones exist and are set aside; notes: for the user; before: the
    recipe that the run had.
    """

    step: int = 0
    pending: bool = False
    folder: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    aside: bool = False
    notes: tuple[str, ...] = ()
    before: Recipe | None = None


def find(run_dir: Path, path: Path | None = None) -> Start:
    """The newest good checkpoint of a run, or the one at `path`; the beginning where there is none.

    Damaged ones are passed over with a note. Raises StorageError where there is no such run, or `path` is no
    checkpoint to go on from.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise StorageError(f"{run_dir}: there is no run to resume, it has no recipe.yaml; start it without --resume.")
    if path is not None:
        return _start(_named(run_dir, path), run_dir, [])
    notes = []
    for known in reversed(checkpoint.found(run_dir, verify=False)):
        each = checkpoint.read(known.path)  # the newest good one is hashed, not those before it
        if each.problem is not None:
            notes.append(f"checkpoint {each.path} is skipped: {each.problem}")
        elif not each.resumable:
            notes.append(f"checkpoint {each.path} is skipped: it has no {checkpoint.STATE}")
        else:
            try:
                return _start(each, run_dir, notes)
            except StorageError as error:
                notes.append(f"checkpoint {each.path} is skipped: {error}")
    return Start(notes=(*notes, "no checkpoint to go on from: the run starts from the beginning"))


def _named(run_dir: Path, path: Path) -> checkpoint.Checkpoint:
    if path.name == "policy":
        path = path.parent
    if os.path.realpath(path.parent) != os.path.realpath(run_dir / "checkpoints"):
        raise StorageError(f"--resume: {path} is no checkpoint of {run_dir}; they are in {run_dir / 'checkpoints'}.")
    if not path.is_dir():
        known = ", ".join(each.path.name for each in checkpoint.found(run_dir, verify=False)) or "none"
        raise StorageError(f"--resume: there is no checkpoint {path}; there are: {known}.")
    each = checkpoint.read(path)
    if each.problem is not None or not each.resumable:
        problem = each.problem or f"it has no {checkpoint.STATE}"
        raise StorageError(f"--resume: {path} can't be used, {problem}; leave the path out for the newest good one.")
    return each


def _start(each: checkpoint.Checkpoint, run_dir: Path, notes: list[str]) -> Start:
    state = checkpoint.load_state(each.path)
    _check_state(state, each)
    later = [c for c in checkpoint.found(run_dir, verify=False) if c.step > each.step and c.problem is None]
    return Start(int(state["step"]), state["pending"] is not None, each.path, state, bool(later), tuple(notes))


#: What a run goes on from, by its type.
_STATE: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "pending": (list, NoneType),
    "finished": (str, NoneType),
    "metrics": (dict,),
    "first_weights": (str,),
    "parameters": (dict,),
    "stepper": (dict,),
    "watchers": (dict,),
    "learner": (dict,),
    "guards": (dict,),
    "algorithm": (dict,),
    "source": (dict,),
    "evaluations": (dict,),
    "engine": (dict,),
}


def _check_state(state: Mapping[str, Any], each: checkpoint.Checkpoint) -> None:
    """Raises StorageError for a training state that isn't a run's of this step."""
    wrong = next((name for name, types in _STATE.items() if not isinstance(state.get(name, ()), types)), None)
    path = each.path / checkpoint.STATE
    if wrong is not None or "tasks" not in state:
        raise StorageError(
            f"{path}: isn't a run's training state ({wrong or 'tasks'}); resume from another checkpoint."
        )
    if state["step"] != each.step:
        raise StorageError(f"{path}: is of step {state['step']}, in the checkpoint of step {each.step}; use another.")


@contextlib.contextmanager
def restoring(folder: Path | None) -> Iterator[None]:
    """Turn what a training state of another shape makes of the loading below into a StorageError."""
    try:
        yield
    except SapwoodError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, OverflowError) as error:
        if is_out_of_memory(error):
            raise
        first = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise StorageError(
            f"{folder}: its training state doesn't fit this run ({type(error).__name__}: {first}); resume from another "
            "checkpoint."
        ) from error


# --- recipes -----------------------------------------------------------------------------------------------------


def check_recipe(before: Recipe, after: Recipe, done: int) -> list[str]:
    """What differs between a run's recipe and the one to go on with, in words.

    Raises ConfigError, naming every one, for options that can't change, and for fewer steps than were made.
    """
    old, new = (_flat(recipe.model_dump(mode="json")) for recipe in (before, after))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    refused = [(key, reason) for key in changed if (reason := _fixed(key, after)) is not None]
    if refused:
        told = "; ".join(
            f"{key} was {_show(old.get(key))} and is {_show(new.get(key))} ({why})" for key, why in refused
        )
        raise ConfigError(
            f"{before.run.dir} can't be resumed with this recipe: {told}. Resume with the run's own values, or start "
            "another run from it with model.init_from."
        )
    if after.run.steps is not None and after.run.steps < done:
        raise ConfigError(f"run.steps is {after.run.steps}, and {before.run.dir} has made {done} steps; give more.")
    return [f"changed: {key} was {_show(old.get(key))} and is {_show(new.get(key))}" for key in changed]


def schedule_note(before: Recipe, after: Recipe, steps: tuple[int, int], done: int) -> str | None:
    """What more or fewer steps do to the learning rate; steps: of the run before and of the one that goes on."""
    optim = after.optim
    if steps[0] == steps[1] or optim.schedule in ("constant", "plateau") or done >= steps[1]:
        return None
    rates = [
        learning_rate(
            min(done + 1, total),
            peak=section.learning_rate,
            schedule=section.schedule if section.schedule in ("linear", "cosine") else "constant",
            warmup=section.warmup_steps,
            total=total,
            minimum=section.min_learning_rate,
        )
        for section, total in ((before.optim, steps[0]), (optim, steps[1]))
    ]
    return (
        f"the {optim.schedule} schedule spans {steps[1]} steps in place of {steps[0]}: the learning rate of step "
        f"{done + 1} is {rates[1]:.3g}" + (f" in place of {rates[0]:.3g}" if done < steps[0] else "")
    )


def environment_notes(path: Path) -> list[str]:
    """`version_notes` of an environment.json, or that it can't be read; none where there is none."""
    if not path.is_file():
        return []
    try:
        return version_notes(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return [f"{path}: can't be read, so it isn't known whether the run began with these versions"]


def version_notes(environment: Mapping[str, Any]) -> list[str]:
    """Packages whose versions aren't those that the run began with: its numbers may differ in their last bits."""
    began = {"sapwood": environment.get("sapwood"), **dict(environment.get("packages") or {})}
    known = [(name, str(began[name]), str(version(name))) for name in ("sapwood", *PACKAGES) if name in began]
    differ = [f"{name} {printable(old, 60)} -> {new}" for name, old, new in known if old != new]
    return [f"other versions than the run began with, so results may differ: {', '.join(differ)}"] if differ else []


def _fixed(key: str, recipe: Recipe) -> str | None:
    if key in FREE:
        return None
    if recipe.data is not None and key in ("optim.batch_size", "optim.gradient_accumulation"):
        return "the place in the data would be another"
    return next(
        (why for fixed, why in FIXED.items() if key == fixed or key.startswith((f"{fixed}.", f"{fixed}["))), None
    )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{key}.{name}" if key else name).items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{key}[{i}]").items()}
    return {key: value}


def _show(value: Any) -> str:
    return "not set" if value is None else str(value)


# --- weights -----------------------------------------------------------------------------------------------------


def trained(models: Models) -> dict[str, list[Any]]:
    """What is trained and isn't a whole model, by parameter group: adapters and scalar heads."""
    critic = models.critic
    whole = set() if models.policy.has_lora else {"policy"}
    if critic is not None and not critic.policy.has_lora:
        whole.add("critic")
    return {name: list(group) for name, group in models.parameter_groups().items() if name not in whole}


def load_weights(models: Models, folder: Path, state: Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into freshly built models. Raises StorageError where they don't fit."""
    kept, own = state["parameters"], trained(models)
    if {name: [tuple(p.shape) for p in group] for name, group in own.items()} != {
        name: [tuple(p.shape) for p in group] for name, group in kept.items()
    }:
        raise StorageError(f"{folder}: its weights aren't of this recipe's models; resume with the recipe of its run.")
    for name, group in own.items():
        for parameter, tensor in zip(group, kept[name], strict=True):
            parameter.data.copy_(tensor)
    if not models.policy.has_lora:
        _load_whole(models.policy, folder / "policy")
    critic = models.critic
    if critic is not None and critic.kind == "model" and not critic.policy.has_lora:
        _load_whole(critic.policy, folder / "critic")


def _load_whole(policy: Policy, folder: Path) -> None:
    """By transformers' own reading, which knows how a model's weights are named in files."""
    dtype = next(p.dtype for p in policy.model.parameters())
    where = (policy.device, dtype, "none", False)
    stored = load_classifier(str(folder), *where)[0] if is_classifier(policy.model) else load_model(str(folder), *where)
    policy.model.load_state_dict(stored.state_dict())


def fingerprint(models: Models) -> str:
    """SHA-256 of everything trainable: of a run's first weights, it tells whether they could be made again."""
    digest = hashlib.sha256()
    for group in models.parameter_groups().values():
        for parameter in group:
            flat = parameter.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
