"""Checkpoints: whole or not there.

A checkpoint is written beside its place, synced and then renamed, so that a reader never sees half of one.
`policy/` opens with transformers or PEFT as it is.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from sapwood.errors import StorageError
from sapwood.models.adapters import write_classifier
from sapwood.models.forward import causal_lm
from sapwood.models.load import Policy, is_classifier, quiet_transformers, scalar_head, set_pad_token
from sapwood.models.roles import Critic, Models


def save(what: Models | Policy, run_dir: Path, step: int, keep: int) -> Path:
    """Write checkpoints/step_NNNNNN/ with policy/, and critic/ where there is one; drop all but the newest `keep`.

    Returns the policy's folder. Raises StorageError where the disk is full or not writable; earlier checkpoints are
    untouched.
    """
    policy, critic = (what.policy, what.critic) if isinstance(what, Models) else (what, None)
    root = run_dir / "checkpoints"
    target = root / f"step_{step:06d}"
    scratch = root / f".step_{step:06d}.partial"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "policy").mkdir(parents=True)
        save_policy(policy, scratch / "policy")
        if critic is not None:
            (scratch / "critic").mkdir()
            save_critic(critic, scratch / "critic")
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
    """Adapter or model, and tokenizer, in the formats of PEFT and transformers; of a scalar head too."""
    if policy.has_lora and is_classifier(policy.model):
        write_classifier(policy.model, policy.adapter, scalar_head(policy.model), folder, policy.public_name)
    elif policy.has_lora:
        # The adapters of other roles are theirs to save.
        policy.model.save_pretrained(str(folder), selected_adapters=[policy.adapter])
    else:
        with quiet_transformers():
            policy.model.save_pretrained(str(folder))
    policy.tokenizer.save_pretrained(str(folder))
    card = folder / "README.md"
    if card.is_file():
        card.unlink()  # PEFT's model card template, all placeholders
    _public(policy, folder)


def save_critic(critic: Critic, folder: Path) -> None:
    """A critic that is an adapter or a model opens as a sequence classifier; one that is a head is that head alone."""
    if critic.kind == "model":
        save_policy(critic.policy, folder)
    elif critic.kind == "adapter":
        policy = critic.policy
        write_classifier(policy.model, policy.adapter, critic.head, folder, policy.public_name)
        _write_padded_tokenizer(policy, folder)
        _public(policy, folder)
    else:
        save_file({"score.weight": next(critic.head.parameters()).detach().cpu()}, folder / "head.safetensors")


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
