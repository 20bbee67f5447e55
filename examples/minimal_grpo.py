"""GRPO from its parts, in one file that reads top to bottom: sample, reward, advantages, token tree, loss, step.

The task: reply with a number as close to the asked one as you can. Only the engine, the token tree and the model come
from the library; rewards, advantages and the loss are written out, so that each can be changed in place.

    python examples/minimal_grpo.py                         # SmolLM2-135M, some minutes on 2 cores
    python examples/minimal_grpo.py --steps 5 --group 4     # a quick look

Differences from the paper (DeepSeekMath, arXiv:2402.03300): no KL term, loss averaged over tokens (as DAPO).
"""

from __future__ import annotations

import argparse
import re

import numpy as np
import torch

from sapwood.chat import Chat
from sapwood.engines import Request, Sampling
from sapwood.engines.local import LocalEngine
from sapwood.models.forward import forward_rows
from sapwood.models.load import Policy, load_policy
from sapwood.sections import LoraSection, ModelSection
from sapwood.types import Message, Row

SYSTEM = Message("system", "You repeat numbers. Reply with the number alone.")
EXAMPLES = (
    (Message("user", "Repeat 7."), Message("assistant", "7")),
    (Message("user", "Repeat 31."), Message("assistant", "31")),
)


def prompt_of(number: int) -> list[Message]:
    """The same system message and examples for all prompts: one trunk of the token tree."""
    shots = [message for pair in EXAMPLES for message in pair]
    return [SYSTEM, *shots, Message("user", f"Repeat {number}.")]


def reward_of(reply: str, number: int) -> float:
    """1 for the number itself, less by the distance, -1 where there is no number."""
    found = re.search(r"\d{1,6}", reply)
    return max(-1.0, 1.0 - abs(int(found[0]) - number) / 50.0) if found else -1.0


def rollout(
    policy: Policy, engine: LocalEngine, chat: Chat, sampling: Sampling, numbers: np.ndarray, group: int, seed: int
) -> tuple[list[Row], np.ndarray]:
    """`group` replies to every prompt. Returns rows and rewards_PG [prompts, group]."""
    prompts = [chat.start(prompt_of(int(number))) for number in numbers]
    requests = [
        Request(p * group + g, prompt, sampling, seed=seed * 1_000_003 + p * group + g, episode=f"{p}/{g}")
        for p, prompt in enumerate(prompts)
        for g in range(group)
    ]
    rows, rewards = [], []
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        p = request.id // group
        reply_mask = np.r_[np.zeros(len(prompts[p]), bool), np.ones(len(completion.token_ids), bool)]
        row = Row(
            token_ids=np.concatenate([prompts[p], completion.token_ids]),
            loss_mask=reply_mask,
            turn=np.zeros(len(completion.token_ids), np.int32),
            sampled_logprobs=completion.logprobs,
            group=p,
        )
        rows.append(row)
        rewards.append(reward_of(chat.decode(completion.token_ids), int(numbers[p])))
    return rows, np.array(rewards, np.float32).reshape(len(prompts), group)


def advantages_of(rewards_PG: np.ndarray) -> np.ndarray:
    """Each reply against its siblings: (reward - mean) / std, by prompt."""
    mean = rewards_PG.mean(1, keepdims=True)
    return (rewards_PG - mean) / (rewards_PG.std(1, ddof=1, keepdims=True) + 1e-4)


def update(policy: Policy, optimizer: torch.optim.Optimizer, rows: list[Row], advantages: np.ndarray) -> float:
    """One policy-gradient step; every distinct prefix of the rows is computed once. Returns the mean entropy."""
    logprobs_S, entropies_S = forward_rows(policy.model, rows)
    assert entropies_S is not None
    advantages_S = torch.from_numpy(np.repeat(advantages.ravel(), [row.scored for row in rows]))
    ratio_S = torch.exp(logprobs_S - logprobs_S.detach())
    loss = -(ratio_S * advantages_S).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return float(entropies_S.mean())


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; returns the mean reward of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    policy = load_policy(ModelSection(name=given.model, lora=LoraSection(rank=8)), given.seed)
    engine, chat = LocalEngine(policy, policy.tokenizer), Chat(policy.tokenizer)
    sampling = Sampling(temperature=1.0, max_new_tokens=8, stop_token_ids=tuple(chat.end_token_ids))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=given.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(given.seed)
    curve = []
    for step in range(1, given.steps + 1):
        numbers = rng.integers(100, 1000, given.prompts)
        rows, rewards = rollout(policy, engine, chat, sampling, numbers, given.group, given.seed * 10_000 + step)
        entropy = update(policy, optimizer, rows, advantages_of(rewards))
        engine.load(policy)
        curve.append(float(rewards.mean()))
        print(f"step {step:3d}  reward {curve[-1]:+.3f}  entropy {entropy:.3f}", flush=True)
    return curve


if __name__ == "__main__":
    main()
