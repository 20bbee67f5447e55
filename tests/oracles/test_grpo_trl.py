"""GRPO against TRL's own code: loss, gradient, metrics, advantages, in-reward KL and gap weights.

TRL's methods run unbound on a stand-in `self` that hands them our tensors, so no model, data set or network is
needed and every branch of its loss is reached.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood.algorithms import Forward, RowBatch, Totals
from sapwood.algorithms.grpo import GRPO
from sapwood.ops.losses import gap_weights
from sapwood.types import Group, Row, StopReason, Task, Trajectory, Turn

GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle").GRPOTrainer
RLOOTrainer = pytest.importorskip("trl.trainer.rloo_trainer", reason="TRL is the oracle").RLOOTrainer

LENGTHS = (3, 1, 5, 2)
WIDTH = max(LENGTHS)


def accelerator() -> SimpleNamespace:
    """One process: every collective is the identity."""
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )


class Batch:
    """Random rows in both shapes: padded [B, T] for TRL and flat [S] for Sapwood."""

    def __init__(self, seed: int, reference: bool, several_updates: bool) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(scale: float) -> Tensor:
            return scale * torch.randn(len(LENGTHS), WIDTH, generator=generator)

        self.mask = torch.arange(WIDTH)[None, :] < torch.tensor(LENGTHS)[:, None]
        self.logprobs = -1.5 + draw(0.5)
        self.old = self.logprobs + draw(0.35) if several_updates else None
        self.reference = self.logprobs + draw(0.4) if reference else None
        self.sampled = (self.logprobs if self.old is None else self.old) + draw(0.6)
        self.entropies = draw(1.0).abs()
        # Both signs, and sizes that make every row of another weight.
        self.advantages = torch.tensor([1.3, -0.7, -1.6, 0.4])

    def flat(self, padded: Tensor | None) -> np.ndarray | None:
        return None if padded is None else padded[self.mask].numpy()

    def rows(self) -> list[Row]:
        rows = []
        for i, length in enumerate(LENGTHS):
            one = slice(i, i + 1), slice(0, length)
            rows.append(
                Row(
                    token_ids=np.arange(length + 1),
                    loss_mask=np.array([False] + [True] * length),
                    turn=np.zeros(length, np.int32),
                    sampled_logprobs=self.sampled[one].flatten().numpy(),
                    kept_logmass=np.zeros(length, np.float32),
                    old_logprobs=None if self.old is None else self.old[one].flatten().numpy(),
                    reference_logprobs=None if self.reference is None else self.reference[one].flatten().numpy(),
                    advantages=np.full(length, float(self.advantages[i]), np.float32),
                    group=0,
                    member=i,
                )
            )
        return rows


def trl_loss(batch: Batch, *, gap: dict | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor, dict]:
    """TRL's loss, its gradients with respect to log-probabilities and entropies [B, T], and its metrics."""
    logprobs = batch.logprobs.clone().requires_grad_()
    entropies = batch.entropies.clone().requires_grad_()
    settings = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "max_completion_length": 32,
        "entropy_coef": 0.0,
    } | {key: value for key, value in options.items() if key not in ("delta", "use_bias_correction_kl")}
    trainer = SimpleNamespace(
        **settings,
        args=SimpleNamespace(
            delta=options.get("delta"),
            use_bias_correction_kl=options.get("use_bias_correction_kl", True),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            steps_per_generation=1,
        ),
        accelerator=accelerator(),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropies, None),
        _entropy_bonus_enabled=settings["entropy_coef"] != 0.0,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        current_gradient_accumulation_steps=1,
        use_vllm=gap is not None,
        vllm_importance_sampling_correction=True,
    )
    trainer.accelerator.sync_gradients = True
    mask = batch.mask.long()
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long),
        "completion_mask": mask,
        "advantages": batch.advantages,
        "num_items_in_batch": mask.sum(),
    }
    if batch.old is not None:
        inputs["old_per_token_logps"] = batch.old
    if batch.reference is not None:
        inputs["ref_per_token_logps"] = batch.reference
    if gap is not None:
        inputs["importance_sampling_ratio"] = trl_scored(batch, **gap)["importance_sampling_ratio"]
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    gradient, entropy_gradient = torch.autograd.grad(loss, (logprobs, entropies), allow_unused=True)
    if entropy_gradient is None:
        entropy_gradient = torch.zeros_like(entropies)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradient, entropy_gradient, metrics


def our_loss(batch: Batch, algorithm: GRPO) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """The same from Sapwood, gradients flat [S]."""
    rows = batch.rows()
    logprobs = batch.logprobs[batch.mask].clone().requires_grad_()
    entropies = batch.entropies[batch.mask].clone().requires_grad_()
    output = algorithm.loss(Forward(logprobs, entropies), RowBatch.of(rows), Totals.of(rows))
    gradient, entropy_gradient = torch.autograd.grad(output.loss, (logprobs, entropies), allow_unused=True)
    if entropy_gradient is None:
        entropy_gradient = torch.zeros_like(entropies)
    return output.loss.detach(), gradient, entropy_gradient, {k: float(v) for k, v in output.metrics.items()}


# name -> (TRL's options, ours)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({}, {}),
    "grpo": ({"loss_type": "grpo"}, {"aggregation": "sequence"}),
    # bnpo divides by the micro-batch's own tokens: with one micro-batch that is the update's count.
    "bnpo": ({"loss_type": "bnpo"}, {"aggregation": "token"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregation": "constant", "constant_length": 32}),
    "clip higher": ({"epsilon_high": 0.28}, {"clip_high": 0.28}),
    "narrow clip": ({"epsilon_low": 0.1, "epsilon_high": 0.05}, {"clip_low": 0.1, "clip_high": 0.05}),
    "delta": ({"delta": 1.3}, {"clip_dual": 1.3}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-2, "epsilon_high": 4e-2},
        {"aggregation": "sequence", "ratio_level": "sequence", "clip_low": 3e-2, "clip_high": 4e-2},
    ),
    "sequence ratio, token mean": ({"importance_sampling_level": "sequence"}, {"ratio_level": "sequence"}),
    "sequence ratio, constant": (
        {"importance_sampling_level": "sequence", "loss_type": "dr_grpo"},
        {"ratio_level": "sequence", "aggregation": "constant", "constant_length": 32},
    ),
    # luspo sums each row and averages over rows: a constant length of one token.
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"ratio_level": "sequence", "aggregation": "constant", "constant_length": 1},
    ),
    # TRL's epsilon_high is the cap itself for cispo; ours is the distance from 1.
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.25}, {"surrogate": "cispo", "clip_high": 0.25}),
    "sapo": ({"loss_type": "sapo"}, {"surrogate": "sapo", "aggregation": "sequence"}),
    "vespo": ({"loss_type": "vespo"}, {"surrogate": "vespo"}),
    "kl": ({"beta": 0.1}, {"kl_coef": 0.1}),
    "kl without ratio": (
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"kl_coef": 0.1, "kl_ratio_weight": False},
    ),
    "kl, grpo": ({"beta": 0.1, "loss_type": "grpo"}, {"kl_coef": 0.1, "aggregation": "sequence"}),
    "kl, gspo": (
        {"beta": 0.1, "loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"kl_coef": 0.1, "aggregation": "sequence", "ratio_level": "sequence"},
    ),
    "entropy": ({"entropy_coef": 0.05}, {"entropy_coef": 0.05}),
    "entropy, grpo": ({"entropy_coef": 0.05, "loss_type": "grpo"}, {"entropy_coef": 0.05, "aggregation": "sequence"}),
    "all at once": (
        {"beta": 0.2, "entropy_coef": 0.01, "epsilon_high": 0.28, "delta": 1.5},
        {"kl_coef": 0.2, "entropy_coef": 0.01, "clip_high": 0.28, "clip_dual": 1.5},
    ),
}


@pytest.mark.parametrize("several_updates", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient(name: str, several_updates: bool) -> None:
    theirs, ours = VARIANTS[name]
    for seed in range(3):
        batch = Batch(seed, reference="beta" in theirs, several_updates=several_updates)
        loss, gradient, entropy_gradient, metrics = our_loss(batch, GRPO(epochs=2 if several_updates else 1, **ours))
        expected, expected_gradient, expected_entropy_gradient, expected_metrics = trl_loss(batch, **theirs)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected_gradient[batch.mask], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entropy_gradient, expected_entropy_gradient[batch.mask], rtol=1e-5, atol=1e-7)
        assert not expected_gradient[~batch.mask].any()
        assert metrics["entropy"] == pytest.approx(expected_metrics["entropy"], rel=1e-5)


def test_clip_metrics() -> None:
    batch = Batch(5, reference=False, several_updates=True)
    metrics = our_loss(batch, GRPO(epochs=2, clip_low=0.1))[3]
    expected = trl_loss(batch, epsilon_low=0.1)[3]
    assert expected["clip_ratio/low_mean"] > 0.0
    assert expected["clip_ratio/high_mean"] > 0.0
    assert metrics["clip_fraction_low"] == pytest.approx(expected["clip_ratio/low_mean"], rel=1e-6)
    assert metrics["clip_fraction_high"] == pytest.approx(expected["clip_ratio/high_mean"], rel=1e-6)


def test_kl_metric() -> None:
    # TRL logs the KL after its ratio weight, so compare where it applies none.
    batch = Batch(1, reference=True, several_updates=True)
    metrics = our_loss(batch, GRPO(epochs=2, kl_coef=0.1))[3]
    expected = trl_loss(batch, beta=0.1, use_bias_correction_kl=False)[3]
    assert metrics["kl"] == pytest.approx(expected["kl"], rel=1e-5)


# --- what TRL computes while it scores rollouts ---------------------------------------------------------------


def trl_scored(
    batch: Batch,
    *,
    rewards: list[float] | None = None,
    scale: str = "group",
    group_size: int = 2,
    mode: str | None = None,
    cap: float | None = 2.0,
    floor: float | None = None,
    trainer_class: Any = None,
    beta: float = 0.0,
) -> dict[str, Tensor]:
    """TRL's `_generate_and_score_completions` on this batch: advantages, and gap weights if `mode` is given."""
    trainer_class = trainer_class or GRPOTrainer
    trainer = MagicMock()
    trainer.accelerator = accelerator()
    trainer.model = torch.nn.Linear(1, 1)
    trainer.model.is_gradient_checkpointing = False
    trainer.environment_factories = trainer.environments = None
    trainer.pad_to_multiple_of = None
    trainer.mask_truncated_completions = False
    trainer.tools = []
    trainer._is_vlm = False
    trainer._tokenizer.pad_token_id = 0
    trainer.reward_func_names = ["env"]
    trainer.reward_weights = torch.ones(1)
    trainer.reward_clip_range = None
    trainer.normalize_advantages = False
    trainer.multi_objective_aggregation = "sum_then_normalize"
    trainer.scale_rewards = scale
    trainer.num_generations = trainer.num_generations_eval = group_size
    trainer.beta = beta
    trainer.args.gradient_accumulation_steps = trainer.args.steps_per_generation = trainer.num_iterations = 1
    trainer.use_vllm = mode is not None
    trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_importance_sampling_clip_max = cap
    trainer.vllm_importance_sampling_clip_min = floor
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._calculate_rewards.return_value = torch.tensor(rewards or [0.0] * len(LENGTHS))[:, None]
    old = batch.logprobs if batch.old is None else batch.old
    passes = iter([old, batch.reference])
    trainer._get_per_token_logps_and_entropies.side_effect = lambda *args, **kwargs: (next(passes), None, None)
    ids = [[1] * length for length in LENGTHS]
    sampled = [batch.sampled[i, :length].tolist() for i, length in enumerate(LENGTHS)]
    prompts, texts = [[1]] * len(LENGTHS), [""] * len(LENGTHS)
    trainer._generate.return_value = (
        (prompts, ids, None, texts, sampled if mode else None, {}, None, None)
        if trainer_class is GRPOTrainer
        else (prompts, ids, texts)
    )
    trainer.ref_model = MagicMock() if beta else None
    return trainer_class._generate_and_score_completions(trainer, [{"prompt": "x"}] * len(LENGTHS))


def scored_groups(batch: Batch, rewards: list[float], size: int) -> tuple[list[Group], list[Row]]:
    """The batch as groups of `size` with these rewards; one turn each."""
    groups, rows = [], batch.rows()
    for start in range(0, len(rewards), size):
        members = []
        for i in range(start, start + size):
            tokens, zeros = np.zeros(LENGTHS[i], np.int64), np.zeros(LENGTHS[i], np.float32)
            turn = Turn(np.zeros(1, np.int64), tokens, zeros, zeros, StopReason.EOS, "")
            members.append(Trajectory(Task(str(start)), [turn], reward=rewards[i]))
            rows[i].group, rows[i].member = start // size, i - start
        groups.append(Group(Task(str(start)), members))
    return groups, rows


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale: Any, size: int) -> None:
    rewards = [1.0, 0.25, -2.0, 0.5]
    batch = Batch(0, reference=False, several_updates=False)
    expected = trl_scored(batch, rewards=rewards, scale=scale, group_size=size)["advantages"]
    credited, _ = GRPO(group_size=size, scale_rewards=scale).credit(*scored_groups(batch, rewards, size))
    for row, value in zip(credited, expected.tolist(), strict=True):
        assert row.advantages == pytest.approx(np.full(row.scored, value), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_with_kl_in_the_reward(beta: float) -> None:
    rewards = [1.0, 0.25, -2.0, 0.5]
    batch = Batch(2, reference=True, several_updates=True)
    expected = trl_scored(batch, rewards=rewards, group_size=4, trainer_class=RLOOTrainer, beta=beta)["advantages"]
    penalty: dict[str, Any] = {"kl_coef": beta, "kl_estimator": "k1", "kl_in": "reward"} if beta else {}
    rloo = GRPO(group_size=4, baseline="loo", scale_rewards="none", **penalty)
    credited, _ = rloo.credit(*scored_groups(batch, rewards, 4))
    for row, value in zip(credited, expected.tolist(), strict=True):
        assert row.advantages == pytest.approx(np.full(row.scored, value), rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("floor", [None, 0.5])
def test_gap_weights(level: Any, mode: Any, floor: float | None) -> None:
    batch = Batch(6, reference=False, several_updates=True)  # sums 0.74, 1.01, 5.48, 0.26: kept and cut
    assert batch.old is not None
    expected = trl_scored(batch, mode=f"{level}_{mode}", cap=1.4, floor=floor)["importance_sampling_ratio"]
    gap = (batch.old - batch.sampled)[batch.mask]
    weights = gap_weights(gap, torch.tensor(LENGTHS), level=level, mode=mode, cap=1.4, floor=floor)
    torch.testing.assert_close(weights, expected.expand_as(batch.mask)[batch.mask], rtol=1e-5, atol=0.0)
    assert len(set(weights.tolist())) > 1


@pytest.mark.parametrize("several_updates", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_with_gap_correction(level: Any, several_updates: bool) -> None:
    batch = Batch(4, reference=True, several_updates=several_updates)
    ours = GRPO(epochs=2 if several_updates else 1, kl_coef=0.1, gap_correction=level, gap_mode="mask", gap_cap=1.5)
    loss, gradient, _, metrics = our_loss(batch, ours)
    expected, expected_gradient, _, _ = trl_loss(batch, beta=0.1, gap={"mode": f"{level}_mask", "cap": 1.5})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient[batch.mask], rtol=1e-5, atol=1e-6)
    assert metrics["gap_weight"] != pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_vespo_with_gap_correction(mode: Any) -> None:
    batch = Batch(5, reference=False, several_updates=True)
    ours = GRPO(epochs=2, surrogate="vespo", gap_correction="token", gap_mode=mode, gap_cap=1.5)
    loss, gradient, _, _ = our_loss(batch, ours)
    gap = {"mode": f"token_{mode}", "cap": 1.5}
    expected, expected_gradient, _, _ = trl_loss(batch, loss_type="vespo", gap=gap)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient[batch.mask], rtol=1e-5, atol=1e-6)
