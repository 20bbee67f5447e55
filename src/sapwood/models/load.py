"""Names to models: a bundled one, a local folder or a hub id; with LoRA, a dtype and optional quantisation."""

from __future__ import annotations

import importlib.util
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
from sapwood.models.sources import (
    BUNDLED,
    at,
    bundled_gguf,
    called,
    check_loaded,
    find_adapter,
    is_adapter,
    known_name,
    opening,
    option,
    outlined,
    outlines,
    public_name,
    quiet_transformers,
    read_config,
    resolve,
)
from sapwood.paths import expanded

__all__ = [
    "BUNDLED",
    "ModelChoice",
    "ModelSection",
    "Policy",
    "bundled_gguf",
    "called",
    "find_adapter",
    "is_adapter",
    "is_classifier",
    "known_name",
    "load_classifier",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "outlines",
    "pick_device",
    "pick_dtype",
    "public_name",
    "quiet_transformers",
    "resolve",
    "scalar_head",
    "set_pad_token",
    "vocabulary_difference",
]

#: So that a weight that is missing or has another shape is told, where it would be drawn at random.
_TOLD: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    with opening(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, cache_dir=cache_dir)


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
    with opening(name):
        if outlined():
            return _outline(AutoModelForCausalLM, source, options)[0]
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **_TOLD, **options)
    model, told = loaded
    check_loaded(name, told)
    if _sees_ahead(model.config):
        raise ModelError(
            f"{at('name')}{name} is an encoder ({type(model).__name__}), in which a token sees those after it; choose "
            "a causal language model."
        )
    return _placed(model, device, options)


def _sees_ahead(config: Any) -> bool:
    """Whether it is an encoder, made to guess masked words."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False


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
    outline = outlined()
    with opening(name):
        if outline:
            model, told = _outline(AutoModelForSequenceClassification, source, options, num_labels=1)
        else:
            model, told = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **_TOLD, **options)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{at('name')}{name}: {type(model).__name__} has no linear head named 'score'; choose a decoder-only model."
        )
    check_loaded(name, told, drawn="score.")
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
    start = find_adapter(expanded(section.init_from), role) if section.init_from else None
    file = AdapterFile.read(start) if start is not None and is_adapter(start) else None
    if file is not None and file.is_classifier and not scalar:
        raise ModelError(
            f"{at('init_from')}{start} is the adapter of a reward model or critic, not of a language model; name it "
            "under critic or rewards, or start from the adapter that it was made from."
        )
    whole = start is not None and file is None
    # What an adapter made here is trained on, and has to be opened on again.
    base = str(start.resolve()) if start is not None and whole else _base(file, section.name)
    source = section.name if base == public_name(section.name) else base
    where = (device, dtype, section.quantize, section.trust_remote_code, section.cache_dir, section.device_map)
    with called(option("init_from") if whole else option("name"), option("init_from")):
        if not scalar:
            _check_language_model(source)
        if scalar:
            model, trained_head = load_classifier(source, *where, seed=seed)
        else:
            model, trained_head = load_model(source, *where), False
    tokenizer = load_tokenizer(section.name, section.trust_remote_code, section.cache_dir)
    if whole:
        _check_same_words(str(start), section, tokenizer)
    _check_embedded(source, model, tokenizer)
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
    config = read_config(Path(resolve(source)))
    if any("ForSequenceClassification" in str(kind) for kind in config.get("architectures") or ()):
        raise ModelError(
            f"{at('name')}{source} is a sequence classifier (a reward model or critic), which has no language model's "
            "head; name it under critic or rewards, or choose the language model that it was made from."
        )


def _check_same_words(start: str, section: ModelSection, tokenizer: Any) -> None:
    """A whole model that the run starts from is read with the tokenizer of model.name: they have to agree."""
    if not (Path(start) / "tokenizer_config.json").is_file():
        return
    own = load_tokenizer(start, section.trust_remote_code, section.cache_dir)
    difference = vocabulary_difference(own, tokenizer)
    if difference is not None:
        raise ModelError(
            f"{at('init_from')}{start} has another vocabulary than {section.name} ({difference}); set "
            f"{option('name')}={start}, or start from a model of its family."
        )


def vocabulary_difference(one: Any, other: Any) -> str | None:
    """How two tokenizers' vocabularies differ, or None."""
    mine: dict[str, int] = one.get_vocab()
    theirs: dict[str, int] = other.get_vocab()
    if mine == theirs:
        return None
    if len(mine) != len(theirs):
        return f"{len(mine):,} tokens against {len(theirs):,}"
    token = next(token for token, index in mine.items() if theirs.get(token) != index)
    return f"token {token!r} is {mine[token]} there and {theirs.get(token, 'unknown')} here"


def _check_embedded(source: str, model: Any, tokenizer: Any) -> None:
    """Raises ModelError where a tokenizer gives tokens that the model has no embedding of.

    Special tokens beyond them that the chat template doesn't write can't turn up in a conversation, and may be there.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    used = [index for index in tokenizer.get_vocab().values() if index not in added or added[index] in template]
    if max(used, default=0) >= rows:
        raise ModelError(
            f"{at('name')}{source} has embeddings for {rows:,} tokens, and its tokenizer gives ids up to "
            f"{max(used):,}; take the tokenizer that belongs to the model."
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
    if file is None or file.config.base_model_name_or_path in (None, mine):
        return mine
    theirs = expanded(file.base)
    if theirs.name == "policy" and theirs.parent.name.startswith("step_"):
        if theirs.is_dir():
            return file.base
        different = True
    elif expanded(mine).is_dir() and theirs.is_dir():
        different = expanded(mine).resolve() != theirs.resolve()
    else:
        local = (expanded(mine).is_dir(), theirs.is_dir() or theirs.is_absolute())
        different = not any(local)
    if different:
        raise ModelError(
            f"{at('init_from')}the adapter {file.folder} was trained on {file.base}, not on {name}; "
            f"set {option('name') or 'the base'}={known_name(file.base)}."
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
