"""LoRA adapters on a base: made from a recipe, read from a folder, several side by side, written as PEFT writes them.

An adapter file of a sequence classifier carries the scalar head too, as `base_model.model.score.weight`. Its LoRA
weights are named as a causal model's are, so either kind of file can start either kind of adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sapwood.errors import ModelError
from sapwood.models.lora import fuse_lora

#: What a policy's adapter is called inside PEFT; a folder of it opens under the same name.
POLICY = "default"
HEAD_KEY = "base_model.model.score.weight"
_HEAD_NAMES = frozenset({"score", "classifier"})


class LoraSection(Protocol):
    """The `model.lora` section of a recipe."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102
    @property
    def target_modules(self) -> str | Sequence[str]: ...  # noqa: D102


@dataclass(frozen=True)
class AdapterFile:
    """A folder with an adapter. config: PEFT's; weights: by saved name, without the head; head: [1, H] or None."""

    folder: Path
    config: Any
    weights: dict[str, Tensor]
    head: Tensor | None

    @staticmethod
    def read(folder: Path) -> AdapterFile:
        """Open it. Raises ModelError where it is no LoRA adapter or is damaged."""
        from peft import LoraConfig, PeftConfig
        from peft.utils.save_and_load import load_peft_weights
        from safetensors import SafetensorError

        try:
            config = PeftConfig.from_pretrained(str(folder))
            weights = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
                first = "it has no adapter_model.safetensors"
            raise ModelError(
                f"can't read the adapter {folder} ({first[:200]}); copy it again, or take another checkpoint."
            ) from error
        if not isinstance(config, LoraConfig):
            raise ModelError(
                f"{folder}/adapter_config.json: peft_type is {_kind(config)}; Sapwood reads LoRA adapters."
            )
        head = weights.pop(HEAD_KEY, None)
        kept = [name for name in config.modules_to_save or () if name not in _HEAD_NAMES]
        config.modules_to_save = kept or None
        config.inference_mode = False
        return AdapterFile(folder, config, weights, head)

    @property
    def base(self) -> str:
        """The public name (or path) of the model that it was trained on."""
        return str(self.config.base_model_name_or_path)

    @property
    def shareable(self) -> bool:
        """Whether it leaves the base as it is (PiSSA and its like take their start out of the base's weights)."""
        return isinstance(self.config.init_lora_weights, bool) or self.config.init_lora_weights == "gaussian"

    @property
    def is_classifier(self) -> bool:
        """Whether it was trained as a reward model or critic."""
        return str(self.config.task_type) in ("SEQ_CLS", "TaskType.SEQ_CLS")


def lora_config(lora: LoraSection) -> Any:
    """PEFT's config of a recipe's section."""
    from peft import LoraConfig

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  (PEFT takes a float)
        lora_dropout=lora.dropout,
        target_modules=targets,
    )


def first_adapter(model: Any, config: Any, seed: int, *, scalar: bool) -> Any:
    """A PEFT model around a transformers one; with `scalar` its head is trained along."""
    from peft import TaskType, get_peft_model

    config = copy.deepcopy(config)
    config.task_type = TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM
    _check_targets(model, config.target_modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise _no_such_layer(model, config) from error
    fuse_lora(wrapped)
    return wrapped


def add_adapter(model: Any, name: str, config: Any, seed: int) -> None:
    """A further adapter on a PEFT model, frozen or trained by the caller's choice; nobody else's weights change."""
    config = copy.deepcopy(config)
    config.task_type = None
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(name, config)
        except ValueError as error:
            raise _no_such_layer(model.get_base_model(), config) from error
    fuse_lora(model)
    # PEFT freezes whatever isn't its active adapter.
    for parameter in model.parameters():
        if id(parameter) in trained:
            parameter.requires_grad_(True)
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(True)


def fill_adapter(model: Any, name: str, file: AdapterFile) -> None:
    """Put a file's weights into an adapter of the same shape. Raises ModelError where they don't fit."""
    from peft import set_peft_model_state_dict

    state = dict(file.weights)
    wrapped = getattr(model.get_base_model(), "score", None)
    if name == POLICY and isinstance(wrapped, nn.Module):  # a classifier's head is a part of its first adapter
        own = wrapped.get_submodule(f"modules_to_save.{name}")
        state[HEAD_KEY] = next(own.parameters()) if file.head is None else file.head
    try:
        result = set_peft_model_state_dict(model, state, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"the adapter {file.folder} doesn't fit this model ({str(error).strip().splitlines()[0][:200]})."
        ) from error
    missing = [key for key in result.missing_keys if ".lora_" in key and name in key.split(".")]
    if missing:
        raise ModelError(
            f"the adapter {file.folder} lacks {len(missing)} of its weights, such as {missing[0]!r}, which its "
            "adapter_config.json asks for; copy it again, or take another checkpoint."
        )
    if result.unexpected_keys:
        raise ModelError(f"the adapter {file.folder} doesn't fit this model: it has no {result.unexpected_keys[0]!r}.")


def copy_adapter(model: Any, source: str, name: str) -> None:
    """A frozen adapter with the weights that `source` has at this moment."""
    add_adapter(model, name, model.peft_config[source], seed=0)
    weights = {key.replace(f".{source}.", f".{name}."): p for key, p in named_adapter(model, source).items()}
    for key, parameter in named_adapter(model, name).items():
        parameter.data.copy_(weights[key].data)
        parameter.requires_grad_(False)


def named_adapter(model: Any, name: str) -> dict[str, nn.Parameter]:
    """LoRA parameters of one adapter, without scalar heads, by PEFT's name for them."""
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if name in key.split(".") and not _HEAD_NAMES & set(key.split("."))
    }


def adapter_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """LoRA parameters of one adapter, in a fixed order."""
    return list(named_adapter(model, name).values())


def write_classifier(
    model: Any, name: str, head: Tensor, folder: Path, base: str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """One adapter and a scalar head [1, H] as a PEFT folder that opens as a sequence classifier.

    weights: the model's state of another moment, its own unless given.
    """
    from peft import TaskType, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(model.peft_config[name])
    config.task_type, config.inference_mode = TaskType.SEQ_CLS, True
    # PEFT reads a module that is named twice twice, and fails at the second.
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), "classifier", "score"]))
    config.base_model_name_or_path = base
    given = None if weights is None else dict(weights)
    state = get_peft_model_state_dict(model, given, adapter_name=name, save_embedding_layers=False)
    state = {key: value for key, value in state.items() if not _HEAD_NAMES & set(key.split("."))}
    state[HEAD_KEY] = head
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return "missing" if kind is None else str(getattr(kind, "value", kind))


def _check_targets(model: Any, targets: Any) -> None:
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and not isinstance(targets, str) and {"lm_head", "embed_out"} & set(targets or ()):
        raise ModelError(
            "model.lora.target_modules: the LM head is tied to the embeddings, so an adapter on it would be lost on "
            "merging; leave it out, or train full weights with model.lora: null."
        )


def _no_such_layer(model: Any, config: Any) -> ModelError:
    targets = config.target_modules
    targets = tuple(sorted(targets)) if isinstance(targets, set | frozenset) else targets
    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    return ModelError(
        f"model.lora.target_modules: {targets!r} matches no layer; the linear layers are {', '.join(names)}."
    )
