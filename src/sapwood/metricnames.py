"""Every number that a run logs: unit, range, meaning, who logs it, and what a healthy run shows.

docs/metrics.md is generated from here (`make docs`), and a test runs every algorithm and finds each logged name here.
A name with a part in capitals stands for many: reward/PART, pass@K.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

HELD_OUT = "eval/"

#: Who logs a metric, where it isn't single algorithms.
GROUPS = {
    "all": ("sft", "reward", "dpo", "kto", "distill", "grpo", "rloo", "reinforce_pp", "ppo"),
    "rollouts": ("grpo", "rloo", "reinforce_pp", "ppo"),
    "data": ("sft", "reward", "dpo", "kto", "distill"),
}

# A section begins with "#"; an entry is "name | unit | who | range", its meaning, and after a ">" what to expect of a
# healthy run: rules of thumb. What the guards warn about is theirs to say.
_TEXT = """\
# Every step
step | steps | all | 0 ..
  The step that a row is about; 0 is the model before training.
epoch | passes | data | 0 ..
  Passes over the data so far; of rollouts too, where their prompts are data.
loss | - | all | any
  What is differentiated, all terms together.
  > Of data it falls; of rollouts it says little, look at reward.
learning_rate | - | all | 0 ..
  The policy's learning rate in this step, by the schedule.
  > Follows optim.schedule.
grad_norm | - | all | 0 ..
  Norm of the gradient of all weights before it is clipped.
  > Steady within a factor of ten; above optim.max_grad_norm it is clipped.
updates | updates | all | 0 ..
  Optimiser steps made; 0 where no row could teach.
  > epochs x updates.
loss_scale | - | all | 0 ..
  Factor of the loss in float16, found by trial.
  > A power of two, in the thousands.
skipped_updates | updates | all | 0 ..
  Updates left out as loss or gradient wasn't finite.
  > Absent.
entropy | nats a token | sft, dpo, kto, distill, rollouts | 0 .. ln vocabulary
  Of the policy's next-token distribution.
  > Falls slowly. Near 0 nothing is explored any more; rising above its start, replies turn into noise.
reply_tokens | tokens | all | 0 ..
  Mean length of a reply (a turn), its end token included.
  > Steady, or with the task. Rising together with the reward may be a reward that likes length.

# Rewards of rollouts
reward | reward | rollouts | any
  Mean total reward of an attempt, before any KL penalty.
  > Rises.
reward/PART | reward | rollouts | any
  Mean of a part of the reward, before its weight.
  > Those that matter rise; one alone that does may be exploited.
reward_std | reward | rollouts, reward | 0 ..
  Standard deviation of the rewards of the batch.
  > Above 0: equal rewards teach nothing.
reward_group_std | reward | grpo, rloo | 0 ..
  Mean over tasks of the deviation within a group: the signal.
  > Above 0.
no_signal_share | share | grpo, rloo | 0 .. 1
  Groups whose rewards are all equal, so that they teach nothing.
  > Below 0.5; near 1 the tasks are too easy or too hard.
kl_penalty | reward | rollouts | any
  What kl_in: reward took from an attempt's reward, on average.
  > Small beside reward.
reward_scale | reward | ppo | 0 ..
  What whiten_rewards: running divided by.
returns | reward | ppo, distill | any
  Mean over tokens of what the critic learns, KL penalty included.
values | reward | ppo, distill | any
  Mean of the critic's values before the update.
  > Follows returns.
advantages | reward | ppo, reinforce_pp, distill | any
  Mean over tokens, before whitening.
  > Near 0; away from it, the critic is wrong on average.
advantages_std | reward | ppo, reinforce_pp, distill | 0 ..
  Their standard deviation.
  > Above 0.

# Replies of rollouts
cut_share | share | rollouts | 0 .. 1
  Replies that a token limit ended.
  > Below 0.1.
distinct_2 | share | rollouts | 0 .. 1
  Distinct bigrams of tokens, of all bigrams of the batch.
  > Steady; a fall says that replies become alike.
distinct_replies | share | rollouts | 0 .. 1
  Of the attempts at a task, how many differ: 0 all the same.
  > Well above 0: equal attempts teach nothing.
parse_failed_share | share | rollouts | 0 .. 1
  Replies that the environment could not parse.
  > Falls to 0.
fallback_share | share | rollouts | 0 .. 1
  Replies that led to a fallback action.
  > Falls to 0.
failed_share | share | rollouts | 0 .. 1
  Attempts whose environment failed; left out.
  > 0.
truncated_share | share | rollouts | 0 .. 1
  Attempts that a budget of turns or tokens ended.
  > Low.
trajectories | attempts | ppo, reinforce_pp | 0 ..
  Attempts that were trained on.

# Policy
policy_loss | - | rollouts, distill | any
  The clipped loss without KL, entropy and value terms.
  > Around 0; its size says nothing about progress.
kl | nats a token; kto: a reply | rollouts, kto | 0 .. (estimates may be below)
  Estimate of the KL divergence from the reference. kto: its reference point.
  > Grows slowly and levels off. A steep rise is a policy that runs away: raise kl_coef.
kl_coef | - | ppo | 0 ..
  Weight of the KL divergence, as it was in this step.
entropy_coef | - | ppo | 0 ..
  Weight of the entropy bonus, as it was in this step.
clip_range | - | ppo | 0 ..
  The upper clip bound at the step's start.
ratio | - | rollouts, distill | 0 ..
  Mean probability of a token by the policy over that before the update; distill: over the recorded one.
  > Within 0.01 of 1; exactly 1 with one update a batch. distill: from 1 upwards.
approx_kl | nats a token | rollouts, distill | 0 ..
  How far a step's updates have moved the policy (k3); distill: the run, from the recording.
  > Below 0.02 or so; 0 with one update a batch. distill: from 0 upwards.
js | nats a token | ppo | 0 .. ln 2
  Sampled Jensen-Shannon estimate of the same.
clip_fraction_low | share | rollouts, distill | 0 .. 1
  Tokens with A < 0 whose ratio is below the clip: no gradient.
  > Together with the next below 0.2.
clip_fraction_high | share | rollouts, distill | 0 .. 1
  Tokens with A > 0 whose ratio is above the clip.
  > See above.
clip_fraction_dual | share | grpo, rloo | 0 .. 1
  Tokens with A < 0 whose ratio is above clip_dual.
  > Near 0.
gap_k1 | nats a token | rollouts, distill | any
  Mean of log p(sampler) - log p(trainer) over sampled tokens.
  > Within 1e-4 of 0 in float32, within 1e-2 in bfloat16.
gap_k3 | nats a token | rollouts, distill | 0 ..
  KL divergence of sampler and trainer, estimated (k3).
  > Near 0; above optim.max_gap the run stops.
gap_weight | - | rollouts | 0 .. gap_cap
  Mean weight of gap_correction.
  > Near 1.

# Critic
value_loss | reward^2 | ppo, distill | 0 ..
  Half the squared error of the critic, clipped.
  > Falls, then levels off.
value_clip_fraction | share | ppo, distill | 0 .. 1
  Tokens whose value lost its gradient to value_clip.
  > Below 0.2; raise value_clip where returns are much larger than 1.
explained_variance | - | ppo, distill | .. 1
  1 - Var(return - value) / Var(return), before the update.
  > Rises above 0.5; below 0 the critic is worse than a constant.

# Demonstrations
nll | nats a token | sft, distill | 0 ..
  Negative log-likelihood of the demonstrations (distill: of the decisions), whatever the loss.
  > Falls; on held-out records it stops falling where memorising begins.
perplexity | - | sft | 1 ..
  exp(nll): among how many equally likely tokens the model is undecided.
  > Falls.

# Preferences
preference_loss | - | dpo | any
  The loss without the term of sft_coef.
  > From ln 2 = 0.693 (sigmoid) downwards.
accuracy | share | dpo, kto, reward | 0 .. 1
  Pairs whose chosen reply has the higher reward, ties half; kto: replies on the right side of kl.
  > From 0.5 to 0.6 .. 0.9. Near 1 on training data alone is memorising.
margin | reward | dpo, kto, reward | any
  Mean reward of chosen less rejected replies.
  > Rises.
reward_chosen | reward | dpo, kto, reward | any
  Mean (implicit) reward of chosen, or desirable, replies.
  > Rises, or falls less than the next.
reward_rejected | reward | dpo, kto, reward | any
  Mean (implicit) reward of rejected, or undesirable, ones.
  > Falls.
logprob_chosen | nats a reply | dpo, kto | .. 0
  Mean log-probability of chosen replies.
  > A steep fall is over-optimisation: lower the rate, or set sft_coef.
logprob_rejected | nats a reply | dpo, kto | .. 0
  Mean log-probability of rejected replies.
  > Falls.
nll_chosen | nats a token | dpo | 0 ..
  Negative log-likelihood of chosen replies.
  > Steady.
desirable_share | share | kto | 0 .. 1
  Desirable replies of the batch.
  > That of the data.

# Records
incomplete_share | share | dpo, reward | 0 .. 1
  Pairs left out as a reply had no token left.
  > 0.
dropped_records | records | data | 0 ..
  Records of the step that the limits on length left out.
  > 0.

# Held-out tasks
eval/return | return | all | any
  Mean return of held-out tasks: physical, or the reward in a world of prompts.
  > Rises; what training is for.
eval/low | return | all | any
  Lower end of its 95 % interval over tasks (Student t).
  > Above the base model's return.
eval/high | return | all | any
  Upper end of the same.
eval/parsed | share | all | 0 .. 1
  Held-out replies that the environment could parse.
  > 1.
eval/reward/PART | reward | all | any
  Mean of a reward part over held-out tasks, where there are several.
  > Rises.
eval/pass@K | share | all | 0 .. 1
  Metric pass_at_k: chance that one of K attempts is right.
  > Rises.
eval/response_length | tokens | all | 0 ..
  Metric response_length; in another unit with that at its end.
eval/response_length/max | tokens | all | 0 ..
  The longest reply.
eval/response_length/cut | share | all | 0 .. 1
  Replies that a token limit ended.
  > Near 0.
eval/response_length_UNIT | UNIT | all | 0 ..
  The same in words or characters, /max and /cut likewise.
eval/response_length_UNIT/max | UNIT | all | 0 ..
  The longest reply.
eval/response_length_UNIT/cut | share | all | 0 .. 1
  Replies that a token limit ended.
  > Near 0.
eval/distinct_N | share | all | 0 .. 1
  Metric distinct: distinct n-grams of all n-grams.
  > Steady.
eval/distinct_N/task | share | all | 0 .. 1
  The same within the attempts at a task, averaged.
  > Steady.
eval/reward/std | reward | all | 0 ..
  Metric reward_parts: standard deviation of the total.
eval/reward/best | reward | all | any
  Mean over tasks of the best of n attempts.
  > Rises.
eval/reward/PART/std | reward | all | 0 ..
  The same of one part.
eval/reward/PART/best | reward | all | any
  The same of one part.
  > Rises.
eval/win_rate | share | all | 0 .. 1
  Metric win_rate: comparisons won, ties half.
  > Above 0.5.
eval/win_rate/lo | share | all | 0 .. 1
  Lower end of its 95 % interval (Wilson).
  > Above 0.5.
eval/win_rate/hi | share | all | 0 .. 1
  Upper end of the same.
eval/win_rate/ties | share | all | 0 .. 1
  Comparisons that were ties.
eval/win_rate/tasks | tasks | all | 1 ..
  Tasks that were compared.
eval/NAME | - | all | any
  What a metric of your own returns.
eval/NAME/PART | - | all | any
  A key of the dict that it returns.

# Time
sampling_seconds | s | all | 0 ..
  Sampling, or reading data.
  > Of data near 0.
learning_seconds | s | all | 0 ..
  Scoring, credit and updates.
loading_seconds | s | all | 0 ..
  Giving the weights to the engine, and writing samples.
  > A small part.
evaluation_seconds | s | all | 0 ..
  Measuring held-out tasks and records, where that was due.
checkpoint_seconds | s | all | 0 ..
  Waiting for checkpoints since the row before: copying what is trained, and for the one before to be on disk.
  > A small part; where it isn't, save less often.
tokens_per_second | tokens/s | all | 0 ..
  Sampled tokens over sampling; of data, learnt tokens over the step.
  > Steady.
trained_tokens_per_second | tokens/s | all | 0 ..
  Scored tokens over learning.
  > Steady.
sampled_tokens | tokens | rollouts | 0 ..
  Tokens that the policy sampled in the step.
tokens | tokens | data | 0 ..
  Tokens that were learnt in the step.
"""


@dataclass(frozen=True)
class MetricInfo:
    """One metric. by: the algorithms that log it, or a key of GROUPS; limits: its range; healthy: what to expect."""

    name: str
    unit: str
    by: tuple[str, ...]
    limits: str
    meaning: str
    healthy: str

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that log it, by name."""
        return tuple(name for group in self.by for name in GROUPS.get(group, (group,)))

    @property
    def stands_for_many(self) -> bool:
        """Whether its name has a part in capitals."""
        return _CAPITALS.search(self.name) is not None

    def fits(self, name: str) -> bool:
        """Whether it is about a logged name."""
        parts = _CAPITALS.split(self.name)
        return re.fullmatch(r"[^/]+".join(map(re.escape, parts)), name) is not None


_CAPITALS = re.compile(r"[A-Z]{4,}|(?<=[@_])[A-Z]\b")
#: What users' metrics return: these fit nearly every name, so they are asked last.
OWN = ("eval/NAME", "eval/NAME/PART")


def described(name: str, *, own: bool = True) -> MetricInfo | None:
    """What is known about a logged name. A held-out metric of data ("eval/loss") is that of training.

    own: whether a name below eval/ may be that of a user's metric. "timing/" before a name, as trackers show it, is
    left out of account.
    """
    name = name.removeprefix("timing/")
    known = [info for info in entries() if info.name not in OWN]
    exact = next((info for info in known if info.name == name), None)
    found = exact or next((info for info in known if info.fits(name)), None)
    if found is None and name.startswith(HELD_OUT):
        found = described(name.removeprefix(HELD_OUT))
        if found is None and own:
            found = next((info for info in entries() if info.name in OWN and info.fits(name)), None)
    return found


def titled(name: str) -> str:
    """A logged name as a title: "kl_penalty, reward", "Held-out nll, nats a token"."""
    info = described(name)
    plain = f"Held-out {name.removeprefix(HELD_OUT)}" if name.startswith(HELD_OUT) else name
    unit = info.unit.partition(";")[0] if info is not None else "-"
    return plain if unit in ("-", "UNIT", "share") else f"{plain}, {unit}"


def entries() -> Iterator[MetricInfo]:
    """Every entry, in the order of the page."""
    for infos in sections().values():
        yield from infos


@cache
def sections() -> dict[str, tuple[MetricInfo, ...]]:
    """Title of a table -> its entries. Those of "Time" are in timing.jsonl, all others in metrics.jsonl."""
    found: dict[str, tuple[MetricInfo, ...]] = {}
    for block in _TEXT.strip().split("\n\n"):
        title, _, rest = block.partition("\n")
        found[title.removeprefix("# ")] = tuple(map(_entry, re.split(r"\n(?=\S)", rest)))
    return found


def _entry(text: str) -> MetricInfo:
    head, _, body = text.partition("\n")
    name, unit, by, limits = (part.strip() for part in head.split("|"))
    meaning, healthy = (" ".join(part.split()) for part in body.partition("\n  > ")[::2])
    return MetricInfo(name, unit, tuple(part.strip() for part in by.split(",")), limits, meaning, healthy)
