"""Checkpoints: whole or not there.

    checkpoints/step_000500/{policy/, critic/, training_state.pt, recipe.yaml, manifest.json}

A checkpoint is written beside its place, synced, listed in a manifest with the SHA-256 of every file and then renamed,
so that a reader never sees half of one and a damaged one is known. `policy/` opens with transformers or PEFT as it is.
A `Snapshot` is a copy of everything that is trained, so that a `Writer` may write it while training goes on.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sapwood.errors import StorageError, printable
from sapwood.models.adapters import write_classifier
from sapwood.models.forward import causal_lm
from sapwood.models.load import Policy, is_classifier, quiet_transformers, scalar_head, set_pad_token
from sapwood.models.roles import Critic, Models
from sapwood.paths import FULL

FORMAT = 1
STATE, MANIFEST = "training_state.pt", "manifest.json"

#: Called with a path when the disk is full: returns to try again, or raises.
WhenFull = Callable[[Path], None]


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. weights: copies of the policy's and the critic's state by name; state: what else a run goes
    on from; metrics: of the step, for whoever lists checkpoints; recipe: as YAML."""

    step: int
    policy: Policy
    critic: Critic | None
    weights: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: str | None = None


def snapshot(
    models: Models | Policy,
    step: int,
    state: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    recipe: str | None = None,
) -> Snapshot:
    """Copy what is trained. `state` is copied too, its tensors to the CPU."""
    policy, critic = (models.policy, models.critic) if isinstance(models, Models) else (models, None)
    weights = {"policy": _weights(policy, scalar_head(policy.model) if is_classifier(policy.model) else None)}
    if critic is not None:
        weights["critic"] = _weights(critic.policy, critic.head) if critic.kind != "head" else _head(critic.head)
    return Snapshot(step, policy, critic, weights, copied(state) if state is not None else None, metrics or {}, recipe)


def _weights(policy: Policy, head: nn.Module | None) -> dict[str, Tensor]:
    """The tensors that a folder of this policy needs: an adapter's, or all of a model's; shared ones stay shared."""
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in policy.model.state_dict().items():
        if policy.has_lora and policy.adapter not in name.split("."):
            continue
        if not isinstance(tensor, Tensor):
            continue  # bitsandbytes keeps names in a state
        key = tensor.data_ptr()
        if key not in known or known[key].shape != tensor.shape:
            known[key] = tensor.detach().to("cpu", copy=True)
        found[name] = known[key]
    return found | (_head(head) if head is not None else {})


def _head(head: nn.Module) -> dict[str, Tensor]:
    return {_HEAD: next(head.parameters()).detach().to("cpu", copy=True)}


_HEAD = "sapwood.head"


def copied(value: Any) -> Any:
    """A deep copy of plain data and tensors, the latter on the CPU. Raises StorageError for anything else."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise StorageError(
        f"a {type(value).__name__} can't be kept in a checkpoint: the state() of an algorithm, environment or reward "
        "must give plain data and tensors."
    )


def save(what: Models | Policy, run_dir: Path, step: int, keep: int) -> Path:
    """Write checkpoints/step_NNNNNN/ with policy/, and critic/ where there is one; drop all but the newest `keep`.

    Returns the policy's folder. Raises StorageError where the disk is full or not writable; earlier checkpoints are
    untouched.
    """
    folder = write(snapshot(what, step), run_dir)
    prune(run_dir, keep)
    return folder / "policy"


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def write(snap: Snapshot, run_dir: Path, when_full: WhenFull | None = None) -> Path:
    """Write a snapshot; returns its folder. Raises StorageError; earlier checkpoints are untouched.

    when_full: called where the disk is full, to wait for space.
    """
    target = folder_of(run_dir, snap.step)
    root = target.parent
    scratch, old = root / f".{target.name}.partial", root / f".{target.name}.old"
    while True:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            fill(snap, scratch)
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            scratch.rename(target)
            _sync(root)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if when_full is not None and error.errno in FULL:
                when_full(target)
                continue
            raise StorageError(
                f"can't write the checkpoint {target} ({error.strerror or error}); free some space or choose another "
                "run.dir. Earlier checkpoints, metrics and samples are whole."
            ) from error
        return target


def fill(snap: Snapshot, folder: Path) -> None:
    """Write a snapshot into a folder that is there, and a manifest of all files in it. Raises OSError."""
    (folder / "policy").mkdir()
    save_policy(snap.policy, folder / "policy", snap.weights["policy"])
    if snap.critic is not None:
        (folder / "critic").mkdir()
        save_critic(snap.critic, folder / "critic", snap.weights["critic"])
    if snap.recipe is not None:
        (folder / "recipe.yaml").write_text(snap.recipe, "utf-8")
    if snap.state is not None:
        torch.save({"format": FORMAT, **snap.state}, folder / STATE)
    files = {}
    for path in sorted(folder.rglob("*")):
        _sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    told = {name: value for name, value in snap.metrics.items() if isinstance(value, int | float) and value == value}
    manifest = {
        "format": FORMAT,
        "step": snap.step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": told,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", "utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """One that is on disk. problem: what is wrong with it, or None; time: when it was written; metrics: of its step."""

    path: Path
    step: int
    bytes: int = 0
    time: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether a run can go on from it: whole, and with its training state."""
        return self.problem is None and (self.path / STATE).is_file()


def read(folder: Path, *, verify: bool = True) -> Checkpoint:
    """A checkpoint's facts. verify: hash every file; otherwise only presence and sizes are compared."""
    step = _step_of(folder)
    if not (folder / MANIFEST).is_file():
        return Checkpoint(folder, step, problem="it has no manifest.json")
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = {str(name): (str(f["sha256"]), _size(f["bytes"])) for name, f in manifest["files"].items()}
        metrics = {str(name): float(value) for name, value in manifest["metrics"].items()}
        facts = {"time": str(manifest["time"]), "metrics": metrics, "bytes": sum(n for _, n in files.values())}
        known = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return Checkpoint(folder, step, problem="its manifest.json can't be read")
    if known > FORMAT:
        return Checkpoint(folder, step, **facts, problem=f"a later version of Sapwood wrote it (format {known})")
    return Checkpoint(folder, step, **facts, problem=_fault(folder, files, verify=verify))


def _size(value: Any) -> int:
    size = int(value)
    if not 0 <= size < 2**60:
        raise ValueError("no size of a file")
    return size


def _fault(folder: Path, files: Mapping[str, tuple[str, int]], *, verify: bool) -> str | None:
    for name, (digest, size) in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"its manifest.json names {printable(repr(name))}, which isn't in its folder"
        if not os.path.isfile(path):  # False for a name that no file can have
            return f"{printable(name)} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes in place of {size:,}"
        try:
            if verify and _sha256(path) != digest:
                return f"{name} is damaged (its SHA-256 differs from the manifest's)"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def _step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def found(run_dir: Path, *, verify: bool = True) -> list[Checkpoint]:
    """All checkpoints of a run, oldest first."""
    folders = [f for f in (run_dir / "checkpoints").glob("step_*") if f.is_dir()]
    return [read(folder, verify=verify) for folder in sorted(folders, key=_step_of)]


#: What torch.load raises for bytes that are no state: found by giving it three thousand that aren't.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)


def load_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint. Raises StorageError where it can't be read."""
    path = folder / STATE
    if not path.is_file():
        raise StorageError(f"{path}: isn't there; resume from another checkpoint.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        first = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise StorageError(f"{path}: can't be read as a training state ({first}); resume from another one.") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise StorageError(f"{path}: isn't a training state of Sapwood's; resume from another checkpoint.")
    return state


def prune(run_dir: Path, keep: int, best: str | None = None, higher: bool = True) -> list[Path]:
    """Remove all but the newest `keep`, and the best by a metric; damaged ones count for nothing. Returns the removed.

    Sizes are compared with the manifests, contents are not read.
    """
    present = found(run_dir, verify=False)
    whole = [each for each in present if each.problem is None]
    kept = {each.path for each in whole[-keep:]}
    champion = best_of(whole, best, higher) if best is not None else None
    if champion is not None:
        kept.add(champion.path)
    removed = [each.path for each in present if each.path not in kept]
    if not whole:
        return []
    for path in removed:
        with contextlib.suppress(OSError):
            discard(path)
    return removed


def discard(path: Path) -> None:
    """Remove a checkpoint; of a link, the link and not what it leads to. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def best_of(checkpoints: Sequence[Checkpoint], metric: str, higher: bool) -> Checkpoint | None:
    """The one with the best value of a metric, the earliest of equals; None where none has it."""
    having = [each for each in checkpoints if each.problem is None and metric in each.metrics]
    return max(having, key=lambda c: (c.metrics[metric] if higher else -c.metrics[metric], -c.step), default=None)


class Writer:
    """Writes snapshots one after another, in a thread while training goes on or at once; a context manager.

    keep, best, higher: what `prune` leaves; stalled: seconds that training has waited for it.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        best: str | None = None,
        higher: bool = True,
        *,
        background: bool = True,
        when_full: WhenFull | None = None,
    ) -> None:
        self.run_dir, self.keep, self.best, self.higher = run_dir, keep, best, higher
        self.when_full = when_full
        self.stalled = 0.0
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[Path] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def submit(self, take: Callable[[], Snapshot]) -> None:
        """Take a snapshot and write it. Waits for the one before; raises StorageError if that one failed."""
        began = time.perf_counter()
        self._await()
        snap = take()
        if self._pool is not None:
            self._pending = self._pool.submit(self._write, snap)
        else:
            self._write(snap)
        self.stalled += time.perf_counter() - began

    def wait(self) -> None:
        """Until everything is on disk. Raises StorageError where it couldn't be written."""
        began = time.perf_counter()
        self._await()
        self.stalled += time.perf_counter() - began

    def _await(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, snap: Snapshot) -> Path:
        folder = write(snap, self.run_dir, self.when_full)
        prune(self.run_dir, self.keep, self.best, self.higher)
        return folder


# --- models as folders -------------------------------------------------------------------------------------------


def save_policy(policy: Policy, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Adapter or model, and tokenizer, in the formats of PEFT and transformers; of a scalar head too.

    weights: those of a snapshot; the policy's own of this moment unless given.
    """
    scalar = is_classifier(policy.model)
    weights = weights or _weights(policy, scalar_head(policy.model) if scalar else None)
    named = {name: tensor for name, tensor in weights.items() if name != _HEAD}
    if policy.has_lora and scalar:
        write_classifier(policy.model, policy.adapter, weights[_HEAD], folder, policy.public_name, named)
    elif policy.has_lora:
        # The adapters of other roles are theirs to save.
        policy.model.save_pretrained(str(folder), selected_adapters=[policy.adapter], state_dict=named)
    else:
        with quiet_transformers():
            policy.model.save_pretrained(str(folder), state_dict=named)
    policy.tokenizer.save_pretrained(str(folder))
    card = folder / "README.md"
    if card.is_file():
        card.unlink()  # PEFT's model card template, all placeholders
    _public(policy, folder)


def save_critic(critic: Critic, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """A critic that is an adapter or a model opens as a sequence classifier; one that is a head is that head alone."""
    if critic.kind == "model":
        save_policy(critic.policy, folder, weights)
    elif critic.kind == "adapter":
        policy = critic.policy
        named = {name: tensor for name, tensor in weights.items() if name != _HEAD}
        write_classifier(policy.model, policy.adapter, weights[_HEAD], folder, policy.public_name, named)
        _write_padded_tokenizer(policy, folder)
        _public(policy, folder)
    else:
        save_file({"score.weight": weights[_HEAD]}, folder / "head.safetensors")


def _write_padded_tokenizer(policy: Policy, folder: Path) -> None:
    """The policy's tokenizer with a pad token that ends no row, as a classifier needs it."""
    tokenizer = copy.deepcopy(policy.tokenizer)
    set_pad_token(tokenizer, copy.deepcopy(causal_lm(policy.model).config))
    tokenizer.save_pretrained(str(folder))


def _public(policy: Policy, folder: Path) -> None:
    """Name the base by its public name, never by a path of this machine, and attention by a name others know."""
    for name in ("adapter_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        if name == "adapter_config.json":
            content["base_model_name_or_path"] = policy.public_name
            if isinstance(content.get("target_modules"), list):  # PEFT keeps a set, whose order differs by process
                content["target_modules"] = sorted(content["target_modules"])
        content.pop("_attn_implementation", None)
        content.pop("_name_or_path", None)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _sync(path: Path) -> None:
    flags = os.O_RDONLY | (getattr(os, "O_DIRECTORY", 0) if path.is_dir() else 0)
    if path.is_dir() and os.name == "nt":
        return  # Windows can't open a folder to sync it
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(policy: Policy) -> str:
    """Trainable and total parameters in words."""
    trainable, total = policy.counts()
    kind = type(causal_lm(policy.model)).__name__
    return f"{kind}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})"
