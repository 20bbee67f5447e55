"""Attention over a token tree: every query sees its path, and each key is stored once.

Nodes are in depth-first order, so the queries below a segment are one contiguous range. The attention of the whole
tree is then a short list of blocks:

    self block    a segment's queries on its own keys, causal (short segments are batched, padded at their end)
    trunk block   all queries below a segment on that segment's keys, without a mask

and the blocks that a query takes part in are merged by their log-sum-exp (as flash attention merges tiles). The
backward pass runs the same blocks with the merged output and log-sum-exp, which is exact and gathers nothing.

Two kernels stand behind `tree_attention`: "grouped" (the blocks above: CPU flash attention, CUDA flash attention in
half precision, plain matmuls where a window, a softcap or another dtype asks for it) and "flex" (FlexAttention with
the same visibility as a mask function, CUDA). On CUDA the faster one is measured once for each size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sapwood.errors import ModelError
from sapwood.tree.trie import Segments, TokenTree

NAME = "sapwood_tree"
#: Segments up to this length are batched into one padded call; longer ones run alone, on views. A call costs more to
#: begin on a GPU than on a CPU, where padding is what costs.
_BATCHED_UP_TO = 32
_BATCHED_UP_TO_ON_GPU = 256
#: Queries that the plain kernel handles at a time, which bounds its score matrix.
_PLAIN_ROWS = 512
#: Arguments that models pass along and that don't change what attention computes here.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_causal"}
)


@dataclass(frozen=True)
class Block:
    """Queries q0..q1-1 on keys k0..k1-1; causal only where both are the same range."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


@dataclass(frozen=True)
class Batch:
    """Short segments side by side. index [B, T]: their nodes, padded by repeating the last; valid [B, T] bool."""

    index: Tensor
    valid: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of one tree, made once and used by every layer."""

    batches: tuple[Batch, ...]
    blocks: tuple[Block, ...]

    @staticmethod
    def of(segments: Segments, device: torch.device | str = "cpu") -> AttentionPlan:
        """Short segments in batches of similar length, then long ones, then trunk blocks from the root down."""
        lengths = segments.end - segments.start
        limit = _BATCHED_UP_TO if torch.device(device).type == "cpu" else _BATCHED_UP_TO_ON_GPU
        short: dict[int, list[int]] = {}
        blocks: list[Block] = []
        for k, length in enumerate(lengths.tolist()):
            if length > limit:
                s, e = int(segments.start[k]), int(segments.end[k])
                blocks.append(Block(s, e, s, e, causal=True))
            else:
                # Next power of two: at most half of a padded batch is waste, and it is never read.
                short.setdefault(1 << (length - 1).bit_length(), []).append(k)
        batches = []
        for _, members in sorted(short.items()):
            longest = int(lengths[members].max())
            offset = np.minimum(np.arange(longest)[None, :], lengths[members][:, None] - 1)
            index = segments.start[members][:, None] + offset
            valid = np.arange(longest)[None, :] < lengths[members][:, None]
            batches.append(Batch(torch.from_numpy(index).to(device), torch.from_numpy(valid).to(device)))
        for k in range(len(segments)):
            s, e, below = int(segments.start[k]), int(segments.end[k]), int(segments.subtree_end[k])
            if below > e:
                blocks.append(Block(e, below, s, e, causal=False))
        return AttentionPlan(tuple(batches), tuple(blocks))


@dataclass(frozen=True)
class TreeContext:
    """What the attention function receives as the forward argument `tree`.

    kernel: "grouped", "flex" or "auto". `plan` and `flex_mask` are made on first use and shared by all layers.
    """

    tree: TokenTree
    kernel: str = "auto"

    @cached_property
    def plan(self) -> AttentionPlan:
        """The block list."""
        return AttentionPlan.of(self.tree.segments, self.tree.token_ids.device)

    @cached_property
    def flex_masks(self) -> dict[int | None, Any]:
        """FlexAttention block masks by window."""
        return {}


@dataclass(frozen=True)
class Scores:
    """How scores are made from q and k: scale, softcap (0: none), window in path depth (0: none), positions [N]."""

    scale: float
    softcap: float
    window: int
    positions: Tensor


def _is_plain(scores: Scores, query: Tensor) -> bool:
    """Whether the fused kernels serve: no window or softcap, and a dtype that they take on this device."""
    if scores.softcap or scores.window:
        return False
    if query.device.type == "cpu":
        return query.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256


def _forward_block(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Fused kernel. q [B, H, Q, D], k and v [B, H, K, D]; output [B, H, Q, D] and log-sum-exp [B, H, Q] in fp32."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return result[0], result[1]


def _backward_block(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given output and log-sum-exp over *all* blocks of these queries."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    q_len, k_len = q.shape[2], k.shape[2]
    nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q_len,
        k_len,
        0.0,
        causal,
        nothing,
        nothing[:1],
        scale=scale,
    )


def _plain_scores(q: Tensor, k: Tensor, how: Scores, visible: Tensor | None) -> Tensor:
    """[B, H, Q, K] in fp32 (fp64 stays), softcapped, -inf where not visible ([B, 1, Q, K] or [Q, K] bool)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * how.scale
    if how.softcap:
        s = how.softcap * torch.tanh(s / how.softcap)
    return s if visible is None else s.masked_fill(~visible, -torch.inf)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, how: Scores, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    s = _plain_scores(q, k, how, visible)
    lse = torch.logsumexp(s, dim=-1)
    p = torch.exp(s - torch.where(lse.isinf(), torch.zeros_like(lse), lse)[..., None])
    return p @ v.to(p.dtype), lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    how: Scores,
    visible: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    s = _plain_scores(q, k, how, visible)
    p = torch.exp(s - lse[..., None])
    grad = grad.to(p.dtype)
    dv = p.transpose(-1, -2) @ grad
    delta = (grad * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * (grad @ v.to(p.dtype).transpose(-1, -2) - delta)
    if how.softcap:
        # d tanh: s holds softcap * tanh(x / softcap); masked entries have p = 0 and need no care but for inf * 0
        ds = ds * (1 - (s.masked_fill(s.isinf(), 0.0) / how.softcap) ** 2)
    ds = ds * how.scale
    return ds @ k.to(p.dtype), ds.transpose(-1, -2) @ q.to(p.dtype), dv


def _visible(how: Scores, q_index: Tensor, k_index: Tensor, causal: bool) -> Tensor | None:
    """Mask of a block from path depths: [.., Q, K], or None where all is visible."""
    depth_q, depth_k = how.positions[q_index][..., :, None], how.positions[k_index][..., None, :]
    if not causal and not how.window:
        return None
    visible = torch.ones_like(depth_q >= depth_k) if not causal else depth_q >= depth_k
    return visible & (depth_q - depth_k < how.window) if how.window else visible


class _Grouped(torch.autograd.Function):
    """Blocks merged by log-sum-exp. query [H, N, D], key and value [Hkv, N, D] -> output [H, N, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, how: Scores) -> Tensor:
        heads, n, dim = query.shape
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.empty(n, heads, dim, dtype=wide, device=query.device).transpose(0, 1)
        lse = torch.empty(heads, n, dtype=wide, device=query.device)
        ctx.plan, ctx.how, ctx.fused = plan, how, _is_plain(how, query)
        for batch in plan.batches:
            o, m = _batch_forward(query, key, value, batch, how, ctx.fused)
            out[:, batch.index[batch.valid]] = o.transpose(0, 1)[:, batch.valid].to(wide)
            lse[:, batch.index[batch.valid]] = m.transpose(0, 1)[:, batch.valid].to(wide)
        for block in plan.blocks:
            for q0, q1, o, m in _block_forward(query, key, value, block, how, ctx.fused):
                if block.causal:
                    out[:, q0:q1], lse[:, q0:q1] = o, m
                else:
                    _merge(out[:, q0:q1], lse[:, q0:q1], o, m)
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        plan, how, fused, grad = ctx.plan, ctx.how, ctx.fused, grads[0]
        # Node-major, like the activations around them, so that the views that leave are contiguous again.
        dq, dk, dv = (
            torch.zeros(t.shape[1], t.shape[0], t.shape[2], dtype=lse.dtype, device=t.device).transpose(0, 1)
            for t in (query, key, value)
        )
        for batch in plan.batches:
            for target, part in zip(
                (dq, dk, dv),
                _batch_backward(grad, query, key, value, out, lse, batch, how, fused),
                strict=True,
            ):
                # Every node is in exactly one self block, and batches come first: assignment, no accumulation.
                target[:, batch.index[batch.valid]] = part.to(target.dtype)
        for block in plan.blocks:
            for (q0, q1), (k0, k1), gq, gk, gv in _block_backward(grad, query, key, value, out, lse, block, how, fused):
                dq[:, q0:q1] += gq
                dk[:, k0:k1] += gk
                dv[:, k0:k1] += gv
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def _merge(out: Tensor, lse: Tensor, o: Tensor, m: Tensor) -> None:
    """Fold another block's output and log-sum-exp into the running ones, in place."""
    total = torch.logaddexp(lse, m)
    out.mul_(torch.exp(lse - total)[..., None]).addcmul_(o.to(out.dtype), torch.exp(m - total)[..., None].to(out.dtype))
    lse.copy_(total)


def _expand(t: Tensor, heads: int) -> Tensor:
    """[B, Hkv, K, D] -> [B, H, K, D] without a copy."""
    b, kv, k, d = t.shape
    if kv == heads:
        return t
    return t[:, :, None].expand(b, kv, heads // kv, k, d).reshape(b, heads, k, d)


def _fold(t: Tensor, kv: int) -> Tensor:
    """Sum gradients [B, H, K, D] of expanded heads back to [B, Hkv, K, D]."""
    b, heads, k, d = t.shape
    return t if heads == kv else t.view(b, kv, heads // kv, k, d).sum(2)


def _batch_inputs(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t[:, batch.index].transpose(0, 1) for t in (query, key, value))
    return q, _expand(k, q.shape[1]), _expand(v, q.shape[1])


def _batch_forward(
    query: Tensor, key: Tensor, value: Tensor, batch: Batch, how: Scores, fused: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = _batch_inputs(query, key, value, batch)
    if fused:
        return _forward_block(q, k, v, True, how.scale)
    return _plain_forward(q, k, v, how, _batch_visible(batch, how))


def _batch_visible(batch: Batch, how: Scores) -> Tensor:
    """[B, 1, T, T]: causal within the segment (by place, since padding repeats a position), and the window."""
    length = batch.index.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch.index.device).tril()
    if how.window:
        place = torch.arange(length, device=batch.index.device)
        causal = causal & (place[:, None] - place[None, :] < how.window)
    return causal.expand(len(batch.index), 1, length, length)


def _batch_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    batch: Batch,
    how: Scores,
    fused: bool,
) -> tuple[Tensor, ...]:
    q, k, v = _batch_inputs(query, key, value, batch)
    # Padded queries repeat the last token; a zero gradient makes them contribute nothing.
    g = (grad[:, batch.index] * batch.valid[None, :, :, None]).transpose(0, 1)
    o, m = out[:, batch.index].transpose(0, 1), lse[:, batch.index].transpose(0, 1)
    if fused:
        parts = _backward_block(g, q, k, v, o, m, True, how.scale)
    else:
        parts = _plain_backward(g, q, k, v, o, m, how, _batch_visible(batch, how))
    kv = key.shape[0]
    folded = (parts[0], _fold(parts[1], kv), _fold(parts[2], kv))
    return tuple(part.transpose(0, 1)[:, batch.valid] for part in folded)


def _pieces(block: Block, how: Scores, fused: bool) -> list[tuple[int, int]]:
    """Query ranges of a block: whole for the fused kernels, chunks for the plain one, none where out of window."""
    if fused:
        return [(block.q0, block.q1)]
    pieces = [(a, min(a + _PLAIN_ROWS, block.q1)) for a in range(block.q0, block.q1, _PLAIN_ROWS)]
    if not how.window:
        return pieces
    last_key = int(how.positions[block.k1 - 1])
    return [(a, b) for a, b in pieces if block.causal or int(how.positions[a:b].min()) - last_key < how.window]


def _block_forward(
    query: Tensor, key: Tensor, value: Tensor, block: Block, how: Scores, fused: bool
) -> list[tuple[int, int, Tensor, Tensor]]:
    k, v = (_expand(t[None, :, block.k0 : block.k1], len(query)) for t in (key, value))
    results = []
    for q0, q1 in _pieces(block, how, fused):
        q = query[None, :, q0:q1]
        if fused:
            o, m = _forward_block(q, k, v, block.causal, how.scale)
        else:
            o, m = _plain_forward(q, k, v, how, _block_visible(block, how, q0, q1))
        results.append((q0, q1, o[0], m[0]))
    return results


def _block_visible(block: Block, how: Scores, q0: int, q1: int) -> Tensor | None:
    device = how.positions.device
    return _visible(
        how,
        torch.arange(q0, q1, device=device),
        torch.arange(block.k0, block.k1, device=device),
        block.causal,
    )


def _block_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    how: Scores,
    fused: bool,
) -> list[tuple[tuple[int, int], tuple[int, int], Tensor, Tensor, Tensor]]:
    kv = key.shape[0]
    k, v = (_expand(t[None, :, block.k0 : block.k1], len(query)) for t in (key, value))
    results = []
    for q0, q1 in _pieces(block, how, fused):
        g, q, o, m = grad[None, :, q0:q1], query[None, :, q0:q1], out[None, :, q0:q1], lse[None, :, q0:q1]
        if fused:
            gq, gk, gv = _backward_block(g, q, k, v, o, m, block.causal, how.scale)
        else:
            gq, gk, gv = _plain_backward(g, q, k, v, o, m, how, _block_visible(block, how, q0, q1))
        results.append(((q0, q1), (block.k0, block.k1), gq[0], _fold(gk, kv)[0], _fold(gv, kv)[0]))
    return results


def _flex(query: Tensor, key: Tensor, value: Tensor, context: TreeContext, how: Scores) -> Tensor:
    """FlexAttention: a key is visible to the nodes of its own subtree that come later."""
    from torch.nn.attention.flex_attention import create_block_mask

    n = query.shape[1]
    masks = context.flex_masks
    if how.window not in masks:
        subtree_end, depth, window = context.tree.subtree_end, how.positions, how.window

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < subtree_end[k])
            return seen & (depth[q] - depth[k] < window) if window else seen

        masks[how.window] = create_block_mask(visible, None, None, n, n, device=str(query.device))
    softcap = how.softcap

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    run = _compiled_flex() if query.is_cuda else _eager_flex()
    return run(
        query[None],
        key[None],
        value[None],
        score_mod=capped if softcap else None,
        block_mask=masks[how.window],
        scale=how.scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )[0]


def _eager_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention  # type: ignore[return-value]


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(_eager_flex(), dynamic=True)


_FASTER: dict[tuple[Any, ...], str] = {}


def _choose(query: Tensor, key: Tensor, value: Tensor, context: TreeContext, how: Scores) -> str:
    """The faster kernel for this size on this device, forward and backward, measured once with the real tree."""
    if context.kernel != "auto":
        return context.kernel
    if not query.is_cuda:
        return "grouped"
    blocks = len(context.plan.blocks) + len(context.plan.batches)
    size = (query.shape[1].bit_length(), blocks.bit_length(), query.shape[0], query.shape[2])
    asked = (*size, query.dtype, query.device, how.window, bool(how.softcap))
    if asked not in _FASTER:
        _FASTER[asked] = min(("grouped", "flex"), key=lambda name: _measure(name, query, key, value, context, how))
    return _FASTER[asked]


def _measure(kernel: str, query: Tensor, key: Tensor, value: Tensor, context: TreeContext, how: Scores) -> float:
    best = float("inf")
    for _ in range(3):  # the first call compiles
        q, k, v = (t.detach().requires_grad_() for t in (query, key, value))
        torch.cuda.synchronize(query.device)
        began = time.perf_counter()
        with torch.enable_grad():
            _run(kernel, q, k, v, context, how).sum().backward()
        torch.cuda.synchronize(query.device)
        best = min(best, time.perf_counter() - began)
    return best


def _run(kernel: str, query: Tensor, key: Tensor, value: Tensor, context: TreeContext, how: Scores) -> Tensor:
    if kernel == "flex":
        return _flex(query, key, value, context, how)
    if kernel == "grouped":
        result = _Grouped.apply(query, key, value, context.plan, how)
        assert isinstance(result, Tensor)
        return result
    raise ModelError(f"unknown attention kernel {kernel!r}; known: auto, grouped, flex.")


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree: TreeContext | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' interface: query [1, H, N, D], key and value [1, Hkv, N, D] ->
    ([1, N, H, D], None).

    Without `tree` it is ordinary attention, so the model can still be used by anyone else. Raises ModelError for an
    argument that it doesn't implement.
    """
    if tree is None:
        return _ordinary(module, query, key, value, attention_mask, dropout, scaling, sliding_window, softcap, others)
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise ModelError(
            f"{type(module).__name__} passes {', '.join(map(repr, unknown))} to attention, which the token tree "
            "doesn't implement; set model.tree: false to train on plain rows."
        )
    how = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        window=sliding_window or 0,
        positions=tree.tree.positions,
    )
    if how.window and how.window > int(tree.tree.trie.positions.max(initial=0)):
        how = Scores(how.scale, how.softcap, 0, how.positions)  # the window never closes at this depth
    q, k, v = (_in_autocast(x[0]) for x in (query, key, value))
    return _run(_choose(q, k, v, tree, how), q, k, v, tree, how).transpose(0, 1)[None], None


def _in_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype where that is on: rotation leaves queries and keys in fp32, and values in half precision."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _ordinary(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, None]:
    if not softcap:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **others,
        )
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        shape = scores.shape[-2:]
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the attention function known to transformers under `NAME`; idempotent."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
