"""What a run will compute, told from its own tasks and records: the token trees of its first steps.

Records are those of the run's first steps, tokenised as training will see them. Of rollouts the prompts are real; the
replies are random tokens, as many as they may be, that agree at first with other replies to the same prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sapwood.algorithms import Algorithm
from sapwood.chat import Chat
from sapwood.config import Recipe
from sapwood.engines import Completion, Engine, Request, Sampling
from sapwood.envs import EnvFamily
from sapwood.errors import ConfigError
from sapwood.learner import split_updates
from sapwood.parts import Parts
from sapwood.rollout import collect, to_rows
from sapwood.source import FIRST_RECORDS, ORDER, Rollouts, derive
from sapwood.tree import build_trie, distinct_tokens, pack
from sapwood.types import Group, Ids, Row, StopReason, Task

#: Episodes that are played to see how long they get, and where each needs a process of its own; a step with more is
#: put together from copies of these.
EPISODES, ISOLATED = 128, 16
#: Rows of a step beyond which there is no plan: packing them alone would take minutes.
MOST_ROWS = 1 << 17
#: Probability that two replies to a prompt that agree so far agree on the next token too: between those of a model that
#: fills in a short form and one that says anything. A plan's upper bound takes it as 0.
AGREE = 0.78
#: Held-out tasks that are played for the same purpose.
HELD_OUT = 16
#: As `sapwood.engines.local` has them: columns reserved ahead, and prompts whose end is copied for a few readers.
_ROOM, _FEW_READERS, _SHORT_SUFFIX = 256, 3, 256


@dataclass(frozen=True)
class Step:
    """One step: rows to train on by update, rows that are scored along with them, and the micro-batches of each."""

    updates: list[list[list[Row]]]
    scoring: list[list[Row]]

    @property
    def largest(self) -> list[Row]:
        """The micro-batch of the updates with the most distinct tokens."""
        return max((micro for update in self.updates for micro in update), key=nodes, default=[])


@dataclass(frozen=True)
class Played:
    """Episodes of one phase. reply_tokens: sampled ones, in all; distinct: those that no other reply shares;
    prompt_tokens: distinct ones that the engine reads, in all; first: those of prompts that open a conversation, which
    stay shared; below: the most tokens that a conversation has under its first prompt, its last reply left out;
    suffix: the longest end of a first prompt that few conversations share, which is copied for each; limit: the length
    of a reply.
    """

    episodes: int = 0
    replies: float = 0.0
    reply_tokens: float = 0.0
    distinct: float = 0.0
    prompt_tokens: float = 0.0
    first: float = 0.0
    below: int = 0
    suffix: int = 0
    limit: int = 0

    def shared(self, max_batch: int, budget: int) -> int:
        """Tokens whose keys and values the local engine keeps outside of running rows: prompts, and idle episodes.

        They give way to the budget; the rows that run don't.
        """
        idle = max(self.episodes - max_batch, 0) * self.below
        return int(min(self.first + idle, budget))

    def tails(self, max_batch: int) -> int:
        """Tokens that the rows which run have to themselves, room for their replies included."""
        return min(max_batch, self.episodes) * (self.suffix + self.below + min(_ROOM, self.limit))


@dataclass(frozen=True)
class Workload:
    """steps: samples of what a step sees; training, held_out: episodes played by a step and by an evaluation.

    at_most: distinct tokens that a micro-batch comes to with the longest replies, or with records as long as the
    longest of the sample; measured: micro-batches of held-out records.
    """

    steps: list[Step]
    at_most: int
    training: Played = field(default_factory=Played)
    held_out: Played = field(default_factory=Played)
    measured: list[list[Row]] = field(default_factory=list)

    @property
    def largest(self) -> list[Row]:
        """The largest micro-batch of all."""
        return max((step.largest for step in self.steps), key=nodes)

    @property
    def typical(self) -> Step:
        """The step with the median number of distinct tokens."""
        ordered = sorted(self.steps, key=lambda step: sum(nodes(m) for update in step.updates for m in update))
        return ordered[len(ordered) // 2]


def nodes(rows: Sequence[Row]) -> int:
    """Distinct tokens of a micro-batch."""
    return distinct_tokens([row.token_ids for row in rows])


def workload(recipe: Recipe, parts: Parts) -> Workload:
    """Sample it. Raises SapwoodError as training would: records that fit nowhere, a row above optim.token_budget."""
    packer = Packer.of(recipe, parts.algorithm)
    steps, training = _steps(recipe, parts, packer)
    at_most = min(_at_most(steps, training, recipe.optim.groups_per_step), packer.token_budget)
    held_out = Played()
    if parts.tasks is not None:
        tasks = parts.tasks
        attempts = max((metric.attempts for metric in tasks.metrics), default=1)
        few = min(tasks.count, max(1, HELD_OUT // attempts))
        groups = play(parts, tasks.family, tasks.family.tasks("eval", few, tasks.seed), attempts, tasks.sampling)
        held_out = played(groups, tasks.count, tasks.sampling)
    measured: list[list[Row]] = []
    if parts.records is not None and parts.records.groups:
        rows = to_rows(parts.records.groups, 1.0)
        measured = packer.micro([*rows, *parts.algorithm.augment(rows)])
    return Workload(steps, at_most, training, held_out, measured)


def _at_most(steps: Sequence[Step], training: Played, per_step: int) -> int:
    """Distinct tokens of the largest step that may come."""
    if training.episodes:
        rows = [row for update in steps[0].updates for micro in update for row in micro]
        return nodes(rows) + round(training.reply_tokens - training.distinct)
    groups: dict[tuple[int, int], list[Row]] = {}
    for number, step in enumerate(steps):
        for row in (row for update in step.updates for micro in update for row in micro):
            groups.setdefault((number, row.group), []).append(row)
    return max(map(nodes, groups.values()), default=0) * per_step


@dataclass(frozen=True)
class Packer:
    """How the loop deals a step's rows to updates and micro-batches."""

    token_budget: int
    atomic: bool
    max_groups: int | None
    updates: int
    seed: int

    @staticmethod
    def of(recipe: Recipe, algorithm: Algorithm) -> Packer:
        """As the recipe says."""
        optim = recipe.optim
        limit = optim.batch_size if optim.gradient_accumulation > 1 else None
        return Packer(optim.token_budget, algorithm.atomic, limit, algorithm.updates, recipe.run.seed)

    def micro(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Micro-batches of these rows."""
        return pack(rows, self.token_budget, atomic=self.atomic, max_groups=self.max_groups)

    def step(self, rows: list[Row], extra: Sequence[Row], number: int) -> Step:
        """The updates and the scoring pass of step `number`."""
        taught = [row for row in rows if row.scored]
        parts = split_updates(taught, self.updates, derive(self.seed, ORDER, number)) if taught else []
        return Step([self.micro(part) for part in parts], self.micro([*rows, *extra]))


def _steps(recipe: Recipe, parts: Parts, packer: Packer) -> tuple[list[Step], Played]:
    per_step = recipe.optim.groups_per_step
    if per_step * parts.algorithm.attempts > MOST_ROWS:
        raise ConfigError(
            f"a step of {per_step * parts.algorithm.attempts:,} rows is beyond planning; lower optim.batch_size."
        )
    if isinstance(parts.source, Rollouts):
        return _of_rollouts(parts, parts.source, packer, per_step)
    examples = parts.examples or per_step
    count = max(1, min(parts.steps, -(-min(FIRST_RECORDS, examples) // per_step)))
    steps = []
    for number in range(1, count + 1):
        rows = to_rows(parts.source.groups(number), parts.source.temperature)
        if rows:
            steps.append(packer.step(rows, parts.algorithm.augment(rows), number))
    return steps or [Step([], [])], Played()


def _of_rollouts(parts: Parts, source: Rollouts, packer: Packer, per_step: int) -> tuple[list[Step], Played]:
    attempts = parts.algorithm.attempts
    few = max(1, min(per_step, (ISOLATED if source.family.isolate else EPISODES) // attempts))
    groups = play(parts, source.family, source.family.tasks("train", few, source.seed), attempts, source.sampling)
    rows = to_rows(groups, source.temperature)
    vocabulary = int(parts.policy.model.get_input_embeddings().weight.shape[0])
    rows = copies(rows, len(groups), per_step, vocabulary)
    return [packer.step(rows, parts.algorithm.augment(rows), 1)], played(groups, per_step, source.sampling)


class RandomReplies(Engine):
    """Answers every request at once with random tokens, as many as it may have; for plans.

    agree: probability that a reply goes on like an earlier one to the same prompt, token by token.
    """

    def __init__(self, vocabulary: int, context: int, avoid: Sequence[int] = (), agree: float = AGREE) -> None:
        self._agree = agree
        self._earlier: dict[bytes, list[Ids]] = {}
        self._tokens = np.setdiff1d(np.arange(vocabulary), np.asarray(avoid, np.int64))
        self._context = context
        self._waiting: list[Request] = []

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def step(self) -> list[Completion]:
        """Complete all of them."""
        done = [self._complete(request) for request in self._waiting]
        self._waiting = []
        return done

    def close(self, episode: str) -> None:
        """Drop its requests."""
        self._waiting = [request for request in self._waiting if request.episode != episode]

    def load(self, policy: Any) -> None:
        """Nothing is kept of a policy."""

    def _complete(self, request: Request) -> Completion:
        length = max(1, min(request.sampling.max_new_tokens, self._context - len(request.token_ids)))
        rng = np.random.default_rng(request.seed)
        ids: Ids = rng.choice(self._tokens, length)
        followed = self._earlier.setdefault(request.token_ids.tobytes(), [])
        if followed:
            # How far it agrees with each of them, by chance; the longest is the prefix that it shares.
            same = rng.geometric(max(1.0 - self._agree, 1e-9), len(followed)) - 1
            nearest = int(np.argmax(same))
            shared = min(int(same[nearest]), length, len(followed[nearest]))
            ids[:shared] = followed[nearest][:shared]
        followed.append(ids)
        zeros = np.zeros(length, np.float32)
        return Completion(request.id, ids, zeros, zeros, StopReason.LENGTH)


def play(parts: Parts, family: EnvFamily, tasks: Sequence[Task], attempts: int, sampling: Sampling) -> list[Group]:
    """Play the tasks with random replies. Raises as `sapwood.rollout.collect` does."""
    chat: Chat = parts.chat
    vocabulary = int(parts.policy.model.get_input_embeddings().weight.shape[0])
    vocabulary = min(vocabulary, len(parts.policy.tokenizer))
    avoid = [int(i) for i, token in parts.policy.tokenizer.added_tokens_decoder.items() if token.special]
    engine = RandomReplies(vocabulary, parts.policy.max_context, avoid)
    return collect(family, tasks, attempts, engine, chat, sampling, 0, max_context=parts.policy.max_context)


def played(groups: Sequence[Group], wanted: int, sampling: Sampling) -> Played:
    """What `wanted` tasks like these come to."""
    rows = to_rows(groups, 1.0)
    trajectories = [t for group in groups for t in group.trajectories if t.turns]
    if not rows:
        return Played()
    replies = [turn.token_ids.size for t in trajectories for turn in t.turns]
    trie = build_trie([row.token_ids for row in rows])
    distinct = len(np.unique(np.concatenate([path[row.loss_mask] for path, row in zip(trie.paths, rows, strict=True)])))
    prompts = len(trie) - distinct
    opening = [row.token_ids[: int(np.argmax(row.loss_mask))] for row in rows]
    trunk = common_prefix(opening)
    few = max(Counter(ids.tobytes() for ids in opening).values()) <= _FEW_READERS
    suffix = max(ids.size for ids in opening) - trunk if few else 0
    below = max(row.token_ids.size - ids.size for row, ids in zip(rows, opening, strict=True)) - min(replies)
    share = wanted / len(groups)
    return Played(
        episodes=round(len(trajectories) * share),
        replies=len(replies) * share,
        reply_tokens=sum(replies) * share,
        distinct=distinct * share,
        prompt_tokens=trunk + (prompts - trunk) * share,
        first=trunk + (distinct_tokens(opening) - trunk) * share,
        below=max(below, 0),
        suffix=suffix if suffix <= _SHORT_SUFFIX else 0,
        limit=sampling.max_new_tokens,
    )


def common_prefix(sequences: Sequence[Ids]) -> int:
    """Leading tokens that all share."""
    shortest = min(sequence.size for sequence in sequences)
    stacked = np.stack([sequence[:shortest] for sequence in sequences])
    differ = np.flatnonzero((stacked != stacked[0]).any(0))
    return int(differ[0]) if differ.size else shortest


def copies(rows: list[Row], have: int, want: int, vocabulary: int) -> list[Row]:
    """Rows of `want` groups out of those of `have`: beyond these, copies that share the trunk of all, nothing else."""
    if want <= have or not rows:
        return rows
    trunk = common_prefix([row.token_ids for row in rows])
    made = list(rows)
    for number in range(have, want):
        lap, of = divmod(number, have)
        for row in rows:
            if row.group == of:
                ids = row.token_ids.copy()
                ids[trunk:] = (ids[trunk:] + 7919 * lap) % vocabulary
                made.append(replace(row, token_ids=ids, group=number))
    return made
