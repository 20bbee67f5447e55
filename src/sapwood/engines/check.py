"""The contract test of an engine: what `sapwood.engines` promises, tried out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sapwood.engines import Completion, Engine, Request, Sampling
from sapwood.errors import EngineError
from sapwood.types import Ids, StopReason

_TOKENS = 8


def check_engine(
    engine: Engine,
    vocab: int,
    *,
    stochastic: bool = True,
    policy: Any = None,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> None:
    """Try out an idle engine. Raises EngineError with a sentence for the first promise that it breaks.

    vocab: token ids are below it, and all below it may be prompted with; stochastic: False for an engine whose
    replies don't depend on the seed; policy: what to `load`, None to leave that out; tolerance: absolute, between
    log-probabilities of the same tokens in different company.
    """
    prompts = [np.random.default_rng([seed, i]).integers(0, vocab, 5 + 3 * i).astype(np.int64) for i in range(4)]
    full = Sampling.model_validate({"max_new_tokens": _TOKENS, "ignore_eos": True})
    greedy = full.model_copy(update={"temperature": 0.0})
    _require(engine.step() == [], "step of an engine with nothing queued must return []")
    engine.close("an episode that never was")

    together = _generate(engine, prompts, full, vocab)
    for completion in together:
        _require(completion.token_ids.size == _TOKENS, "with ignore_eos a reply must have max_new_tokens tokens")
        _require(completion.stop_reason is StopReason.LENGTH, "a reply cut by max_new_tokens must stop for length")
        _require(not completion.kept_logmass.any(), "kept_logmass must be 0 without truncation")
    _same(together, _generate(engine, prompts, full, vocab), tolerance, "the same requests again")
    _same(together[1:2], _generate(engine, prompts[1:2], full, vocab, first=1), tolerance, "a request on its own")
    backwards = _generate(engine, prompts[::-1], full, vocab, names=range(3, -1, -1))
    _same(together, backwards[::-1], tolerance, "requests in another order")
    if stochastic:
        other = _generate(engine, prompts, full, vocab, seed_offset=1000)
        differ = any((a.token_ids != b.token_ids).any() for a, b in zip(together, other, strict=True))
        _require(differ, "other seeds must give other replies")
        _truncates(engine, prompts, full, vocab)
    _streams(engine, prompts, full)
    _stops(engine, prompts, greedy, vocab)
    _continues(engine, prompts[0], greedy, tolerance)
    if policy is not None:
        before = _generate(engine, prompts, greedy, vocab)
        engine.load(policy)
        _same(before, _generate(engine, prompts, greedy, vocab), tolerance, "the same policy, loaded again")


def _request(name: int, prompt: Ids, sampling: Sampling, seed: int | None = None, episode: str = "") -> Request:
    return Request(name, prompt, sampling, name if seed is None else seed, episode or f"check/{name}")


def _generate(
    engine: Engine,
    prompts: Sequence[Ids],
    sampling: Sampling,
    vocab: int,
    *,
    first: int = 0,
    names: Sequence[int] | None = None,
    seed_offset: int = 0,
) -> list[Completion]:
    """Completions in the order of the prompts, their shapes and ranges checked."""
    names = range(first, first + len(prompts)) if names is None else names
    pairs = list(zip(names, prompts, strict=True))
    completions = engine.generate([_request(n, p, sampling, n + seed_offset) for n, p in pairs])
    _require([c.request_id for c in completions] == list(names), "generate must keep the order of its requests")
    for completion in completions:
        ids = completion.token_ids
        _require(1 <= ids.size <= sampling.max_new_tokens, "a reply must have 1 to max_new_tokens tokens")
        _require(bool(((ids >= 0) & (ids < vocab)).all()), "token ids must be below the vocabulary's size")
        for name, values in (("logprobs", completion.logprobs), ("kept_logmass", completion.kept_logmass)):
            _require(values.shape == ids.shape, f"{name} must have one entry per sampled token")
            _require(bool((np.isfinite(values) & (values <= 1e-5)).all()), f"{name} must be finite and at most 0")
    return completions


def _truncates(engine: Engine, prompts: Sequence[Ids], full: Sampling, vocab: int) -> None:
    one = _generate(engine, prompts, full.model_copy(update={"top_k": 1}), vocab)
    for completion in one:
        _require(bool((np.abs(completion.logprobs) < 1e-5).all()), "with top_k 1 every log-probability must be 0")
        _require(bool((completion.kept_logmass < 0).all()), "with top_k 1 kept_logmass must be below 0")


def _streams(engine: Engine, prompts: Sequence[Ids], full: Sampling) -> None:
    """Requests that join while others run finish too, each once."""
    engine.submit(_request(10, prompts[0], full))
    seen = [c.request_id for c in engine.step()]
    engine.submit(_request(11, prompts[1], full.model_copy(update={"max_new_tokens": 2})))
    for _ in range(4 * _TOKENS):
        if len(seen) == 2:
            break
        seen += [c.request_id for c in engine.step()]
    _require(sorted(seen) == [10, 11], "every step must advance every running request until each finished once")
    _require(engine.step() == [], "a finished request must not come back")
    engine.close("check/10")
    engine.close("check/11")


def _stops(engine: Engine, prompts: Sequence[Ids], greedy: Sampling, vocab: int) -> None:
    plain = _generate(engine, prompts[:1], greedy, vocab)[0].token_ids
    token = int(plain[_TOKENS // 2])
    expected = plain[: int(np.flatnonzero(plain == token)[0]) + 1]
    stopped = _generate(engine, prompts[:1], greedy.model_copy(update={"stop_token_ids": (token,)}), vocab)[0]
    kept = np.array_equal(stopped.token_ids, expected)
    _require(kept, "a stop token must end the reply where it first occurs, and be its last token")
    _require(stopped.stop_reason is StopReason.STOP, "a reply ended by a stop token must say so")


def _continues(engine: Engine, prompt: Ids, greedy: Sampling, tolerance: float) -> None:
    """A second turn that builds on what is kept for the episode equals one that starts from nothing."""
    first = _finish(engine, _request(20, prompt, greedy, episode="check/kept"))
    longer = np.concatenate([prompt, first.token_ids, prompt[:3]])
    kept = _finish(engine, _request(21, longer, greedy, seed=5, episode="check/kept"))
    engine.close("check/kept")
    fresh = _finish(engine, _request(21, longer, greedy, seed=5, episode="check/fresh"))
    branched = np.concatenate([prompt[:2], prompt[:1], prompt[3:]])
    _same([kept], [fresh], tolerance, "an episode's second turn")
    kept = _finish(engine, _request(22, branched, greedy, seed=6, episode="check/fresh"))
    engine.close("check/fresh")
    fresh = _finish(engine, _request(22, branched, greedy, seed=6, episode="check/other"))
    engine.close("check/other")
    _same([kept], [fresh], tolerance, "a prompt that departs from the episode's history")


def _finish(engine: Engine, request: Request) -> Completion:
    engine.submit(request)
    for _ in range(4 * _TOKENS):
        done = engine.step()
        if done:
            return done[0]
    raise EngineError(f"the engine breaks its contract: a request for {_TOKENS} tokens did not finish")


def _same(ours: Sequence[Completion], theirs: Sequence[Completion], tolerance: float, case: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        _require(np.array_equal(a.token_ids, b.token_ids), f"{case} must give the same tokens")
        _require(np.allclose(a.logprobs, b.logprobs, rtol=0, atol=tolerance), f"{case} must give the same logprobs")


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise EngineError(f"the engine breaks its contract: {promise}.")
