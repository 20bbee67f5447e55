"""The passes of a run over one micro-batch, on models without weights: how much memory and work they take.

The models' own code runs, on the meta device; two things stand in. Attention over the token tree works by the lengths
of its blocks (`sapwood.tree.attention` gathers by values, which the meta device has none of): it keeps what that keeps
and makes room for what that makes room for. The loss is a sum, as its own arrays have a few numbers a token.

Axis letters: N nodes, H heads, K key/value heads, D head width, B rows and T columns of a padded batch of segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sapwood.models.forward import Batch, Hidden, causal_lm, token_scores
from sapwood.models.load import Policy, scalar_head
from sapwood.models.precision import mixed_precision, product_dtype
from sapwood.models.role import role
from sapwood.models.roles import Models
from sapwood.ops.batch import Needs
from sapwood.plan.meter import Meter, Peak, Work, meta
from sapwood.tree import TokenTree, TreeContext
from sapwood.tree.attention import AttentionPlan
from sapwood.types import Row

NAME = "sapwood_outline"
#: Queries that the plain kernel of the tree handles at a time.
_PLAIN_ROWS = 512
#: Score matrices that the plain kernel has at once, forward and backward.
_PLAIN_FORWARD, _PLAIN_BACKWARD = 3, 4

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"


@dataclass(frozen=True)
class Lengths:
    """Blocks of an attention: (queries, keys) of each, (rows, columns) of each padded batch of short segments.

    pairs: of a query and a key that it sees; deepest: the largest position.
    """

    blocks: tuple[tuple[int, int], ...]
    batches: tuple[tuple[int, int], ...]
    pairs: int
    deepest: int

    @staticmethod
    def of_tree(tree: TokenTree, device: str) -> Lengths:
        """Those of a token tree, as it is cut up on this kind of device."""
        plan = AttentionPlan.of(tree.segments, device if device == "cpu" else "meta")
        return Lengths(
            tuple((block.q1 - block.q0, block.k1 - block.k0) for block in plan.blocks),
            tuple((batch.index.shape[0], batch.index.shape[1]) for batch in plan.batches),
            int((tree.trie.positions + 1).sum()),
            int(tree.trie.positions.max(initial=0)),
        )

    @staticmethod
    def of_rows(lengths: Sequence[int], device: str) -> Lengths:
        """Those of plain rows, padded to the longest."""
        longest = max(lengths)
        return Lengths(((longest, longest),), (), len(lengths) * longest * (longest + 1) // 2, longest - 1)


@dataclass(frozen=True)
class Outline:
    """What attention is told: the blocks, the kind of device that the plan is for, and who counts its work."""

    lengths: Lengths
    device: str
    meter: Meter

    def is_fused(self, query: Tensor, special: bool) -> bool:
        """As `sapwood.tree.attention` decides it, on the device that the plan is for."""
        if special:
            return False
        if self.device == "cpu":
            return True
        return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, output and log-sum-exp, as the tree's own attention does. query [1, H, N, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, outline: Outline, fused: bool) -> Tensor:
        batch, heads, n, dim = query.shape
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.empty(batch, n, heads, dim, dtype=wide, device=query.device).transpose(1, 2)
        lse = torch.empty(batch, heads, n, dtype=wide, device=query.device)
        _make_room(query, max(_forward_elements(query, key, outline.lengths, fused)))
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.outline, ctx.fused = outline, fused
        outline.meter.work.attention += 4.0 * heads * dim * outline.lengths.pairs
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, lse = ctx.saved_tensors
        outline = ctx.outline
        made = [
            torch.empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3], dtype=lse.dtype, device=t.device).transpose(
                1, 2
            )
            for t in (query, key, value)
        ]
        _make_room(query, max(_backward_elements(query, key, outline.lengths, ctx.fused)))
        outline.meter.work.attention += 10.0 * query.shape[1] * query.shape[3] * outline.lengths.pairs
        return made[0].to(query.dtype), made[1].to(key.dtype), made[2].to(value.dtype), None, None


def _make_room(like: Tensor, elements: int) -> None:
    """Temporaries of the largest block: alive, then gone."""
    like.new_empty(elements)


def _forward_elements(query: Tensor, key: Tensor, lengths: Lengths, fused: bool) -> list[int]:
    """Numbers that each block of the forward pass needs beside its operands."""
    heads, kv, dim = query.shape[1], key.shape[1], query.shape[3]
    expanded = 2 * heads * dim if heads != kv else 0
    found = [0]
    for queries, keys in lengths.blocks:
        scores = 0 if fused else _PLAIN_FORWARD * heads * min(queries, _PLAIN_ROWS) * keys
        found.append(keys * expanded + queries * heads * (dim + 3) + scores)
    for rows, columns in lengths.batches:
        padded = rows * columns
        scores = 0 if fused else _PLAIN_FORWARD * heads * padded * columns
        found.append(padded * ((heads + 2 * kv) * dim + expanded + 2 * heads * dim + heads) + scores)
    return found


def _backward_elements(query: Tensor, key: Tensor, lengths: Lengths, fused: bool) -> list[int]:
    """The same of the backward pass."""
    heads, kv, dim = query.shape[1], key.shape[1], query.shape[3]
    expanded = 2 * heads * dim if heads != kv else 0
    found = [0]
    for queries, keys in lengths.blocks:
        scores = 0 if fused else _PLAIN_BACKWARD * heads * min(queries, _PLAIN_ROWS) * keys
        found.append(keys * (expanded + 2 * heads * dim + 2 * kv * dim) + queries * heads * dim + scores)
    for rows, columns in lengths.batches:
        padded = rows * columns
        scores = 0 if fused else _PLAIN_BACKWARD * heads * padded * columns
        gathered = (heads + 2 * kv) * dim + expanded + 2 * heads * dim + heads
        made = 3 * heads * dim + 2 * (heads + 2 * kv) * dim
        found.append(padded * (gathered + made) + scores)
    return found


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    outline: Outline | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function behind transformers' attention interface; it takes every argument and computes nothing."""
    assert outline is not None
    # A window that never closes at this depth is none.
    special = bool(softcap) or 0 < (sliding_window or 0) <= outline.lengths.deepest
    dtype = product_dtype(query.device)
    if dtype is not None:
        query, key, value = (t.to(dtype) for t in (query, key, value))
    result = _Attention.apply(query, key, value, outline, outline.is_fused(query, special))
    assert isinstance(result, Tensor)
    return result.transpose(1, 2), None


def register() -> None:
    """Make the stand-in known to transformers under `NAME`; idempotent."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class Pass:
    """What one pass took. peak: memory at its most, by label; left: what stays (gradients); work: what was computed."""

    peak: Peak
    left: int
    work: Work
    nodes: int
    units: int


class Passes:
    """Passes of a run's models over micro-batches. device: "cpu" or "cuda", which the plan is for."""

    def __init__(self, models: Models, device: str) -> None:
        register()
        self.models, self.device = models, device
        for model in _all(models):
            model.to("meta")  # further adapters, and heads, were made on the CPU

    def learn(self, rows: Sequence[Row], needs: Needs, *, again: bool = False) -> Pass:
        """Forward and backward of the training loop. again: on top of the gradients of a micro-batch before."""
        meter = Meter(ACTIVATIONS)
        parameters = [p for group in self.models.parameter_groups().values() for p in group]
        self.models.train()
        with meter:
            for _ in range(2 if again else 1):
                self._forward_backward(rows, needs, meter, parameters)
        left, tree = meter.total, TokenTree.of(rows)
        for parameter in parameters:
            parameter.grad = None
        work = meter.work.times(0.5) if again else meter.work
        self.models.eval()
        return Pass(meter.peak, left, work, len(tree), len(tree.score_node))

    def _forward_backward(self, rows: Sequence[Row], needs: Needs, meter: Meter, parameters: Sequence[Tensor]) -> None:
        batch = _Forward(rows, self, meter)
        policy = self.models.policy
        outputs: list[Tensor] = []
        if needs.logprobs:
            logprobs, entropies = batch.logprobs(policy, entropy=needs.entropies, grad=needs.entropy_grad)
            outputs.append(logprobs)
            if entropies is not None and needs.entropy_grad:
                outputs.append(entropies)
        if needs.scores:
            outputs += batch.scalars(policy, scalar_head(policy.model))
        if needs.values:
            critic = self.models.critic
            assert critic is not None
            outputs += batch.scalars(critic.policy, critic.head, detach=critic.detach)
        loss = torch.stack([output.sum() for output in outputs if output.requires_grad]).sum()
        hooks = [p.register_post_accumulate_grad_hook(lambda p: meter.relabel([p.grad], GRADIENTS)) for p in parameters]  # type: ignore[list-item]
        meter.label = LOGITS  # the head's backward comes first
        loss.backward()
        meter.label = ACTIVATIONS
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def score(self, rows: Sequence[Row], needs: Needs) -> Pass:
        """The scoring pass: every role that `needs` asks for, without gradient."""
        meter = Meter(ACTIVATIONS)
        with meter:
            batch = _Forward(rows, self, meter)
            if needs.old_logprobs:
                batch.logprobs(self.models.policy, entropy=False)
            if needs.reference_logprobs and self.models.reference is not None:
                batch.logprobs(self.models.reference, entropy=False)
            if needs.values and self.models.critic is not None:
                batch.scalars(self.models.critic.policy, self.models.critic.head)
        tree = TokenTree.of(rows)
        return Pass(meter.peak, meter.total, meter.work, len(tree), len(tree.score_node))

    @torch.no_grad()
    def measure(self, rows: Sequence[Row], needs: Needs) -> Pass:
        """The training forward without gradient, as held-out records are measured."""
        meter = Meter(ACTIVATIONS)
        with meter:
            batch = _Forward(rows, self, meter)
            if needs.logprobs:
                batch.logprobs(self.models.policy, entropy=needs.entropies)
            if needs.scores:
                batch.scalars(self.models.policy, scalar_head(self.models.policy.model))
        tree = TokenTree.of(rows)
        return Pass(meter.peak, meter.total, meter.work, len(tree), len(tree.score_node))

    @torch.no_grad()
    def read(self, policy: Policy, head: torch.nn.Module, rows: Sequence[Row]) -> Pass:
        """A reward model's pass."""
        policy.model.to("meta")
        head.to("meta")
        meter = Meter(ACTIVATIONS)
        with meter:
            _Forward(rows, self, meter).scalars(policy, head)
        tree = TokenTree.of(rows)
        return Pass(meter.peak, meter.total, meter.work, len(tree), 0)


def _head_is_through(meter: Meter, _: Tensor) -> None:
    """Called with the gradient of the last hidden states. No method of `_Forward`, which would outlive its pass."""
    meter.label = ACTIVATIONS


def _all(models: Models) -> list[torch.nn.Module]:
    """Every module of every role; a module that several share may come several times."""
    found = [models.policy.model]
    if models.critic is not None:
        found += [models.critic.policy.model, models.critic.head]
    return found + ([models.reference.model] if models.reference is not None else [])


class _Forward:
    """Forwards over one micro-batch; a trunk runs once for each adapter of each model, as in `Models.forward`."""

    def __init__(self, rows: Sequence[Row], passes: Passes, meter: Meter) -> None:
        tree = TokenTree.of(rows)
        # What is looked at by value stays: the pairs that decide the chunks of the head.
        placed = replace(
            tree,
            token_ids=meta(tree.token_ids),
            positions=meta(tree.positions),
            unit_temperature=meta(tree.unit_temperature),
        )
        self.batch = Batch(rows, TreeContext(placed))
        self.passes, self.meter = passes, meter
        self._hidden: dict[tuple[int, str | None], Hidden] = {}

    def hidden(self, policy: Policy) -> Hidden:
        """Last hidden states in this policy's role."""
        key = (id(policy.model), policy.role)
        if key not in self._hidden:
            with role(policy.role), mixed_precision("meta", self.passes.models.autocast):
                states = self._trunk(policy)
            if states.requires_grad:
                states.register_hook(partial(_head_is_through, self.meter))
            self._hidden[key] = Hidden(self.batch, states, ())
        return self._hidden[key]

    def _trunk(self, policy: Policy) -> Tensor:
        base = causal_lm(policy.model)
        tree = self.batch.tree
        if policy.fallback is None:
            lengths = Lengths.of_tree(tree, self.passes.device)
            ids, positions = tree.token_ids[None], tree.positions[None]
        else:
            sizes = [len(row.token_ids) for row in self.batch.rows]
            lengths = Lengths.of_rows(sizes, self.passes.device)
            ids = torch.empty(len(sizes), max(sizes), dtype=torch.long, device="meta")
            positions = torch.empty_like(ids)
        # For good, as a checkpointed layer asks again in its backward pass; an outline serves nothing else.
        base.set_attn_implementation(NAME)
        states = base.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.zeros(1, 1, 1, 1, device="meta"),
            use_cache=False,
            outline=Outline(lengths, self.passes.device, self.meter),
        ).last_hidden_state
        return states[0] if policy.fallback is None else states.flatten(0, 1)[: len(tree)]

    def logprobs(self, policy: Policy, *, entropy: bool, grad: bool = False) -> tuple[Tensor, Tensor | None]:
        hidden = self.hidden(policy)
        with (
            role(policy.role),
            mixed_precision("meta", self.passes.models.autocast),
            self.meter.labelled(LOGITS),
        ):
            return token_scores(policy.model, hidden, entropy=entropy, entropy_grad=grad)

    def scalars(self, policy: Policy, head: torch.nn.Module, *, detach: bool = False) -> list[Tensor]:
        hidden = self.hidden(policy)
        with self.meter.labelled(LOGITS):
            return list((hidden.detach() if detach else hidden).scalars(head))
