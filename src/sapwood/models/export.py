"""From a run, checkpoint or adapter to a plain transformers folder: adapters merged, nothing of Sapwood needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sapwood.errors import ModelError, StorageError
from sapwood.models.adapters import AdapterFile
from sapwood.models.forward import causal_lm
from sapwood.models.load import (
    ModelChoice,
    Policy,
    called,
    find_adapter,
    is_adapter,
    known_name,
    load_policy,
    quiet_transformers,
    scalar_head,
)
from sapwood.models.sources import read_config


def export(source: Path, out: Path, *, base: str | None = None, dtype: str = "float32", role: str = "policy") -> Path:
    """Write what `source` (a run, checkpoint, adapter or model folder) holds as one model with its tokenizer.

    An adapter is merged into its base in the dtype given: a causal language model, or a sequence classifier where it
    was trained as a reward model or critic. base: where the adapter's base is, unless it is the name that the adapter
    gives; role: "policy" or "critic". Returns `out`. Raises ModelError where the source can't be opened or `out` is
    not empty, StorageError where it can't be written.
    """
    if out.exists() and not out.is_dir():
        raise ModelError(f"{out} is a file; export to a folder of its own.")
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty; export to a folder of its own.")
    folder = _found(Path(source), role)
    with called("--base" if is_adapter(folder) else "", ""):
        policy = open_model(folder, base=base, dtype=dtype)
    model = causal_lm(policy.model)
    if policy.has_lora:
        head = scalar_head(policy.model) if hasattr(model, "score") else None
        model = policy.model.merge_and_unload()
        if head is not None:
            model.score = head
    scratch = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        with quiet_transformers():
            model.save_pretrained(str(scratch))
            policy.tokenizer.save_pretrained(str(scratch))
        clean_config(scratch / "config.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        scratch.rename(out)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise StorageError(f"can't write the model to {out} ({error.strerror or error}).") from error
    return out


def open_model(folder: Path, *, base: str | None = None, **settings: Any) -> Policy:
    """A policy from an adapter's or model's folder alone: its base, kind and tokenizer are read from there.

    settings: fields of a `model` section (dtype, quantize, device ...).
    """
    if is_adapter(folder):
        file = AdapterFile.read(folder)
        if base is None and file.config.base_model_name_or_path is None:
            raise ModelError(f"{folder}/adapter_config.json names no base model; give it with --base.")
        name = base or known_name(file.base)
        choice = ModelChoice(name=name, init_from=folder, **settings)
        return load_policy(choice, head="scalar" if file.is_classifier else "lm")
    kinds = read_config(folder).get("architectures") or ()
    scalar = any("ForSequenceClassification" in str(kind) for kind in kinds)
    return load_policy(ModelChoice(name=str(folder), **settings), head="scalar" if scalar else "lm")


def _found(source: Path, role: str) -> Path:
    """The folder of a role in a run or checkpoint. Raises ModelError where it has none that is a model by itself."""
    with called(""):
        folder = find_adapter(source, role)
    if role == "policy" or folder == source or folder.name == role:
        return folder
    if any((folder.parent / role).glob("head.safetensors")):
        raise ModelError(
            f"the critic of {source} is a head on the policy's hidden states ({folder.parent / role}/head.safetensors) "
            "and no model by itself; a critic of kind adapter or model can be exported."
        )
    raise ModelError(f"{source} has no {role}; export its policy (--role policy).")


def clean_config(path: Path) -> None:
    """Leave out what is of this machine: paths, and the attention that only Sapwood knows."""
    content = json.loads(path.read_text("utf-8"))
    for name in ("_attn_implementation", "attn_implementation", "_name_or_path"):
        content.pop(name, None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
