"""The forward of the local engine: a lean one for Llama-like decoders, and transformers' own for all others.

The lean runtime holds a view of the policy made for skinny batches: query, key and value projections fused, gate and up
fused, LoRA adapters merged into these buffers (never into the trainer's weights). What needs neither fusing nor
merging is shared with the policy, not copied.

Axis letters: N tokens, H hidden width, K key/value heads, G query heads per key/value head, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface

from sapwood.engines._cache import KvShape
from sapwood.engines._plan import Heads, Plan
from sapwood.errors import EngineError
from sapwood.models.forward import tree_obstacle
from sapwood.models.heads import LogitTransform
from sapwood.models.products import memory_limited
from sapwood.models.quantised import dense_weight

_LEAN = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"}
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
_ATTENTION = "sapwood_engine"
#: Rows that the packed head is laid out for; other numbers work too.
_PACKED_ROWS = 32


class Runtime(ABC):
    """Computes hidden states by plan, and logits from them."""

    kv_shape: KvShape

    @abstractmethod
    def load(self, model: Any) -> None:
        """Take the weights of the model that the runtime was made for, as they are at this moment."""

    @abstractmethod
    def forward(self, plan: Plan) -> Tensor:
        """Final hidden states [N or len(plan.sample), H]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> [B, V], with the model's own transforms."""


def lean_obstacle(model: Any) -> str | None:
    """Why the lean runtime can't serve this model, or None."""
    if type(model).__name__ not in _LEAN:
        return f"{type(model).__name__} is not one of {', '.join(sorted(_LEAN))}"
    config = model.config
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        return f"rotary embedding {kind!r} depends on the length of the call"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act!r} is not silu"
    if 2 * model.model.rotary_emb.inv_freq.numel() != model.model.layers[0].self_attn.head_dim:
        return "the rotary embedding covers only a part of each head"
    parts = [model.model.embed_tokens, *(p for layer in model.model.layers for p in _projections(layer))]
    for module in [*parts, model.lm_head]:
        obstacle = _weight_obstacle(module)
        if obstacle:
            return obstacle
    return None


def _projections(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip


def _weight_obstacle(module: Any) -> str | None:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(base, (nn.Linear, nn.Embedding)):
        return f"{type(base).__name__} has no plain weight matrix"
    if base is module:
        return None
    if not isinstance(base, nn.Linear) and _active(module):
        return "an adapter on the embeddings"
    if module.lora_variant:
        return "a LoRA variant (DoRA and the like)"
    if getattr(module, "fan_in_fan_out", False):
        return "a LoRA layer over a transposed weight"
    if any(getattr(module.lora_B[name], "bias", None) is not None for name in _active(module)):
        return "a LoRA layer with a bias"
    return None


def _active(module: Any) -> list[str]:
    """Adapters whose product is to be added to the base weight."""
    if module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _shared_or_merged(module: Any, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The effective weight [out, in]; the policy's own tensor where nothing is merged and `out` isn't given."""
    base = _base(module)
    weight = dense_weight(base)
    names = [] if base is module else _active(module)
    if not names:
        if out is None:
            return weight.detach().to(dtype)
        return out.copy_(weight)
    merged = out if out is not None else torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for name in names:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        # In the adapter's precision, rounded once.
        weight = torch.addmm(weight.to(b.dtype), b, a.to(b.dtype), alpha=module.scaling[name])
    return merged.copy_(weight)


@dataclass
class _Layer:
    """Weights of a decoder layer; qkv [(KG+2K)D, H], gate_up [2I, H]."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_packed: Tensor | None
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    heads: Heads


class LeanRuntime(Runtime):
    """Llama, Qwen2, Qwen3 and Mistral decoders."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        config, attention = model.config, model.model.layers[0].self_attn
        device = model.model.embed_tokens.weight.device
        self._width = attention.head_dim
        self._kv_heads = config.num_key_value_heads
        self._q_heads = config.num_attention_heads
        self._eps = config.rms_norm_eps
        self._dtype = dtype
        # Rotating pairs are stored side by side, so that the rotation is one complex product. Scores don't change
        # when queries and keys permute their components alike. There is no complex bfloat16.
        self._complex = dtype is torch.float32
        self._transform = LogitTransform.of(config)
        self._rotary = model.model.rotary_emb
        self._table = torch.empty(0, device=device)
        self._layers: list[_Layer] = []
        self._packable = (
            dtype is torch.float32
            and device.type == "cpu"
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            and not memory_limited()
        )
        self._packed: Tensor | None = None
        self._packed_state: tuple[int, int] | None = None
        self.kv_shape = KvShape(config.num_hidden_layers, self._kv_heads, self._width, dtype, device)

    def load(self, model: Any) -> None:
        """Fuse and merge, into the buffers of the load before."""
        old: list[_Layer | None] = list(self._layers) or [None] * len(model.model.layers)
        self._layers = [self._load_layer(layer, was) for layer, was in zip(model.model.layers, old, strict=True)]
        self._embedding = _base(model.model.embed_tokens).weight.detach()
        self._norm = model.model.norm.weight.detach().to(self._dtype)
        self._load_head(model.lm_head)
        self._head_bias = self._bias(model.lm_head)

    def _load_head(self, module: Any) -> None:
        """The head, packed for skinny products where oneDNN can: the largest weight, and read at every token."""
        weight = _shared_or_merged(module, self._dtype, None)
        if self._packable:
            source = _base(module).weight
            # An adapter trains beside a frozen head, which then needs packing once.
            state = None if weight.data_ptr() != source.data_ptr() else (source.data_ptr(), source._version)
            if state is None or state != self._packed_state:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
                self._packed_state = state
        self._head = weight

    def _bias(self, *modules: Any) -> Tensor | None:
        biases = [getattr(_base(module), "bias", None) for module in modules]
        if all(bias is None for bias in biases):
            return None
        sizes = [_base(module).out_features for module in modules]
        filled = [
            torch.zeros(size, device=self.kv_shape.device) if bias is None else bias.detach()
            for bias, size in zip(biases, sizes, strict=True)
        ]
        return torch.cat(filled).to(self._dtype)

    def _load_layer(self, layer: Any, was: _Layer | None) -> _Layer:
        q, k, v, o, gate, up, down = _projections(layer)
        attention = layer.self_attn
        gate_up = self._fuse((gate, up), was and was.gate_up)
        # The widest layer gains enough from packing to repay it within a few steps; the narrower ones don't.
        packed = torch.ops.mkldnn._reorder_linear_weight(gate_up, _PACKED_ROWS) if self._packable else None
        return _Layer(
            norm=layer.input_layernorm.weight.detach().to(self._dtype),
            qkv=self._fuse((q, k, v), was and was.qkv, rotated=(q, k)),
            qkv_bias=self._qkv_bias(q, k, v),
            q_norm=self._head_norm(attention, "q_norm"),
            k_norm=self._head_norm(attention, "k_norm"),
            out=_shared_or_merged(o, self._dtype, self._reusable(o, was and was.out)),
            out_bias=self._bias(o),
            mlp_norm=layer.post_attention_layernorm.weight.detach().to(self._dtype),
            gate_up=gate_up,
            gate_up_packed=packed,
            gate_up_bias=self._bias(gate, up),
            down=_shared_or_merged(down, self._dtype, self._reusable(down, was and was.down)),
            down_bias=self._bias(down),
            heads=Heads(attention.scaling, _window(attention)),
        )

    def _reusable(self, module: Any, was: Tensor | None) -> Tensor | None:
        """The buffer of the last load, if it is ours and this load merges too."""
        merges = isinstance(module, LoraLayer) and bool(_active(module))
        ours = was is not None and was.data_ptr() != _base(module).weight.data_ptr()
        return was if merges and ours else None

    def _fuse(self, modules: tuple[Any, ...], buffer: Tensor | None, rotated: tuple[Any, ...] = ()) -> Tensor:
        sizes = [_base(module).out_features for module in modules]
        if buffer is None:
            shape = (sum(sizes), _base(modules[0]).in_features)
            buffer = torch.empty(shape, dtype=self._dtype, device=self.kv_shape.device)
        for part, module in zip(buffer.split(sizes), modules, strict=True):
            if self._complex and module in rotated:
                part.copy_(self._paired(_shared_or_merged(module, self._dtype, None)))
            else:
                _shared_or_merged(module, self._dtype, part)
        return buffer

    def _paired(self, weight: Tensor) -> Tensor:
        """Rows (or entries) of each head reordered from (0, 1, ... D-1) to (0, D/2, 1, D/2+1, ...)."""
        halves = weight.unflatten(0, (-1, 2, self._width // 2))
        return halves.transpose(1, 2).flatten(0, 2)

    def _qkv_bias(self, q: Any, k: Any, v: Any) -> Tensor | None:
        bias = self._bias(q, k, v)
        if bias is None or not self._complex:
            return bias
        turned = (self._q_heads + self._kv_heads) * self._width
        return torch.cat([self._paired(bias[:turned]), bias[turned:]])

    def _head_norm(self, attention: Any, name: str) -> Tensor | None:
        module = getattr(attention, name, None)
        if module is None:
            return None
        weight = module.weight.detach().to(self._dtype)
        return self._paired(weight) if self._complex else weight

    def forward(self, plan: Plan) -> Tensor:
        """Final hidden states of plan.sample, or of all tokens."""
        x = F.embedding(plan.tokens, self._embedding).to(self._dtype)
        rotation = self._rotation(plan.positions)
        width, eps = x.shape[1], self._eps
        shape = (width,)
        for number, layer in enumerate(self._layers):
            heads = self._project(layer, F.rms_norm(x, shape, layer.norm, eps), rotation)
            q, k, v = heads
            plan.store(number, k, v)
            scorer = plan
            if plan.last is not None and number == len(self._layers) - 1:
                assert plan.sample is not None
                x, q, scorer = x[plan.sample], q[plan.sample], plan.last
            mixed = scorer.attend(number, q, layer.heads).reshape(x.shape[0], -1)
            _add_linear(x, mixed, layer.out, layer.out_bias)
            normed = F.rms_norm(x, shape, layer.mlp_norm, eps)
            hidden = _product(normed, layer.gate_up, layer.gate_up_packed, layer.gate_up_bias)
            gate, up = hidden.chunk(2, 1)
            _add_linear(x, F.silu(gate).mul_(up), layer.down, layer.down_bias)
        if plan.last is None and plan.sample is not None:
            x = x[plan.sample]
        return F.rms_norm(x, shape, self._norm, eps)

    def _project(self, layer: _Layer, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [N, K, G, D] and k [N, K, D], and v [N, K, D]."""
        q_heads, kv_heads, width = self._q_heads, self._kv_heads, self._width
        states = F.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], q_heads + 2 * kv_heads, width)
        turned, v = states[:, : q_heads + kv_heads], states[:, q_heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(turned[:, :q_heads], (width,), layer.q_norm, self._eps)
            k = F.rms_norm(turned[:, q_heads:], (width,), layer.k_norm, self._eps)
            turned = torch.cat([q, k], 1)
        if self._complex:
            torch.view_as_complex(turned.unflatten(2, (-1, 2))).mul_(rotation)
        else:
            low, high = turned.chunk(2, 2)
            turned = turned * rotation[0] + torch.cat([-high, low], 2) * rotation[1]
        q = turned[:, :q_heads].unflatten(1, (kv_heads, -1))
        return q, turned[:, q_heads:], v

    def _rotation(self, positions: Tensor) -> Tensor:
        """[N, 1, D/2] complex, or cosines and sines [2, N, 1, D]."""
        axis = 0 if self._complex else 1
        need = int(positions.max()) + 1
        if need > (self._table.shape[axis] if self._table.numel() else 0):
            count = max(256, 2 * need)
            inverse = self._rotary.inv_freq.float()
            angles = torch.outer(torch.arange(count, device=inverse.device).float(), inverse)
            scale = self._rotary.attention_scaling
            if self._complex:
                self._table = torch.polar(torch.full_like(angles, scale), angles)[:, None]
            else:
                angles = torch.cat([angles, angles], 1)[:, None]
                self._table = torch.stack([angles.cos(), angles.sin()]).mul_(scale).to(self._dtype)
        return self._table.index_select(axis, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> [B, V]."""
        return self._transform(_product(hidden, self._head, self._packed, self._head_bias))


def _window(attention: Any) -> int | None:
    config = attention.config
    # Mistral keeps the window in its config alone; the others tell layer by layer.
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


def _product(x: Tensor, weight: Tensor, packed: Tensor | None, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, by the packed weight where there is one."""
    if packed is None or memory_limited():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _add_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x += y weight^T + bias, in place."""
    x.addmm_(y, weight.t())
    if bias is not None:
        x.add_(bias)


class GenericRuntime(Runtime):
    """Any decoder that uses transformers' attention interface: its own forward, with attention by plan."""

    def __init__(self, model: Any) -> None:
        obstacle = tree_obstacle(model, training=False)
        if obstacle:
            raise EngineError(f"the local engine can't serve this model: {obstacle}; choose another model.")
        AttentionInterface.register(_ATTENTION, _planned_attention)
        config = model.config.get_text_config()
        weight = model.get_input_embeddings().weight
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        self._model = model
        self._transform = LogitTransform.of(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.kv_shape = KvShape(config.num_hidden_layers, heads, width, dtype, weight.device)

    def load(self, model: Any) -> None:
        """The policy's modules are used as they are."""
        self._model = model

    def forward(self, plan: Plan) -> Tensor:
        """Final hidden states of plan.sample, or of all tokens."""
        decoder = self._model.get_decoder()
        with _in_evaluation(self._model), _attention(decoder.config):
            hidden = decoder(
                input_ids=plan.tokens[None],
                position_ids=plan.positions[None],
                use_cache=False,
                sapwood_plan=plan,
            ).last_hidden_state[0]
        return hidden if plan.sample is None else hidden[plan.sample]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, H] -> [B, V]."""
        with _in_evaluation(self._model):
            return self._transform(self._model.get_output_embeddings()(hidden))


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module gets back the mode it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _planned_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sapwood_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind transformers' attention interface. query [1, KG, N, D], key and value [1, K, N, D]."""
    if sapwood_plan is None or attention_mask is not None or kwargs.get("s_aux") is not None:
        raise EngineError(
            "the model passes an attention argument that the local engine doesn't know; choose another model."
        )
    kv_heads, width = key.shape[1], key.shape[3]
    q = query[0].transpose(0, 1).unflatten(1, (kv_heads, -1))
    sapwood_plan.store(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = width**-0.5 if scaling is None else scaling
    out = sapwood_plan.attend(module.layer_idx, q, Heads(scale, sliding_window, softcap))
    return out.flatten(1, 2)[None], None
