"""One forward over a micro-batch: by the token tree, or by plain rows where a model can't be served by it.

Both give the same numbers; the tree computes each distinct prefix once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sapwood.models.heads import LogitTransform, score
from sapwood.models.precision import full_precision
from sapwood.tree import TokenTree, TreeContext
from sapwood.tree.attention import NAME, register
from sapwood.types import Row

#: RoPE kinds whose frequencies depend on the longest position of the call, so rows would change their neighbours.
_CALL_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
#: What configs call the dropout of attention weights, which the tree's kernels don't do.
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


def tree_obstacle(model: nn.Module, training: bool = True) -> str | None:
    """Why this model needs plain rows, or None if the token tree serves it; training: not to sample alone."""
    base = causal_lm(model)
    config = base.config.get_text_config()
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} doesn't use transformers' attention interface"
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - _KNOWN_LAYERS:
        return f"it has {', '.join(sorted(layers - _KNOWN_LAYERS))} layers"
    rope = _rope_kinds(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if rope & _CALL_DEPENDENT_ROPE:
        kinds = ", ".join(sorted(rope & _CALL_DEPENDENT_ROPE))
        return f"its {kinds} rotary embedding depends on the longest row of the call"
    if any(name.endswith("sinks") for name, _ in base.named_parameters()):
        return "it has attention sinks"
    if training and any(float(getattr(config, name, None) or 0.0) > 0 for name in _ATTENTION_DROPOUT):
        return "it drops attention weights at random in training"
    if len({str(device) for device in (getattr(base, "hf_device_map", None) or {}).values()}) > 1:
        return "its layers are spread over several devices"
    if getattr(config, "output_router_logits", False):
        return "its router loss counts every row's tokens"
    return None


def _rope_kinds(parameters: Any) -> set[str]:
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {str(parameters.get("rope_type") or parameters.get("type") or "default")}
    return kinds.union(*(_rope_kinds(value) for value in nested)) if nested else kinds


def causal_lm(model: nn.Module) -> Any:
    """The transformers model (a causal language model or a sequence classifier) behind an optional PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def enable_tree(model: nn.Module) -> None:
    """Route the model's attention through the token tree; without a tree argument it stays ordinary attention."""
    register()
    causal_lm(model).set_attn_implementation(NAME)


def uses_tree(model: nn.Module) -> bool:
    """Whether `enable_tree` was called."""
    return causal_lm(model).config.get_text_config()._attn_implementation == NAME


def hidden_states(model: nn.Module, tree: TokenTree, kernel: str = "auto") -> Tensor:
    """Last hidden state of every node, [N, H], in one pass over the tree."""
    return _by_tree(model, TreeContext(tree, kernel))


def _by_tree(model: nn.Module, context: TreeContext) -> Tensor:
    tree = context.tree
    # A mask that is already four-dimensional is passed through unread: no N x N mask is ever made.
    unread = torch.zeros(1, 1, 1, 1, device=tree.token_ids.device)
    output = causal_lm(model).base_model(
        input_ids=tree.token_ids[None],
        position_ids=tree.positions[None],
        attention_mask=unread,
        use_cache=False,
        tree=context,
    )
    return output.last_hidden_state[0]


def row_hidden_states(model: nn.Module, rows: Sequence[Row], device: torch.device | str) -> list[Tensor]:
    """Last hidden state of every token of every row, [L, H] each, one padded call over plain rows."""
    base = causal_lm(model)
    longest = max(len(row.token_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.token_ids)] = torch.from_numpy(row.token_ids)
        mask[i, : len(row.token_ids)] = 1
    output = base.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return [output.last_hidden_state[i, : len(row.token_ids)] for i, row in enumerate(rows)]


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch and their token tree, made once for all roles that read them."""

    rows: Sequence[Row]
    context: TreeContext

    @staticmethod
    def of(rows: Sequence[Row], device: torch.device | str = "cpu", kernel: str = "auto") -> Batch:
        """Merge the rows."""
        return Batch(rows, TreeContext(TokenTree.of(rows, device), kernel))

    @property
    def tree(self) -> TokenTree:
        """The rows, merged."""
        return self.context.tree


@dataclass(frozen=True)
class Hidden:
    """Last hidden states of a batch: of every node [N, H] by the tree, or of every row's tokens [L, H] without it."""

    batch: Batch
    nodes: Tensor | None
    rows: Sequence[Tensor]

    @staticmethod
    def of(model: nn.Module, batch: Batch) -> Hidden:
        """One pass of the model's trunk."""
        if uses_tree(model):
            return Hidden(batch, _by_tree(model, batch.context), ())
        return Hidden(batch, None, row_hidden_states(model, batch.rows, batch.tree.token_ids.device))

    def detach(self) -> Hidden:
        """The same numbers without their graph."""
        nodes = None if self.nodes is None else self.nodes.detach()
        return Hidden(self.batch, nodes, tuple(row.detach() for row in self.rows))

    def units(self) -> Tensor:
        """[U, H]: hidden states that reach the language model's head."""
        tree = self.batch.tree
        if self.nodes is not None:
            return self.nodes[tree.score_node]
        return _units_of_rows(self.rows, self.batch.rows, tree)

    def scalars(self, head: nn.Module) -> tuple[Tensor, Tensor]:
        """A scalar head's outputs [S] before each scored token and [R] at each row's last token, in fp32.

        By the tree it is evaluated once per node, whatever number of rows and tokens read the result.
        """
        tree = self.batch.tree
        if self.nodes is not None:
            of_node = _scalar(head, self.nodes)
            return of_node[tree.score_node][tree.pair_unit[tree.scored_pair]], of_node[tree.last_node]
        of_rows = [_scalar(head, hidden) for hidden in self.rows]
        before = [
            value[torch.from_numpy(np.flatnonzero(row.loss_mask) - 1).to(value.device)]
            for value, row in zip(of_rows, self.batch.rows, strict=True)
        ]
        return torch.cat(before), torch.stack([value[-1] for value in of_rows])


def _scalar(head: nn.Module, hidden: Tensor) -> Tensor:
    """[..., H] -> [...] in fp32: in half precision a value would be coarser than what it is learned from."""
    weight = next(head.parameters())
    with full_precision(hidden.device):
        return head(hidden.to(weight.device, weight.dtype))[..., 0].float()


def token_scores(
    model: nn.Module, hidden: Hidden, *, entropy: bool = True, entropy_grad: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [S] and entropies [S] of the scored tokens, in row order (fp32).

    Logits are divided by each row's temperature; the softmax is over the full vocabulary.
    """
    base, tree = causal_lm(model), hidden.batch.tree
    logprobs, entropies = score(
        base.get_output_embeddings(),
        hidden.units(),
        tree.pair_unit,
        tree.pair_target,
        tree.unit_temperature,
        LogitTransform.of(base.config.get_text_config()),
        entropy,
        entropy_grad,
    )
    unit_of_scored = tree.pair_unit[tree.scored_pair]
    return logprobs[tree.scored_pair], None if entropies is None else entropies[unit_of_scored]


def forward_rows(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    device: torch.device | str = "cpu",
    entropy: bool = True,
    entropy_grad: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [S] and entropies [S] of the rows' scored tokens, in row order (fp32): a whole forward."""
    hidden = Hidden.of(model, Batch.of(rows, device, kernel))
    return token_scores(model, hidden, entropy=entropy, entropy_grad=entropy_grad)


def _units_of_rows(hidden: Sequence[Tensor], rows: Sequence[Row], tree: TokenTree) -> Tensor:
    """[U, H]: each scored unit's hidden state, taken from every row that has it (their mean, so that gradients reach
    all of them as they do one row at a time)."""
    per_token = torch.cat(
        [
            h[torch.from_numpy(row.loss_mask[1:]).nonzero()[:, 0].to(h.device)]
            for h, row in zip(hidden, rows, strict=True)
        ]
    )
    unit = tree.pair_unit[tree.scored_pair]
    count = torch.bincount(unit, minlength=len(tree.score_node))
    total = per_token.new_zeros(len(tree.score_node), per_token.shape[1]).index_add(0, unit, per_token)
    return total / count[:, None]
