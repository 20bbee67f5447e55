"""What the guards look for: each a function of the history, true or false of the step that it ends with.

`docs/guards.md` lists them with their limits. A check sees medians over several steps and tests against the run's own
noise, because a false alarm teaches a user to ignore the true one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from sapwood.guards._history import WINDOW, History
from sapwood.sections import GuardLimits, WarningName

#: Steps over which a slow drift is judged.
LONG = 10
#: Steps in a row without any update, or of evaluations of a gap, that are no accident.
SHORT = 3

#: Standard errors above which a rise of the training reward is more than chance, beside a fall that is.
ROSE = 1.5

_ALL = frozenset({"rollouts", "demonstrations", "pairs", "labels", "recordings"})
_ROLLOUTS = frozenset({"rollouts"})
_DATA = _ALL - _ROLLOUTS
_RECORDINGS = frozenset({"recordings"})
#: Metrics that mean nothing else than a fault where they aren't finite.
_ALWAYS_FINITE = ("loss", "policy_loss", "value_loss", "entropy", "kl", "approx_kl", "ratio", "gap_k3")


@dataclass(frozen=True)
class Finding:
    """What is wrong, in a sentence, and the values that it speaks of."""

    message: str
    metrics: dict[str, float] = field(default_factory=dict)


Check = Callable[[History, GuardLimits], Finding | None]


def sampler_gap(h: History, limits: GuardLimits) -> Finding | None:
    """Sampler and trainer drift apart: near the bound that stops the run, or ten times the gap at the start."""
    bound, gaps = h.options.get("optim.max_gap"), h.of("gap_k3")
    gap = gaps.lately(SHORT)
    if bound is None or gap is None:
        return None
    told = {"gap_k3": gap}
    if gap > limits.sampler_gap * bound:
        return Finding(
            f"sampler and trainer disagree by {gap:.2g} nats a token, {gap / bound:.0%} of optim.max_gap, at which "
            "the run stops.",
            told,
        )
    start, now = gaps.start, gaps.lately()
    if start is not None and now is not None and now > 1e-3 and now > 10.0 * max(start, 1e-5):
        return Finding(f"the gap between sampler and trainer grew from {start:.2g} to {now:.2g} nats a token.", told)
    return None


def entropy_collapse(h: History, limits: GuardLimits) -> Finding | None:
    """Entropy fell to a small share of its start and attempts at a task are no longer different."""
    entropy = h.of("entropy")
    start, now = entropy.start, entropy.lately()
    if start is None or now is None or entropy.seen < 2 * WINDOW or now >= limits.entropy_collapse * start:
        return None
    equal, distinct = h.of("no_signal_share").lately(), h.of("distinct_replies").lately()
    known = equal is not None or distinct is not None
    alike = (equal is not None and equal >= 0.5) or (distinct is not None and distinct <= 0.25)
    if known and not alike:
        return None  # a confident policy that still tries different things
    message = f"entropy fell to {now:.3g} nats a token, {now / start:.1%} of its start ({start:.3g})"
    told = {"entropy": now}
    if equal is not None:
        message += f", and in {equal:.0%} of the groups all rewards are equal"
        told["no_signal_share"] = equal
    if distinct is not None:
        message += f", and {distinct:.0%} of the attempts at a task differ"
        told["distinct_replies"] = distinct
    return Finding(f"{message}: the policy says one thing and explores no more.", told)


def entropy_explosion(h: History, limits: GuardLimits) -> Finding | None:
    """Entropy grew to a multiple of its start: replies turn into noise."""
    entropy = h.of("entropy")
    start, now = entropy.start, entropy.lately()
    if start is None or now is None or now <= max(limits.entropy_explosion * start, start + 1.0):
        return None
    message = f"entropy grew from {start:.3g} to {now:.3g} nats a token: replies turn into noise."
    return Finding(message, {"entropy": now})


def kl_runaway(h: History, limits: GuardLimits) -> Finding | None:
    """The policy left the reference: KL above the limit, or all at once far above what it was."""
    kl = h.of("kl")
    now, last = kl.lately(SHORT), kl.last(2)
    if now is None:
        return None
    if now > limits.kl_runaway:
        return Finding(f"KL from the reference is {now:.3g} nats a token (limit {limits.kl_runaway:g}).", {"kl": now})
    before = kl.recent[:-2][-20:]
    usual = statistics.median(before) if len(before) >= LONG else math.inf
    if min(last) > max(10.0 * usual, limits.kl_runaway / 4.0):
        return Finding(
            f"KL from the reference jumped from {usual:.3g} to {last[-1]:.3g} nats a token.", {"kl": last[-1]}
        )
    return None


def policy_lag(h: History, limits: GuardLimits) -> Finding | None:
    """The updates of a batch move the policy far from the one that sampled it."""
    now = h.of("approx_kl").lately()
    if now is None or now <= limits.policy_lag:
        return None
    return Finding(
        f"the updates of a batch move the policy by {now:.3g} nats a token from the one that sampled it "
        f"(limit {limits.policy_lag:g}), so that its samples no longer speak for it.",
        {"approx_kl": now},
    )


def clip_fraction(h: History, limits: GuardLimits) -> Finding | None:
    """Too many tokens lose their gradient to the clip."""
    now = h.of("clip_fraction").lately()
    if now is None or now <= limits.clip_fraction:
        return None
    return Finding(
        f"{now:.0%} of the tokens lose their gradient to the clip (limit {limits.clip_fraction:.0%}).",
        {"clip_fraction": now},
    )


def target_kl_stops(h: History, limits: GuardLimits) -> Finding | None:
    """target_kl ends the updates of every batch after the first one."""
    planned = int(h.options.get("algorithm.epochs") or 1) * int(h.options.get("algorithm.updates") or 1)
    count = round(limits.target_kl_stops)
    updates = h.of("updates").last(count)
    if h.options.get("algorithm.target_kl") is None or planned < 2 or len(updates) < count or set(updates) != {1.0}:
        return None
    return Finding(
        f"algorithm.target_kl ended the updates after the first of {planned} in each of the last {count} steps.",
        {"updates": 1.0},
    )


def reward_hacking(h: History, limits: GuardLimits) -> Finding | None:
    """Training reward rises while the held-out return falls, or while replies change their form beyond recognition."""
    reward, held = h.of("reward"), h.held_out
    now = reward.lately()
    if now is None:
        return None
    if held.best is not None and held.fell() and reward.rise(held.best.beside) > ROSE:
        fallen = held.last[-1]
        return Finding(
            f"the held-out return fell from {held.best.value:.3g} at step {held.best.step} to {fallen.value:.3g}, "
            f"while the training reward rose to {now:.3g}.",
            {"reward": now, "eval/return": fallen.value},
        )
    if reward.rise() <= 3.0 or held.improved:
        return None
    factor, length = limits.reward_hacking, h.of("reply_tokens")
    was, tokens = length.start, length.lately(LONG)
    if was and tokens is not None and max(tokens / was, was / max(tokens, 1e-9)) >= factor and abs(tokens - was) >= 4:
        return Finding(
            f"replies went from {was:.0f} to {tokens:.0f} tokens while the reward rose from {reward.start:.3g} to "
            f"{now:.3g}, and no held-out measurement says that they are better.",
            {"reward": now, "reply_tokens": tokens},
        )
    varied, kinds = h.of("distinct_2").start, h.of("distinct_2").lately(LONG)
    longer = was is not None and tokens is not None and tokens > 2.0 * was  # longer texts repeat more bigrams anyway
    if varied is not None and kinds is not None and kinds * factor <= varied and not longer:
        return Finding(
            f"the share of distinct bigrams fell from {varied:.2g} to {kinds:.2g} while the reward rose from "
            f"{reward.start:.3g} to {now:.3g}, and no held-out measurement says that replies are better.",
            {"reward": now, "distinct_2": kinds},
        )
    return None


def reward_collapse(h: History, limits: GuardLimits) -> Finding | None:
    """Reward fell far below its best and stays there, or the held-out return did."""
    reward, held = h.of("reward"), h.held_out
    last, spread = reward.last(LONG), h.of("reward_std").start or 0.0
    if reward.highest is not None and len(last) == LONG and reward.seen >= LONG + WINDOW:
        best, worst_of_best = reward.highest
        now = statistics.median(last)
        if max(last) < worst_of_best and best - now > max(limits.reward_collapse * spread, 4.0 * reward.noise):
            return Finding(
                f"training reward fell from {best:.3g} at its best to {now:.3g}, and stayed below for {LONG} steps.",
                {"reward": now},
            )
    if held.best is not None and held.fell() and reward.rise(held.best.beside) <= ROSE:
        fallen = held.last[-1].value
        return Finding(
            f"the held-out return fell from {held.best.value:.3g} at step {held.best.step} to {fallen:.3g}.",
            {"eval/return": fallen},
        )
    return None


def reward_stalled(h: History, limits: GuardLimits) -> Finding | None:
    """Neither training nor held-out reward has risen since the start."""
    reward, held = h.of("reward"), h.held_out
    start, now = reward.start, reward.lately(LONG)
    if reward.seen < limits.reward_stalled or start is None or now is None:
        return None
    if now > start or held.improved:
        return None
    if h.options.get("algorithm.dynamic_sampling") and held.improved is None:
        return None  # it trains on groups of mixed rewards only, whose mean says nothing of progress
    if h.of("reward_std").lately() == 0.0:
        return None  # nothing to choose between, which is no_signal's to say
    return Finding(
        f"after {reward.seen} steps the reward is {now:.3g}, and it began at {start:.3g}: nothing is learnt.",
        {"reward": now},
    )


def no_signal(h: History, limits: GuardLimits) -> Finding | None:
    """Attempts at a task get the same reward, so nothing can be learnt from comparing them."""
    updates = h.of("updates").last(SHORT)
    if len(updates) == SHORT and not any(updates):
        return Finding(f"no row could teach in the last {SHORT} steps, so there was no update.", {"updates": 0.0})
    equal = h.of("no_signal_share").lately()
    reward = h.of("reward").lately()
    level = "" if reward is None else f" (reward {reward:.3g})"
    if equal is not None:
        if equal < limits.no_signal:
            return None
        return Finding(
            f"in {equal:.0%} of the groups all rewards are equal{level}, so they teach nothing: the task is too hard, "
            "too easy, or the attempts are alike.",
            {"no_signal_share": equal},
        )
    spread = h.of("reward_std").last(WINDOW)
    if len(spread) == WINDOW and max(spread) < 1e-9:
        return Finding(f"all rewards of a step are equal{level}, for {WINDOW} steps.", {"reward_std": 0.0})
    return None


def env_failures(h: History, limits: GuardLimits) -> Finding | None:
    """Many episodes end in an error of the environment."""
    share = h.of("failed_share").lately(SHORT)
    if share is None or share <= limits.env_failures:
        return None
    return Finding(f"{share:.0%} of the episodes end in an error of the environment.", {"failed_share": share})


def parse_failures(h: History, limits: GuardLimits) -> Finding | None:
    """Most replies can't be parsed after the first steps, or many more than before."""
    failed = h.of("parse_failed_share")
    now = failed.lately()
    if now is None or failed.seen < LONG or failed.lowest is None:
        return None
    if now > limits.parse_failures:
        return Finding(f"{now:.0%} of the replies can't be parsed.", {"parse_failed_share": now})
    if now - failed.lowest[0] >= 0.5 * limits.parse_failures:
        return Finding(
            f"{now:.0%} of the replies can't be parsed; it was {failed.lowest[0]:.0%} once.",
            {"parse_failed_share": now},
        )
    return None


def length_limit(h: History, limits: GuardLimits) -> Finding | None:
    """Most replies are cut at max_new_tokens."""
    share = h.of("cut_share").lately()
    if share is None or share <= limits.length_limit or h.options.get("engine.ignore_eos"):
        return None
    return Finding(f"{share:.0%} of the replies are cut by engine.max_new_tokens or the context.", {"cut_share": share})


def value_divergence(h: History, limits: GuardLimits) -> Finding | None:
    """The critic gets worse: its loss is a multiple of what it was, or it predicts worse than a constant would."""
    loss, explained = h.of("value_loss"), h.of("explained_variance")
    now, last = loss.lately(), loss.last(WINDOW)
    if loss.lowest is not None and now is not None:
        best, worst_of_best = loss.lowest
        if min(last) > worst_of_best and now > limits.value_divergence * best > 0.0:
            return Finding(f"the value loss grew from {best:.3g} at its best to {now:.3g}.", {"value_loss": now})
    variance = explained.lately(LONG)
    if variance is not None and explained.seen >= 2 * LONG and variance < -0.5:
        return Finding(
            f"the critic explains {variance:.2g} of the returns' variance: it predicts worse than their mean would.",
            {"explained_variance": variance},
        )
    return None


def gradient_spike(h: History, limits: GuardLimits) -> Finding | None:
    """A gradient far above the usual ones, and above what clipping lets through."""
    norms, now = h.of("grad_norm"), h.now.get("grad_norm", math.nan)
    before = sorted(norms.recent[:-1])
    if not math.isfinite(now) or len(before) < LONG:
        return None
    # Not the median: where many steps have nothing to learn from, an ordinary gradient is far above it.
    usual = before[math.ceil(0.9 * len(before)) - 1]
    if now <= max(limits.gradient_spike * usual, float(h.options.get("optim.max_grad_norm") or 0.0)):
        return None
    return Finding(
        f"the gradient norm is {now:.3g}, and nine in ten of the last {len(before)} were at most {usual:.3g}.",
        {"grad_norm": now},
    )


def not_finite(h: History, limits: GuardLimits) -> Finding | None:
    """Updates were skipped because loss or gradient wasn't finite, or a metric isn't."""
    skipped = h.now.get("skipped_updates", 0.0)
    if skipped:
        many = "an update was" if skipped == 1 else f"{skipped:g} updates were"
        return Finding(f"{many} skipped, because loss or gradient wasn't finite.", {"skipped_updates": skipped})
    names = [name for name in _ALWAYS_FINITE if not math.isfinite(h.now.get(name, 0.0))]
    if names:
        return Finding(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not finite.", {})
    return None


def loss_divergence(h: History, limits: GuardLimits) -> Finding | None:
    """The training loss rose far above its best."""
    loss = h.of("loss")
    start, now, last = loss.start, loss.lately(), loss.last(WINDOW)
    if start is None or now is None or loss.lowest is None or loss.seen < 2 * WINDOW:
        return None
    best, worst_of_best = loss.lowest
    risen = now - best > max(0.25 * abs(start), 5.0 * loss.noise)
    if not risen or min(last) <= worst_of_best or now <= limits.loss_divergence * best:
        return None
    return Finding(f"the training loss rose from {best:.3g} at its best to {now:.3g}.", {"loss": now})


def overfitting(h: History, limits: GuardLimits) -> Finding | None:
    """The held-out loss rises while the training loss doesn't."""
    held, series = h.held_out, h.of("loss")
    loss = series.lately()
    if held.best is None or held.best.beside is None or loss is None or series.rise(held.best.beside) > ROSE:
        return None
    since = [one.value for one in held.last if one.step > held.best.step]
    bound = held.best.value + limits.overfitting * abs(held.best.value)
    if len(since) < 2 or min(since[-2:]) <= bound:
        return None
    return Finding(
        f"the held-out loss rose from {held.best.value:.3g} at step {held.best.step} to {since[-1]:.3g}, while the "
        f"training loss went from {held.best.beside:.3g} to {loss:.3g}.",
        {"eval/loss": since[-1], "loss": loss},
    )


def chosen_falls(h: History, limits: GuardLimits) -> Finding | None:
    """The margin grows by making both replies improbable, the chosen one too (likelihood displacement)."""
    chosen, margin, logprobs = h.of("reward_chosen"), h.of("margin"), h.of("logprob_chosen")
    if chosen.start is None or margin.start is None or logprobs.start is None or chosen.seen < LONG + WINDOW:
        return None  # without log-probabilities it is a reward model, whose scores have no zero
    now, apart = chosen.lately(LONG), margin.lately(LONG)
    assert now is not None
    assert apart is not None
    fall, growth = chosen.start - now, apart - margin.start
    error = 1.2533 * chosen.noise * math.sqrt(1.0 / WINDOW + 1.0 / LONG)  # of the difference of two medians
    if growth <= 0.0 or fall - 3.0 * error <= limits.chosen_falls * growth:
        return None
    return Finding(
        f"the chosen replies' implicit reward fell by {fall:.3g} while the margin grew by {growth:.3g}: they become "
        "improbable too.",
        {"reward_chosen": now, "margin": apart},
    )


def too_easy(h: History, limits: GuardLimits) -> Finding | None:
    """Nearly every fresh pair is told apart at once: by something trivial, most likely."""
    accuracy = h.of("accuracy")
    pairs = int(h.options.get("optim.batch_size") or 1) * int(h.options.get("optim.gradient_accumulation") or 1)
    count = max(WINDOW, math.ceil(100 / pairs))  # by chance 100 pairs in a row are right one time in 170 at 95 %
    last = accuracy.last(count)
    fresh = h.now.get("epoch", 0.0) <= 1.0
    if len(last) < count or accuracy.seen > count + 3 * WINDOW or not fresh or min(last) < limits.too_easy:
        return None
    return Finding(
        f"{min(last):.0%} and more of the pairs of each of the last {count} steps are told apart, {accuracy.seen} "
        "steps into the run, on pairs that it had not seen.",
        {"accuracy": last[-1]},
    )


#: Every warning: which kinds of learning it is for, and its check. The order is that of the report of a step.
CHECKS: dict[WarningName, tuple[frozenset[str], Check]] = {
    "not_finite": (_ALL, not_finite),
    "sampler_gap": (_ROLLOUTS, sampler_gap),
    "entropy_collapse": (_ROLLOUTS, entropy_collapse),
    "entropy_explosion": (_ROLLOUTS, entropy_explosion),
    "kl_runaway": (_ROLLOUTS, kl_runaway),
    "policy_lag": (_ROLLOUTS, policy_lag),
    "clip_fraction": (_ROLLOUTS, clip_fraction),
    "target_kl_stops": (_ROLLOUTS, target_kl_stops),
    "reward_hacking": (_ROLLOUTS, reward_hacking),
    "reward_collapse": (_ROLLOUTS, reward_collapse),
    "reward_stalled": (_ROLLOUTS, reward_stalled),
    "no_signal": (_ROLLOUTS, no_signal),
    "env_failures": (_ROLLOUTS, env_failures),
    "parse_failures": (_ROLLOUTS, parse_failures),
    "length_limit": (_ROLLOUTS, length_limit),
    "value_divergence": (_ROLLOUTS | _RECORDINGS, value_divergence),
    "gradient_spike": (_ALL, gradient_spike),
    # A clipped policy loss is about 0 on average, so its size says nothing.
    "loss_divergence": (_DATA - _RECORDINGS, loss_divergence),
    "overfitting": (_DATA, overfitting),
    "chosen_falls": (frozenset({"pairs", "labels"}), chosen_falls),
    "too_easy": (frozenset({"pairs"}), too_easy),
}
