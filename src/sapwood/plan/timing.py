"""How long a run takes: the work of its passes by the speed of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sapwood.config import Recipe
from sapwood.engines._runtime import LeanRuntime
from sapwood.engines.local import LocalEngine
from sapwood.models.forward import causal_lm
from sapwood.models.load import Policy
from sapwood.parts import Parts
from sapwood.plan.machine import Speed, measure
from sapwood.plan.meter import Work
from sapwood.plan.passes import Pass
from sapwood.plan.workload import Played, Workload, nodes
from sapwood.tree import TokenTree

#: Shortest replies that the range allows for, as a share of the longest.
SHORTEST = 0.4
#: What the estimate is multiplied by for the ends of its range: speeds are measured in a moment.
FASTER, SLOWER = 0.8, 1.3
#: Seconds to import everything, and bytes a second that weights are opened with.
_START, _OPENING = 8.0, 1e9
#: Operations of a decoder layer in one decode step; times that drawing reads or writes the logits, and that AdamW does
#: a parameter.
_DECODE_CALLS, _DRAWING_PASSES, _ADAMW_PASSES = 14, 6, 14


@dataclass(frozen=True)
class Time:
    """Seconds. low, high: of the whole run; step: of one step by part, with the longest replies; evaluation: of one."""

    low: float
    high: float
    steps: int
    step: Mapping[str, float]
    evaluation: float
    evaluations: int


def estimate(recipe: Recipe, parts: Parts, work: Workload, found: Mapping[str, Pass]) -> Time:
    """Measure this machine's CPU for a second or two, and estimate."""
    speed = _speed(parts, work)
    step = {
        "sampling": _playing(parts, work.training, speed),
        "scoring": _scaled(found.get("scoring"), sum(map(nodes, work.typical.scoring)), speed),
        "learning": _learning(parts, work, found, speed),
        "updating": _updating(parts, speed),
    }
    measured = _scaled(found.get("evaluating"), sum(map(nodes, work.measured)), speed)
    played = _playing(parts, work.held_out, speed)
    evaluations = 1 + bool(recipe.eval.at_start)
    if recipe.eval.every:
        evaluations += max(parts.steps - 1, 0) // recipe.eval.every
    if not (measured or played):
        evaluations = 0
    start = _START + sum(p.numel() * p.element_size() for p in parts.policy.model.parameters()) / _OPENING
    fixed = sum(step.values()) - step["sampling"]
    low = start + parts.steps * (fixed + SHORTEST * step["sampling"]) + evaluations * (measured + SHORTEST * played)
    high = start + parts.steps * sum(step.values()) + evaluations * (measured + played)
    told = {name: seconds for name, seconds in step.items() if seconds}
    return Time(FASTER * low, SLOWER * high, parts.steps, told, measured + played, evaluations)


def _speed(parts: Parts, work: Workload) -> Speed:
    config = causal_lm(parts.policy.model).config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    batch = 1
    if isinstance(parts.engine, LocalEngine):
        batch = min(parts.engine.options.max_batch, max(work.training.episodes, work.held_out.episodes, 1))
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    shape = (heads, getattr(config, "num_key_value_heads", None) or heads, width)
    tree = TokenTree.of(work.largest)
    return measure(config.hidden_size, inner, shape, tree, batch, _dtype(parts.policy, parts))


def _dtype(policy: Policy, parts: Parts) -> torch.dtype:
    """Of products."""
    return parts.models.autocast or policy.model.get_input_embeddings().weight.dtype


def seconds(work: Work, speed: Speed) -> float:
    """Time of what a meter counted."""
    products = work.flops / speed.flops + work.attention / speed.attention
    return products + work.moved / speed.moved + (work.calls + work.products) * speed.call


def _scaled(one: Pass | None, tokens: int, speed: Speed) -> float:
    """Passes over so many tokens, told from one over fewer or more."""
    return seconds(one.work, speed) * tokens / max(one.nodes, 1) if one is not None else 0.0


def _learning(parts: Parts, work: Workload, found: Mapping[str, Pass], speed: Speed) -> float:
    tokens = sum(nodes(micro) for update in work.typical.updates for micro in update)
    return parts.algorithm.epochs * _scaled(found.get("learning"), tokens, speed)


def _updating(parts: Parts, speed: Speed) -> float:
    """The optimiser, and the engine's copies of what it changed."""
    trained = sum(p.numel() * p.element_size() for g in parts.models.parameter_groups().values() for p in g)
    updates = parts.algorithm.epochs * parts.algorithm.updates
    handed = 0.0
    if isinstance(parts.engine, LocalEngine):
        handed = 4.0 * sum(p.numel() * p.element_size() for p in parts.policy.model.parameters())
    return (updates * _ADAMW_PASSES * trained + handed) / speed.moved


def _playing(parts: Parts, played: Played, speed: Speed) -> float:
    """Prompts read once, then a decode step for every token of the longest replies."""
    if not played.episodes or not isinstance(parts.engine, LocalEngine):
        return 0.0
    model = causal_lm(parts.policy.model)
    embeddings = model.get_input_embeddings().weight.numel()
    trunk = sum(p.numel() for p in model.parameters() if p.numel() != embeddings)
    rows = min(parts.engine.options.max_batch, played.episodes)
    config = model.config.get_text_config()
    packed = embeddings
    if isinstance(runtime := parts.engine._runtime, LeanRuntime):
        packed += sum(layer.gate_up.numel() for layer in runtime._layers)
    prefill = 2.0 * trunk * played.prompt_tokens / speed.flops
    products = speed.packed * packed + speed.skinny * (trunk + embeddings - packed)
    drawing = rows * config.vocab_size * 4 * _DRAWING_PASSES / speed.moved
    step = products + drawing + config.num_hidden_layers * _DECODE_CALLS * speed.call
    return prefill + played.reply_tokens / rows * step
