"""PPO against Stable-Baselines3's own code: advantages and returns of its buffer, losses and metrics of its `train`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.algorithms.test_grpo import attempt, row

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.ppo import PPO
from sapwood.ops.gae import gae, whiten
from sapwood.types import Group, Row, Task

sb3 = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is the oracle")
gymnasium = pytest.importorskip("gymnasium", reason="Stable-Baselines3 is the oracle")

STEPS, ENVS = 12, 3


class Nowhere(gymnasium.Env):
    """Spaces only: the buffer is filled by hand."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(2, np.float32), {}


class Numbers:
    """What an episode of every environment looked like, in both programs. All [STEPS, ENVS]."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)

        def draw(scale: float) -> np.ndarray:
            return (scale * generator.standard_normal((STEPS, ENVS))).astype(np.float32)

        self.rewards, self.values = draw(1.0), draw(0.7)
        self.old_logprobs = -1.1 + draw(0.2)
        self.logprobs = self.old_logprobs + draw(0.25)
        self.entropies = draw(1.0)
        self.new_values = self.values + draw(0.3)
        self.last_values = draw(1.0)[0]
        # Environment 0 is cut at the buffer's end; 1 ends there; 2 ends at step 5 and is cut at the end.
        self.starts = np.zeros((STEPS, ENVS), np.float32)
        self.starts[0] = 1.0
        self.starts[5, 2] = 1.0
        self.dones = np.array([False, True, False])

    def buffer(self, gamma: float, lam: float) -> Any:
        """Stable-Baselines3's buffer, filled and computed by its own methods."""
        from stable_baselines3.common.buffers import RolloutBuffer

        buffer = RolloutBuffer(
            STEPS, Nowhere.observation_space, Nowhere.action_space, gae_lambda=lam, gamma=gamma, n_envs=ENVS
        )
        for t in range(STEPS):
            # The observation says which (step, environment) it is, so that a policy can look its numbers up.
            index = np.stack([np.full(ENVS, t), np.arange(ENVS)], axis=1).astype(np.float32)
            buffer.add(
                index,
                np.zeros((ENVS, 1)),
                self.rewards[t],
                self.starts[t],
                torch.from_numpy(self.values[t]),
                torch.from_numpy(self.old_logprobs[t]),
            )
        buffer.compute_returns_and_advantage(torch.from_numpy(self.last_values), self.dones)
        return buffer

    def episodes(self) -> list[tuple[int, slice, bool]]:
        """(environment, steps, whether it was cut) of each episode."""
        return [
            (0, slice(0, STEPS), True),
            (1, slice(0, STEPS), False),
            (2, slice(0, 5), False),
            (2, slice(5, STEPS), True),
        ]


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_and_returns(gamma: float, lam: float) -> None:
    numbers = Numbers(0)
    buffer = numbers.buffer(gamma, lam)
    for env, steps, cut in numbers.episodes():
        values = numbers.values[steps, env]
        advantages = gae(
            numbers.rewards[steps, env],
            values,
            bootstrap=float(numbers.last_values[env]) if cut else 0.0,
            gamma=gamma,
            lam=lam,
        )
        np.testing.assert_allclose(advantages, buffer.advantages[steps, env], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(advantages + values, buffer.returns[steps, env], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "turn"])
def test_credit(level: Any) -> None:
    """Through `PPO.credit`: an episode's steps are one-token turns, and what is cut is bootstrapped."""
    numbers = Numbers(1)
    buffer = numbers.buffer(0.99, 0.95)
    groups, rows = [], []
    for g, (env, steps, cut) in enumerate(numbers.episodes()):
        rewards = numbers.rewards[steps, env].astype(float)
        played = attempt(float(rewards.sum()), tuple(rewards.tolist()), truncated=cut, terminated=not cut)
        groups.append(Group(Task(f"task-{g}"), [played]))
        made = row(g, 0, tuple(range(len(rewards))), values=numbers.values[steps, env])
        made.bootstrap = float(numbers.last_values[env])
        rows.append(made)
    algorithm = PPO(kl_coef=0.0, whiten_advantages=False, gamma=0.99, gae_lambda=0.95, credit_level=level)
    kept, _ = algorithm.credit(groups, rows)
    for made, (env, steps, _) in zip(kept, numbers.episodes(), strict=True):
        assert made.advantages is not None
        assert made.returns is not None
        np.testing.assert_allclose(made.advantages, buffer.advantages[steps, env], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(made.returns, buffer.returns[steps, env], rtol=1e-5, atol=1e-5)


class Lookup(torch.nn.Module):
    """A policy of Stable-Baselines3's interface whose answers are parameters, so that gradients can be read."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.logprobs = torch.nn.Parameter(torch.from_numpy(numbers.logprobs.copy()))
        self.values = torch.nn.Parameter(torch.from_numpy(numbers.new_values.copy()))
        self.entropies = torch.nn.Parameter(torch.from_numpy(numbers.entropies.copy()))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.0)

    def set_training_mode(self, mode: bool) -> None:
        self.train(mode)

    def evaluate_actions(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        step, env = observations.long().unbind(1)
        return self.values[step, env], self.logprobs[step, env], self.entropies[step, env]


def sb3_train(
    numbers: Numbers, batch_size: int, policy: type[Lookup] = Lookup, **options: Any
) -> tuple[dict[str, float], Lookup, Any]:
    """One epoch of its `PPO.train` over the filled buffer: what it logs, the policy with gradients, and the buffer."""
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import DummyVecEnv

    model = sb3.PPO(
        "MlpPolicy",
        DummyVecEnv([Nowhere] * ENVS),
        n_steps=STEPS,
        batch_size=batch_size,
        n_epochs=1,
        max_grad_norm=1e9,
        device="cpu",
        **options,
    )
    model.rollout_buffer = numbers.buffer(0.99, 0.95)
    model.policy = policy(numbers)
    model.set_logger(Logger(None, []))
    model.train()
    return dict(model.logger.name_to_value), model.policy, model.rollout_buffer


def our_update(numbers: Numbers, buffer: Any, algorithm: PPO, whitened: bool) -> tuple[Any, torch.Tensor]:
    """The same numbers as one row per environment; the loss output, and inputs [3, ENVS, STEPS] with gradients."""
    advantages = np.concatenate([buffer_column(buffer.advantages, e) for e in range(ENVS)])
    if whitened:
        advantages = whiten(advantages)
    returns = np.concatenate([buffer_column(buffer.returns, e) for e in range(ENVS)])
    rows: list[Row] = []
    for env in range(ENVS):
        one = slice(env * STEPS, (env + 1) * STEPS)
        arrays = {"advantages": advantages[one], "returns": returns[one]}
        arrays |= {"values": numbers.values[:, env], "old_logprobs": numbers.old_logprobs[:, env]}
        rows.append(row(0, env, (0,) * STEPS, **arrays))
    inputs = torch.stack(
        [torch.from_numpy(x.T.copy()) for x in (numbers.logprobs, numbers.entropies, numbers.new_values)]
    ).requires_grad_()
    forward = Forward(inputs[0].flatten(), inputs[1].flatten(), inputs[2].flatten())
    output = algorithm.loss(forward, RowBatch.of(rows), Totals.of(rows))
    output.loss.backward()
    assert inputs.grad is not None
    return output, inputs.grad


def buffer_column(values: np.ndarray, env: int) -> np.ndarray:
    """One environment's steps; `get` has flattened the buffer's arrays to [ENVS * STEPS, ...] by then."""
    return values.reshape(ENVS, STEPS)[env]


@pytest.mark.parametrize("whitened", [False, True])
def test_loss_gradients_and_metrics(whitened: bool) -> None:
    numbers = Numbers(2)
    logged, policy, buffer = sb3_train(
        numbers, STEPS * ENVS, clip_range=0.2, ent_coef=0.01, vf_coef=0.5, normalize_advantage=whitened
    )
    # Stable-Baselines3's squared error has no factor 1/2.
    algorithm = PPO(kl_coef=0.0, value_clip=None, value_coef=1.0, entropy_coef=0.01)
    output, gradients = our_update(numbers, buffer, algorithm, whitened)
    metrics = {name: float(value) for name, value in output.metrics.items()}
    assert metrics["policy_loss"] == pytest.approx(logged["train/policy_gradient_loss"], rel=1e-5, abs=1e-6)
    assert 2 * metrics["value_loss"] == pytest.approx(logged["train/value_loss"], rel=1e-5)
    assert metrics["entropy"] == pytest.approx(-logged["train/entropy_loss"], rel=1e-5)
    assert metrics["loss"] == pytest.approx(logged["train/loss"], rel=1e-5)
    assert metrics["approx_kl"] == pytest.approx(logged["train/approx_kl"], rel=1e-5)
    explained = algorithm.derived(metrics)["explained_variance"]
    assert explained == pytest.approx(logged["train/explained_variance"], rel=1e-4)
    for ours, theirs in zip(gradients, (policy.logprobs, policy.entropies, policy.values), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs.grad.T, rtol=1e-5, atol=1e-7)
    # Its clip fraction counts every ratio outside; ours are those that lost their gradient.
    outside = float((np.abs(np.exp(numbers.logprobs - numbers.old_logprobs) - 1) > 0.2).mean())
    assert logged["train/clip_fraction"] == pytest.approx(outside)
    lost = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert lost == pytest.approx(float((gradients[0] == 0.0).float().mean()))
    assert 0.0 < lost < outside


def test_clipped_value_loss() -> None:
    """Element by element: ours is the larger of its unclipped and its clipped error, halved."""
    numbers = Numbers(3)
    algorithm = PPO(kl_coef=0.0, value_clip=0.2)
    errors = {clip: sb3_value_errors(numbers, clip) for clip in (None, 0.2)}
    largest = float(np.maximum(errors[None], errors[0.2]).mean())
    buffer = numbers.buffer(0.99, 0.95)
    for _ in buffer.get(STEPS * ENVS):
        pass
    output, _ = our_update(numbers, buffer, algorithm, whitened=False)
    assert 2 * float(output.metrics["value_loss"]) == pytest.approx(largest, rel=1e-5)
    share = float((errors[0.2] > errors[None]).mean())
    assert float(output.metrics["value_clip_fraction"]) == pytest.approx(share)
    assert 0.0 < share < 1.0


def sb3_value_errors(numbers: Numbers, clip: float | None) -> np.ndarray:
    """Its value loss of every single step [STEPS, ENVS]: mini-batches of one, read off before they are averaged."""
    errors = np.zeros((STEPS, ENVS))
    seen: list[tuple[int, int]] = []

    class Watching(Lookup):
        def evaluate_actions(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
            step, env = observations.long()[0].tolist()
            seen.append((step, env))
            return super().evaluate_actions(observations, actions)

    original = torch.nn.functional.mse_loss

    def recorded(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        loss = original(target, value)
        errors[seen[-1]] = float(loss.detach())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "mse_loss", recorded)
        sb3_train(numbers, 1, Watching, clip_range_vf=clip, normalize_advantage=False)
    assert len(seen) == STEPS * ENVS
    return errors
