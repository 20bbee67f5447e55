"""PPO (arXiv 1707.06347) with a critic, as used on language models since arXiv 1909.08593.

A trajectory is an episode whose steps are its sampled tokens (or its turns); the critic's values and generalised
advantage estimation say which of them did better than expected. Departures from TRL's trainer: rewards are paid at the
token that earned them, environments with several turns included; trajectories that a budget cut short are bootstrapped
from the critic; losses are means over the whole update, so packing never changes a gradient. docs/algorithms/ppo.md
has the equations and every metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from sapwood.algorithms import Forward, LossOutput, Needs, RowBatch, Totals
from sapwood.algorithms._policy import Episode, PolicyGradient, episodes, reward_metrics, turn_rewards, without_effect
from sapwood.ops.gae import Doubles, RunningMoments, gae, whiten
from sapwood.ops.kl import KlEstimator, js_estimate, multiplicative_kl_coef, proportional_kl_coef
from sapwood.ops.losses import value_loss
from sapwood.ops.schedules import linear_to_floor
from sapwood.types import Group, Row


@dataclass(frozen=True)
class _Steps:
    """The steps of one episode: rewards, values of the states before them, and tokens of each; all [steps].

    bootstrap: value of the state after the last step.
    """

    rewards: Doubles
    values: Doubles
    tokens: NDArray[np.int64]
    bootstrap: float

    def estimate(self, gamma: float, lam: float) -> tuple[Doubles, Doubles]:
        """Advantages and returns of the tokens [T], which are those of the step that they belong to."""
        advantages = gae(self.rewards, self.values, bootstrap=self.bootstrap, gamma=gamma, lam=lam)
        return np.repeat(advantages, self.tokens), np.repeat(advantages + self.values, self.tokens)


class PPO(PolicyGradient):
    """Proximal policy optimisation with a critic. The defaults are those of TRL's trainer where it has the option."""

    group_size: int = Field(default=4, ge=1, description="attempts at each task; they share the prompt's computation")
    epochs: int = Field(default=4, ge=1, description="passes over each batch of rollouts (ppo_epochs)")

    credit_level: Literal["token", "turn"] = Field(
        default="token", description="steps of the advantage estimation: tokens, or whole turns"
    )
    gamma: float = Field(default=1.0, ge=0.0, le=1.0, description="discount per step; 1 is usual for replies")
    gae_lambda: float = Field(default=0.95, ge=0.0, le=1.0, description="lambda of GAE: 0 trusts the critic, 1 rewards")
    whiten_advantages: bool = Field(default=True, description="advantages of the batch to mean 0 and deviation 1")
    whiten_rewards: Literal["none", "batch", "running"] = Field(
        default="none",
        description="batch: rewards of steps, KL included, to deviation 1 around their mean; "
        "running: paid rewards by the running deviation of episodes' totals",
    )
    reward_clip: float | None = Field(default=None, gt=0.0, description="bound on what one turn is paid, before KL")

    clip_schedule: Literal["constant", "linear"] = Field(
        default="constant", description="linear: clip_low and clip_high fall to clip_floor"
    )
    clip_floor: float = Field(default=0.1, gt=0.0, description="smallest clip of clip_schedule: linear")
    clip_decay_updates: int | None = Field(
        default=None, ge=1, description="updates in which the line reaches 0; none: the run's steps"
    )
    value_clip: float | None = Field(
        default=0.2, gt=0.0, description="how far a value may move from the old one; none: unclipped"
    )
    value_coef: float = Field(default=0.5, gt=0.0, description="weight of the value loss")
    entropy_schedule: Literal["constant", "linear"] = Field(
        default="constant", description="linear: entropy_coef falls to entropy_floor over the run"
    )
    entropy_floor: float = Field(default=0.0, ge=0.0, description="smallest entropy_coef of entropy_schedule: linear")
    js_coef: float = Field(
        default=0.0, ge=0.0, description="weight of the sampled Jensen-Shannon estimate between old and trained policy"
    )

    kl_coef: float = Field(default=0.05, ge=0.0, description="weight of the KL divergence from the reference policy")
    kl_estimator: KlEstimator = Field(default="k1", description="estimator of the KL divergence from samples")
    kl_in: Literal["loss", "reward"] = Field(
        default="reward", description="take it from each token's reward, or add it to the loss"
    )
    kl_control: Literal["fixed", "proportional", "multiplicative"] = Field(
        default="fixed", description="how kl_coef follows the measured KL: not, by kl_target, or by kl_low and kl_high"
    )
    kl_target: float | None = Field(
        default=None, gt=0.0, description="KL per token that kl_control: proportional seeks"
    )
    kl_horizon: int = Field(default=10_000, ge=1, description="trajectories over which proportional control acts")
    kl_low: float = Field(
        default=0.01, ge=0.0, description="multiplicative: below this KL per token, kl_coef * kl_down"
    )
    kl_high: float = Field(default=0.03, gt=0.0, description="multiplicative: above this KL per token, kl_coef * kl_up")
    kl_up: float = Field(default=1.5, ge=1.0, description="factor of kl_coef above kl_high")
    kl_down: float = Field(default=0.8, gt=0.0, le=1.0, description="factor of kl_coef below kl_low")
    target_kl: float | None = Field(
        default=None, gt=0.0, description="approx_kl at which the remaining updates of a batch are skipped"
    )

    _kl_coef: float = PrivateAttr(default=0.0)
    _updates_seen: int = PrivateAttr(default=0)
    _progress: float = PrivateAttr(default=0.0)
    _episode_rewards: RunningMoments = PrivateAttr(default=RunningMoments())

    def model_post_init(self, context: Any, /) -> None:
        """Adaptive state at its start."""
        super().model_post_init(context)
        self._kl_coef = self.kl_coef

    @model_validator(mode="after")
    def _combinations(self) -> PPO:
        linear, proportional = self.clip_schedule == "linear", self.kl_control == "proportional"
        multiplicative, with_kl = self.kl_control == "multiplicative", self.kl_coef > 0.0
        several = self.epochs * self.updates > 1  # in a batch's only update the policy is still the old one
        without_effect(
            self,
            {
                "clip_floor": (linear, "clip_schedule: linear"),
                "clip_decay_updates": (linear, "clip_schedule: linear"),
                "entropy_schedule": (self.entropy_coef > 0.0, "an entropy_coef"),
                "entropy_floor": (self.entropy_schedule == "linear", "entropy_schedule: linear"),
                "kl_control": (with_kl, "a kl_coef for it to start from"),
                "target_kl": (several, "epochs or updates above 1"),
                "js_coef": (several, "epochs or updates above 1"),
                "kl_target": (proportional, "kl_control: proportional"),
                "kl_horizon": (proportional, "kl_control: proportional"),
                **dict.fromkeys(
                    ("kl_low", "kl_high", "kl_up", "kl_down"), (multiplicative, "kl_control: multiplicative")
                ),
            },
        )
        if proportional and self.kl_target is None:
            raise ValueError("kl_control: proportional needs kl_target, in nats per token (0.01 to 0.05 is common).")
        if multiplicative and self.kl_low > self.kl_high:
            raise ValueError(f"kl_low {self.kl_low} must not exceed kl_high {self.kl_high}.")
        if linear and self.clip_floor > min(self.clip_low, self.clip_high):
            raise ValueError(f"clip_floor {self.clip_floor} must not exceed clip_low and clip_high, which fall to it.")
        if self.entropy_floor > self.entropy_coef:
            raise ValueError(f"entropy_floor {self.entropy_floor} must not exceed entropy_coef {self.entropy_coef}.")
        return self

    @property
    def attempts(self) -> int:
        """The group size."""
        return self.group_size

    @property
    def needs(self) -> Needs:
        """A critic too."""
        return replace(super().needs, values=True)

    # --- schedules and adaptive state ---------------------------------------------------------------------------

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """The clip's distances from 1, below and above, as they are at this step or update."""
        if self.clip_schedule == "constant":
            return self.clip_low, self.clip_high
        by_updates = self.clip_decay_updates
        progress = self._progress if by_updates is None else self._updates_seen / by_updates
        low = linear_to_floor(self.clip_low, progress=progress, floor=self.clip_floor)
        return low, linear_to_floor(self.clip_high, progress=progress, floor=self.clip_floor)

    @property
    def kl_weight(self) -> float:
        """The adapted KL coefficient."""
        return self._kl_coef

    @property
    def entropy_weight(self) -> float:
        """The entropy coefficient at this step."""
        if self.entropy_schedule == "constant":
            return self.entropy_coef
        return linear_to_floor(self.entropy_coef, progress=self._progress, floor=self.entropy_floor)

    def begin(self, step: int, steps: int) -> dict[str, float]:
        """Set the schedules; step 1 has the full coefficients, and the line would reach 0 after the last step."""
        self._progress = (step - 1) / max(steps, 1)
        logged = {"clip_range": self.clip_bounds[1]}
        if self.kl_coef > 0.0:
            logged["kl_coef"] = self.kl_weight
        if self.entropy_coef > 0.0:
            logged["entropy_coef"] = self.entropy_weight
        return logged

    def adapt(self, metrics: Mapping[str, float]) -> bool:
        """Counts the update; True where it has gone further than target_kl."""
        self._updates_seen += 1
        return self.target_kl is not None and metrics["approx_kl"] > self.target_kl

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Adapts kl_coef to the step's `kl`, which a step without a trained row doesn't have."""
        if self.kl_control == "fixed" or "kl" not in metrics:
            return
        kl = metrics["kl"]
        if self.kl_control == "multiplicative":
            self._kl_coef = multiplicative_kl_coef(
                self._kl_coef, kl, low=self.kl_low, high=self.kl_high, up=self.kl_up, down=self.kl_down
            )
        elif self.kl_target is not None:
            self._kl_coef = proportional_kl_coef(
                self._kl_coef,
                kl,
                target=self.kl_target,
                trajectories=int(metrics["trajectories"]),
                horizon=self.kl_horizon,
            )

    def state(self) -> dict[str, Any]:
        """The adapted KL coefficient, updates counted by the clip schedule, and running reward moments."""
        return {
            "kl_coef": self._kl_coef,
            "updates": self._updates_seen,
            "episode_rewards": self._episode_rewards.to_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self._kl_coef = float(state["kl_coef"])
        self._updates_seen = int(state["updates"])
        self._episode_rewards = RunningMoments.from_state(state["episode_rewards"])

    # --- credit -------------------------------------------------------------------------------------------------

    def credit(self, groups: Sequence[Group], rows: Sequence[Row]) -> tuple[list[Row], dict[str, float]]:
        """Advantages and returns of all rows but those of failed trajectories, and metrics of the batch.

        Raises DataError for a reward that is not finite, ValueError where scores are missing.
        """
        played = episodes(groups, rows)
        metrics = reward_metrics(groups) | {"trajectories": float(len(played))}
        if not played:
            return [], metrics
        paid = self._paid(played, metrics)
        steps = [self._steps(episode, rewards) for episode, rewards in zip(played, paid, strict=True)]
        if self.whiten_rewards == "batch":
            whitened = whiten(np.concatenate([s.rewards for s in steps]), shift_mean=False)
            cuts = np.cumsum([len(s.rewards) for s in steps])[:-1]
            steps = [replace(s, rewards=r) for s, r in zip(steps, np.split(whitened, cuts), strict=True)]
        estimated = [s.estimate(self.gamma, self.gae_lambda) for s in steps]
        advantages = np.concatenate([a for a, _ in estimated])
        metrics |= {
            "returns": float(np.mean(np.concatenate([r for _, r in estimated]))),
            "values": float(np.mean(np.concatenate([e.joined("values") for e in played]))),
            "advantages": float(advantages.mean()),
            "advantages_std": float(advantages.std(ddof=1)) if advantages.size > 1 else 0.0,
        }
        if self.whiten_advantages:
            advantages = whiten(advantages)
        parts = np.split(advantages, np.cumsum([len(a) for a, _ in estimated])[:-1])
        dealt = [e.dealt(advantages=a, returns=r) for e, a, (_, r) in zip(played, parts, estimated, strict=True)]
        return [row for part in dealt for row in part], metrics

    def _paid(self, played: Sequence[Episode], metrics: dict[str, float]) -> list[Doubles]:
        """Rewards of every episode's tokens: scaled and clipped, then less the KL penalty."""
        turns = [turn_rewards(e.trajectory, e.key[1]) for e in played]
        if self.whiten_rewards == "running":
            self._episode_rewards = self._episode_rewards.seen([float(t.sum()) for t in turns])
            metrics["reward_scale"] = self._episode_rewards.std
            turns = [t / self._episode_rewards.std for t in turns]
        if self.reward_clip is not None:
            turns = [t.clip(-self.reward_clip, self.reward_clip) for t in turns]
        paid = [episode.pay(t) for episode, t in zip(played, turns, strict=True)]
        if not self.kl_in_reward:
            return paid
        kl = [np.concatenate([self._token_kl(row) for row in episode.rows]) for episode in played]
        metrics["kl"] = float(np.concatenate(kl).mean())
        metrics["kl_penalty"] = self.kl_weight * float(np.mean([k.sum() for k in kl]))
        return [p - self.kl_weight * k for p, k in zip(paid, kl, strict=True)]

    def _steps(self, episode: Episode, rewards: Doubles) -> _Steps:
        """An episode's tokens, or its turns: what each paid in all, and the value of the state that it began in."""
        values, trajectory = episode.joined("values"), episode.trajectory
        cut = trajectory.truncated and not trajectory.terminated
        bootstrap = episode.rows[-1].bootstrap if cut else 0.0
        if self.credit_level == "token":
            return _Steps(rewards, values, np.ones(len(values), np.int64), bootstrap)
        _, starts, counts = np.unique(episode.turn, return_index=True, return_counts=True)
        return _Steps(np.add.reduceat(rewards, starts), values[starts], counts, bootstrap)

    # --- loss ---------------------------------------------------------------------------------------------------

    def loss(self, forward: Forward, batch: RowBatch, totals: Totals) -> LossOutput:
        """Policy loss (with its KL, JS and entropy terms) + value_coef * value loss, as this micro-batch's share.

        forward.logprobs, forward.values [S]; totals count the update.
        """
        policy = super().loss(forward, batch, totals)
        if forward.values is None or batch.values is None or batch.returns is None:
            raise ValueError("PPO's loss needs a critic's values, old and of the forward, and returns of credit")
        errors = value_loss(forward.values, batch.values, batch.returns, self.value_clip)
        value = self._aggregate(errors, batch.lengths, totals)
        loss = policy.loss + self.value_coef * value
        metrics = policy.metrics | {"loss": loss.detach(), "value_loss": value.detach()}
        tokens = max(totals.tokens, 1)
        if self.value_clip is not None:
            free = value_loss(forward.values.detach(), batch.values, batch.returns, None)
            metrics["value_clip_fraction"] = (errors.detach() > free).float().sum() / tokens
        # In fp64, because a variance is the small difference of these two.
        returns, misses = batch.returns.double(), (batch.returns - batch.values).double()
        for name, x in (("return", returns), ("miss", misses)):
            metrics[f"_{name}"], metrics[f"_{name}_squared"] = x.sum() / tokens, x.square().sum() / tokens
        return LossOutput(loss, metrics)

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """explained_variance: 1 - Var(R - V_old) / Var(R); left out where all returns are equal."""
        if "_return" not in metrics:
            return {}
        total = metrics["_return_squared"] - metrics["_return"] ** 2
        missed = metrics["_miss_squared"] - metrics["_miss"] ** 2
        return {"explained_variance": 1.0 - missed / total} if total > 1e-12 else {}

    def _penalty(
        self, logprobs: Tensor, log_ratios: Tensor, batch: RowBatch, metrics: dict[str, Tensor]
    ) -> Tensor | None:
        """The KL to the reference where it is in the loss, and the Jensen-Shannon term to the old policy."""
        penalty = super()._penalty(logprobs, log_ratios, batch, metrics)
        if self.js_coef == 0.0:
            return penalty
        js = js_estimate(log_ratios)
        metrics["js"] = js.detach()
        return self.js_coef * js if penalty is None else penalty + self.js_coef * js


PLUGIN = PPO
