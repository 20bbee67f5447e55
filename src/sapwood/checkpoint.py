"""Checkpoints: whole or not there.

A checkpoint is written beside its place, synced and then renamed, so that a reader never sees half of one.
`policy/` opens with transformers or PEFT as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from sapwood.errors import StorageError
from sapwood.models.forward import causal_lm
from sapwood.models.load import Policy


def save(policy: Policy, run_dir: Path, step: int, keep: int) -> Path:
    """Write checkpoints/step_NNNNNN/policy/ and drop all but the newest `keep`. Returns the policy's folder.

    Raises StorageError where the disk is full or not writable; earlier checkpoints are untouched.
    """
    root = run_dir / "checkpoints"
    target = root / f"step_{step:06d}"
    scratch = root / f".step_{step:06d}.partial"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "policy").mkdir(parents=True)
        save_policy(policy, scratch / "policy")
        for path in sorted(scratch.rglob("*")):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        _sync(root)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise StorageError(
            f"can't write the checkpoint {target} ({error.strerror or error}); free some space or choose another "
            "run.dir. Earlier checkpoints, metrics and samples are whole."
        ) from error
    for old in sorted(root.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return target / "policy"


def save_policy(policy: Policy, folder: Path) -> None:
    """Adapter or model, and tokenizer, in the formats of PEFT and transformers."""
    policy.model.save_pretrained(str(folder), safe_serialization=True)
    policy.tokenizer.save_pretrained(str(folder))
    card = folder / "README.md"
    if card.is_file():
        card.unlink()  # PEFT's model card template, all placeholders
    _public(policy, folder)


def _public(policy: Policy, folder: Path) -> None:
    """Name the base by its public name, never by a path of this machine, and attention by a name others know."""
    for name in ("adapter_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        if name == "adapter_config.json":
            content["base_model_name_or_path"] = policy.public_name
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
