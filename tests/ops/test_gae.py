"""Generalised advantage estimation, returns and normalisation against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sapwood.ops.gae import RunningMoments, discounted, gae, whiten


def test_gae_of_an_episode_that_ended() -> None:
    # gamma 0.5, lambda 0.5. delta_2 = 2 + 0 - 1 = 1; delta_1 = 0 + 0.5 * 1 - 3 = -2.5; delta_0 = 1 + 0.5 * 3 - 2 = 0.5.
    # A_2 = 1; A_1 = -2.5 + 0.25 * 1 = -2.25; A_0 = 0.5 + 0.25 * -2.25 = -0.0625.
    advantages = gae([1.0, 0.0, 2.0], [2.0, 3.0, 1.0], bootstrap=0.0, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.0625, -2.25, 1.0]


def test_gae_of_an_episode_that_was_cut() -> None:
    # As above with V = 4 after the end: delta_2 = 2 + 0.5 * 4 - 1 = 3; A_2 = 3; A_1 = -2.5 + 0.75 = -1.75;
    # A_0 = 0.5 - 0.4375 = 0.0625.
    advantages = gae([1.0, 0.0, 2.0], [2.0, 3.0, 1.0], bootstrap=4.0, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.0625, -1.75, 3.0]


def test_lambda_chooses_between_critic_and_rewards() -> None:
    rewards, values = [1.0, 2.0, 4.0], [0.5, 0.25, 1.0]
    # lambda 0: one-step errors, 1 + 0.25 - 0.5, 2 + 1 - 0.25, 4 - 1. lambda 1: returns 7, 6, 4 less the values.
    assert gae(rewards, values, bootstrap=0.0, gamma=1.0, lam=0.0).tolist() == [0.75, 2.75, 3.0]
    assert gae(rewards, values, bootstrap=0.0, gamma=1.0, lam=1.0).tolist() == [6.5, 5.75, 3.0]


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards = np.array([1.0, -2.0, 0.5, 3.0])
    assert gae(rewards, discounted(rewards, 0.9), bootstrap=0.0, gamma=0.9, lam=0.7) == pytest.approx([0.0] * 4)


def test_discounted_returns() -> None:
    # 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3.
    assert discounted([1.0, 2.0, 4.0], 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted([], 0.5).tolist() == []


def test_whitening() -> None:
    # (1, 2, 6): mean 3, sample variance (4 + 1 + 9) / 2 = 7.
    root = math.sqrt(7)
    assert whiten([1.0, 2.0, 6.0]) == pytest.approx([-2 / root, -1 / root, 3 / root])
    assert whiten([1.0, 2.0, 6.0], shift_mean=False) == pytest.approx([3 - 2 / root, 3 - 1 / root, 3 + 3 / root])


def test_whitening_without_spread() -> None:
    assert whiten([5.0]).tolist() == [0.0]
    assert whiten([5.0, 5.0]).tolist() == [0.0, 0.0]
    assert whiten([5.0], shift_mean=False).tolist() == [5.0]
    assert whiten([]).tolist() == []


def test_running_moments_equal_those_of_everything_seen() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.normal(3.0, 2.0, size) for size in (1, 5, 0, 12)]
    moments = RunningMoments()
    for part in parts:
        moments = moments.seen(part)
    everything = np.concatenate(parts)
    assert moments.count == 18
    assert moments.mean == pytest.approx(everything.mean())
    assert moments.std == pytest.approx(everything.std(ddof=1))
    assert RunningMoments.from_state(moments.to_state()) == moments


def test_running_moments_are_safe_to_divide_by() -> None:
    assert RunningMoments().std == 1.0
    assert RunningMoments().seen([2.0]).std == 1.0
    assert RunningMoments().seen([2.0, 2.0]).std == 1.0
    assert RunningMoments().seen([1.0, 3.0]).std == pytest.approx(math.sqrt(2))
