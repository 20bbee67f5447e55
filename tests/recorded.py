"""Recorded decisions of a tiny model, for tests: made by its own engine, with rewards of the test's choosing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sapwood.data import recordings
from sapwood.data.recordings import DecisionFile, Recorded
from sapwood.engines import Request, Sampling
from sapwood.models.identity import identity
from sapwood.models.load import ModelChoice, Policy, load_policy
from sapwood.opening import build_chat, make_engine
from sapwood.sections import ModelSection
from sapwood.types import Ids, Message

TRUNK = (Message("system", "say something"),)
#: Above the lower half of the tiny tokenizer's vocabulary.
LOW = 160


def opened(model: Path, start: Path | None = None) -> Policy:
    """The tiny model, or an adapter on it."""
    return load_policy(ModelChoice(name=str(model), init_from=start))


def low_share(ids: Ids) -> float:
    """The share of tokens in the lower half of the vocabulary: about one half before training."""
    return float(np.mean(ids < LOW))


def record(
    path: Path,
    policy: Policy,
    model: Path,
    *,
    states: int = 24,
    replies: int = 4,
    temperatures: Sequence[float] = (0.8, 1.0),
    top_k: int = 0,
    tokens: int = 5,
    reward: Callable[[Ids], float] = low_share,
    shuffled: bool = False,
    keep: float = 0.5,
    seed: int = 0,
) -> Path:
    """Sample `replies` to each state, keep the best share by reward, and write the file. shuffled: rewards are dealt to
    the replies at random before the choice."""
    chat = build_chat(policy, ModelSection(name=str(model)))
    requests, asked = [], []
    for state in range(states):
        message = Message("user", f"state {state}")
        sampling = Sampling(
            temperature=temperatures[state % len(temperatures)], top_k=top_k, max_new_tokens=tokens, ignore_eos=True
        )
        for _ in range(replies):
            number = len(requests)
            ids = chat.start((*TRUNK, message))
            requests.append(Request(number, ids, sampling, seed * 100_000 + number, str(number)))
            asked.append((message, sampling))
    done = make_engine("local", policy, {}).generate(requests)
    rewards = np.array([reward(completion.token_ids) for completion in done])
    if shuffled:
        rewards = np.random.default_rng(seed).permutation(rewards)
    cut = float(np.quantile(rewards, 1.0 - keep))
    kept = [i for i in range(len(done)) if rewards[i] >= cut]
    above = rewards[kept] - cut
    advantages = above / above.mean() if above.mean() > 0 else np.ones(len(kept))
    targets = (rewards[kept] - rewards[kept].mean()) / (rewards[kept].std() or 1.0)
    decisions = [
        Recorded(
            prompt="trunk",
            state=asked[i][0].content,
            reply=chat.decode(done[i].token_ids),
            action=(0.0,),
            token_ids=tuple(done[i].token_ids.tolist()),
            sampled_logprobs=tuple(done[i].logprobs.tolist()),
            kept_logmass=tuple(done[i].kept_logmass.tolist()),
            temperature=asked[i][1].temperature,
            reward=float(rewards[i]),
            total=float(rewards[i]),
            score=float(rewards[i]),
            advantage=float(advantage),
            value_target=float(target),
            source={"task": "t", "step": i},
        )
        for i, advantage, target in zip(kept, advantages, targets, strict=True)
    ]
    file = DecisionFile(identity(policy), {}, "reward", 0.99, {"trunk": TRUNK}, tuple(decisions))
    path.write_bytes(b"".join(recordings.chunks(file)))
    return path
