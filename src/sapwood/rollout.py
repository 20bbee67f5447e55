"""Env x Engine -> Trajectory -> Group -> Row.

`collect` plays episodes side by side: whichever reply is sampled first goes to its environment at once, and the next
turn joins the running batch. Seeds depend on (seed, task, member, turn) alone, so results don't depend on who answered
first. This is also the one boundary where exceptions of foreign code (environments) are caught: a failed episode is
recorded on its trajectory and the run goes on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sapwood import plugins
from sapwood.chat import Chat
from sapwood.data.words import described
from sapwood.engines import Completion, Engine, Request, Sampling
from sapwood.envs import EnvFamily, Observation, Step
from sapwood.envs._process import Host, LocalHost, WorkerPool, describe
from sapwood.errors import BudgetError, ConfigError, DataError, EnvError
from sapwood.rewards import Reward
from sapwood.types import Floats, Group, Ids, Row, Task, Trajectory, Turn

#: Episodes that are alive at once where each has a process of its own.
MAX_PROCESSES = 32


def collect(
    family: EnvFamily,
    tasks: Sequence[Task],
    group_size: int,
    engine: Engine,
    chat: Chat,
    sampling: Sampling,
    seed: int,
    *,
    max_turns: int | None = None,
    max_context: int | None = None,
    rewards: Sequence[Reward] = (),
    first_task: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """Play `group_size` episodes of every task; groups in the order of the tasks, rewarded.

    max_turns: replies an episode may have; max_context: tokens that prompt and reply may have together. An episode
    that reaches either is truncated. first_task: the index of tasks[0] where `tasks` is a slice of a longer list, so
    that each keeps its seeds. progress(done, total) is called after every episode.

    Raises ConfigError for no task or no member, BudgetError where a task's first prompt leaves no room for a reply,
    EnvError if every episode failed, DataError for rewards that are not finite numbers.
    """
    if not tasks:
        raise ConfigError("there is no task to play: ask for at least one, or check the environment's data.")
    if group_size < 1:
        raise ConfigError(f"group_size must be at least 1, not {group_size}.")
    if max_turns is not None and max_turns < 1:
        raise ConfigError(f"max_turns must be at least 1, not {max_turns}.")
    with ExitStack() as stack:
        pool = stack.enter_context(WorkerPool(family)) if family.isolate else None
        play = _Play(
            family, engine, chat, until_turn_end(sampling, chat), seed, first_task, max_turns, max_context, pool
        )
        stack.callback(play.abandon)
        groups = play.run(tasks, group_size, progress)
    first_error = next((t.error for g in groups for t in g.trajectories if t.error), None)
    if first_error is not None and all(t.error for g in groups for t in g.trajectories):
        raise EnvError(f"every episode failed; the first: {first_error}")
    apply_rewards(groups, rewards)
    return groups


def turn_seed(seed: int, task: int, member: int, turn: int) -> int:
    """The sampling seed of one turn, in 0 .. 2**63 - 1."""
    low, high = np.random.SeedSequence([seed, task, member, turn]).generate_state(2, np.uint32).tolist()
    return (high << 32 | low) >> 1


def apply_rewards(groups: Sequence[Group], rewards: Sequence[Reward]) -> None:
    """Set `reward_parts` and `reward` (the weighted total) of every trajectory that has no error.

    A part keeps its own name; where a reward returns several, or the name is taken, the reward's name comes before
    it ("quality/grammar"). Raises DataError naming reward and task for a score that is not a finite number, and reward
    and line for what a reward that isn't built in raises.
    """
    scored = [Group(group.task, [t for t in group.trajectories if t.error is None]) for group in groups]
    scored = [group for group in scored if group.trajectories]
    for group in scored:
        for trajectory in group.trajectories:
            trajectory.reward_parts, trajectory.reward = {}, 0.0
    taken: set[str] = set()
    for reward in rewards:
        name = _reward_name(reward)
        scores = _scores(name, reward, scored)
        _check_scores(name, scores, scored)
        parts = list(dict.fromkeys(part for group in scores for member in group for part in member))
        prefixed = len(parts) > 1 or not taken.isdisjoint(parts)
        keys = {part: _free_name(f"{name}/{part}" if prefixed else part, taken) for part in parts}
        taken.update(keys.values())
        for group, group_scores in zip(scored, scores, strict=True):
            for trajectory, member in zip(group.trajectories, group_scores, strict=True):
                trajectory.reward_parts.update({keys[part]: float(value) for part, value in member.items()})
                trajectory.reward += reward.weight * float(sum(member.values()))


def to_rows(groups: Sequence[Group], temperature: float) -> list[Row]:
    """Flatten trajectories to rows, one per unbroken conversation (a turn with `restart` begins another).

    Only sampled tokens are scored. Trajectories with an error and conversations without a sampled token are left out.
    temperature: that of sampling, by which training-side logits are divided (1 for greedy sampling); a trajectory that
    knows its own keeps it.
    """
    rows = []
    for g, group in enumerate(groups):
        for m, trajectory in enumerate(group.trajectories):
            if trajectory.error is not None:
                continue
            own = temperature if trajectory.temperature is None else trajectory.temperature
            for first, turns in _conversations(trajectory.turns):
                if any(turn.token_ids.size for turn in turns):
                    rows.append(_row(first, turns, g, m, trajectory.reward, own or 1.0))
    return rows


def records(groups: Sequence[Group], rows: Sequence[Row], decode: Callable[[Ids], str]) -> list[dict[str, Any]]:
    """One JSON-serialisable record per trajectory: texts, tokens, log-probabilities, rewards by part, advantages.

    messages and answer: the task's own; empty and None where the environment writes its prompts. tokens: a text a
    token of the reply; logprobs: the policy's in the last update; ratios: its probability in that update over that
    before the first; None where nothing was learnt.

    rows: those of the groups, for what was learnt of them; decode: token ids to text, special tokens kept.
    """
    learnt = _learnt_by_turn(rows)
    return [
        {
            "task": trajectory.task.id,
            "messages": [{"role": m.role, "content": m.content} for m in trajectory.task.prompt],
            "answer": trajectory.task.answer,
            "group": g,
            "member": m,
            "reward": trajectory.reward,
            "reward_parts": dict(trajectory.reward_parts),
            "terminated": trajectory.terminated,
            "truncated": trajectory.truncated,
            "error": trajectory.error,
            "turns": [_turn_record(turn, learnt.get((g, m, t), {}), decode) for t, turn in enumerate(trajectory.turns)],
        }
        for g, group in enumerate(groups)
        for m, trajectory in enumerate(group.trajectories)
    ]


@dataclass(eq=False)
class _Episode:
    """One running attempt. history [P]: every token of the conversation so far."""

    index: int
    group: int
    member: int
    host: Host
    trajectory: Trajectory
    history: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    prompt: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    restart: bool = False

    @property
    def name(self) -> str:
        return f"{self.trajectory.task.id}/{self.group}/{self.member}"


@dataclass
class _Play:
    """The state of one `collect`."""

    family: EnvFamily
    engine: Engine
    chat: Chat
    sampling: Sampling
    seed: int
    first_task: int
    max_turns: int | None
    max_context: int | None
    pool: WorkerPool | None
    live: dict[int, _Episode] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task], group_size: int, progress: Callable[[int, int], None] | None) -> list[Group]:
        groups = [Group(task, [Trajectory(task) for _ in range(group_size)]) for task in tasks]
        waiting = deque((g, m) for g in range(len(tasks)) for m in range(group_size))
        total = len(waiting)
        while waiting or self.live:
            room = len(waiting) if self.pool is None else MAX_PROCESSES - len(self.live)
            fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            self._advance([(self._open(groups[g], g, m), None) for g, m in fresh])
            if self.live:
                self._advance([(self.live[c.request_id], c) for c in self.engine.step()])
            if progress is not None:
                progress(total - len(waiting) - len(self.live), total)
        return groups

    def abandon(self) -> None:
        """Free everything that an interrupted run holds."""
        for episode in list(self.live.values()):
            self._close(episode)

    def _open(self, group: Group, g: int, m: int) -> _Episode:
        task = group.task
        host = LocalHost(self.family, task) if self.pool is None else self.pool.host(task)
        episode = _Episode(g * len(group.trajectories) + m, g, m, host, group.trajectories[m])
        self.live[episode.index] = episode
        return episode

    def _advance(self, work: list[tuple[_Episode, Completion | None]]) -> None:
        """Start or step the environments, all at the same time, then submit the turns that follow, in order."""
        begun = []
        for episode, completion in work:
            reply = None if completion is None else self.chat.decode(completion.token_ids)
            try:
                episode.host.begin(reply)
            except Exception as error:  # the rollout boundary
                self._fail(episode, completion, reply, error)
            else:
                begun.append((episode, completion, reply))
        for episode, completion, reply in begun:
            try:
                outcome = _checked(episode.host.finish(), completion is None)
            except Exception as error:  # the rollout boundary
                self._fail(episode, completion, reply, error)
                continue
            if isinstance(outcome, Observation):
                self._observe(episode, outcome)
            else:
                assert completion is not None
                self._record(episode, completion, reply or "", outcome.reward, outcome)

    def _record(self, episode: _Episode, completion: Completion, text: str, reward: float, step: Step | None) -> None:
        """Append the turn, and go on to the next one if there is one."""
        trajectory = episode.trajectory
        trajectory.turns.append(
            Turn(
                prompt_ids=episode.prompt,
                token_ids=completion.token_ids,
                sampled_logprobs=completion.logprobs,
                kept_logmass=completion.kept_logmass,
                stop_reason=completion.stop_reason,
                text=text,
                reward=reward,
                restart=episode.restart,
                info=dict(step.info) if step else {},
            )
        )
        episode.history = np.concatenate([episode.history, completion.token_ids])
        if step is None:
            return
        trajectory.terminated, trajectory.truncated = step.terminated, step.truncated
        if step.observation is None:
            self._close(episode)
        elif len(trajectory.turns) == self.max_turns:
            trajectory.truncated = True
            self._close(episode)
        else:
            self._observe(episode, step.observation)

    def _observe(self, episode: _Episode, observation: Observation) -> None:
        """Submit the request for the reply to an observation, or truncate where the context is full."""
        turns = episode.trajectory.turns
        if turns and not observation.restart:
            reply = turns[-1].token_ids
            episode.prompt = self.chat.extend(reply, self.chat.ended(reply), observation.messages)
            episode.history = np.concatenate([episode.history, episode.prompt])
        else:
            episode.prompt = episode.history = self.chat.start(observation.messages)
        episode.restart = bool(turns) and observation.restart
        needed = episode.history.size + self.sampling.max_new_tokens
        if self.max_context is not None and needed > self.max_context:
            if not turns:
                raise BudgetError(
                    f"task {episode.trajectory.task.id!r}: its first prompt has {episode.history.size} tokens, which "
                    f"with max_new_tokens {self.sampling.max_new_tokens} exceeds the context of {self.max_context}. "
                    "Shorten the prompt (fewer few-shot examples, say) or choose a model with a longer context."
                )
            episode.trajectory.truncated = True
            self._close(episode)
            return
        self.engine.submit(
            Request(
                id=episode.index,
                token_ids=episode.history,
                sampling=self.sampling,
                seed=turn_seed(self.seed, self.first_task + episode.group, episode.member, len(turns)),
                episode=episode.name,
            )
        )

    def _fail(self, episode: _Episode, completion: Completion | None, reply: str | None, error: Exception) -> None:
        """Record an environment's exception on its trajectory, with the reply that led to it."""
        episode.trajectory.error = describe(error)
        if completion is not None:
            self._record(episode, completion, reply or "", 0.0, None)
        self._close(episode)

    def _close(self, episode: _Episode) -> None:
        del self.live[episode.index]
        self.engine.close(episode.name)
        try:
            episode.host.close()
        except Exception as error:  # the rollout boundary: what was played stays valid
            episode.trajectory.info["close_error"] = describe(error)


def until_turn_end(sampling: Sampling, chat: Chat) -> Sampling:
    """Stop at whatever ends a turn of this chat template, which a base model's own eos may not be."""
    if sampling.ignore_eos:
        return sampling
    stop = tuple(dict.fromkeys((*sampling.stop_token_ids, *chat.end_token_ids)))
    return sampling.model_copy(update={"stop_token_ids": stop})


def _checked(outcome: Any, start: bool) -> Observation | Step:
    """The outcome of start or step, if it keeps the contract. Raises EnvError otherwise."""
    expected = Observation if start else Step
    if not isinstance(outcome, expected):
        raise EnvError(f"{'start' if start else 'step'} returned {type(outcome).__name__}, not {expected.__name__}")
    if isinstance(outcome, Step):
        if (outcome.observation is None) != (outcome.terminated or outcome.truncated):
            raise EnvError("step must return observation=None exactly when the episode has terminated or truncated")
        if not _is_finite(outcome.reward):
            raise EnvError(f"step paid a reward of {outcome.reward!r}, which is not a finite number")
    observation = outcome if isinstance(outcome, Observation) else outcome.observation
    if observation is not None and not observation.messages:
        raise EnvError("an observation without a message: the model would have nothing to answer")
    return outcome


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def bind_all(parts: Sequence[Any], models: Any) -> None:
    """`bind` rewards and metrics to the run's models. Raises DataError for whatever a user's own raises."""
    for part in parts:
        if type(part).__module__.startswith("sapwood."):
            part.bind(models)
        else:
            plugins.call(f"bind of {type(part).__name__!r}", part.bind, models)


def _reward_name(reward: Reward) -> str:
    """A built-in's plugin name, otherwise the name of the class."""
    package, _, module = type(reward).__module__.rpartition(".")
    return module if package == "sapwood.rewards" else type(reward).__name__


def _scores(name: str, reward: Reward, groups: Sequence[Group]) -> Any:
    if type(reward).__module__.startswith("sapwood."):
        return reward.score(groups)
    turns = [len(trajectory.turns) for group in groups for trajectory in group.trajectories]
    scores = plugins.call(f"reward {name!r}", reward.score, groups)
    if turns != [len(trajectory.turns) for group in groups for trajectory in group.trajectories]:
        raise DataError(f"reward {name!r} changed the turns of a trajectory; a reward reads them only.")
    return scores


def _free_name(name: str, taken: set[str]) -> str:
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _check_scores(name: str, scores: Any, groups: Sequence[Group]) -> None:
    if not isinstance(scores, list) or len(scores) != len(groups):
        raise DataError(f"reward {name!r} must return a list with one entry a group, {len(groups)} here.")
    for group, members in zip(groups, scores, strict=True):
        where = f"reward {name!r}, task {group.task.id!r}"
        if not isinstance(members, list) or len(members) != len(group.trajectories):
            raise DataError(f"{where}: it must return one dict a trajectory, {len(group.trajectories)} here.")
        for parts in members:
            if not isinstance(parts, dict):
                raise DataError(f"{where}: it must return a dict of named parts, not {described(parts)}.")
            for part, value in parts.items():
                if not _is_finite(value):
                    raise DataError(f"{where}: part {part!r} is {value!r}, not a finite number.")


def _conversations(turns: Sequence[Turn]) -> list[tuple[int, list[Turn]]]:
    """Cut at restarts: (index of the first turn, turns)."""
    cuts = [t for t, turn in enumerate(turns) if t == 0 or turn.restart]
    return [(a, list(turns[a:b])) for a, b in zip(cuts, [*cuts[1:], len(turns)], strict=True)]


def _row(first: int, turns: Sequence[Turn], group: int, member: int, reward: float, temperature: float) -> Row:
    ids, mask, index = [], [], []
    for t, turn in enumerate(turns, first):
        ids += [turn.prompt_ids, turn.token_ids]
        mask += [np.zeros(turn.prompt_ids.size, np.bool_), np.ones(turn.token_ids.size, np.bool_)]
        index.append(np.full(turn.token_ids.size, t, np.int32))
    return Row(
        token_ids=np.concatenate(ids).astype(np.int64, copy=False),
        loss_mask=np.concatenate(mask),
        turn=np.concatenate(index),
        sampled_logprobs=_joined(turns, "sampled_logprobs"),
        kept_logmass=_joined(turns, "kept_logmass"),
        group=group,
        member=member,
        reward=reward,
        temperature=temperature,
    )


def _joined(turns: Sequence[Turn], name: str) -> Floats | None:
    """The turns' arrays, or None where they were not sampled by an engine (demonstrations, pairs)."""
    arrays = [getattr(turn, name) for turn in turns]
    tokens = sum(turn.token_ids.size for turn in turns)
    if tokens and not any(array.size for array in arrays):
        return None
    for turn, array in zip(turns, arrays, strict=True):
        if array.shape != turn.token_ids.shape:
            raise ValueError(f"a turn has {turn.token_ids.size} tokens but {array.size} {name}")
    return np.concatenate(arrays).astype(np.float32, copy=False)


def _learnt_by_turn(rows: Sequence[Row]) -> dict[tuple[int, int, int], dict[str, list[float]]]:
    """By (group, member, turn): name -> a value a token of the reply."""
    found: dict[tuple[int, int, int], dict[str, list[float]]] = {}
    for row in rows:
        before = row.old_logprobs if row.old_logprobs is not None else row.sampled_logprobs
        ratios = None if row.logprobs is None or before is None else np.exp(row.logprobs - before)
        for name, values in (("advantages", row.advantages), ("logprobs", row.logprobs), ("ratios", ratios)):
            if values is not None:
                for turn, value in zip(row.turn.tolist(), values.tolist(), strict=True):
                    found.setdefault((row.group, row.member, turn), {}).setdefault(name, []).append(value)
    return found


def pieces(ids: Ids, decode: Callable[[Ids], str]) -> list[str]:
    """A text a token, which together are the decoded text; a character that several tokens spell is the last one's."""
    found: list[str] = []
    # A window of the token before and those not told yet: tokenizers write a token differently at the start of a text.
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[start:read]), decode(ids[start:end])
        if after.endswith("\ufffd") and end < len(ids) and end - read < 8:
            found.append("")
            continue
        found.append(after[len(before) :])
        start, read = read, end
    return found


def _turn_record(turn: Turn, learnt: Mapping[str, list[float]], decode: Callable[[Ids], str]) -> dict[str, Any]:
    return {
        "prompt": decode(turn.prompt_ids),
        "reply": turn.text,
        "prompt_ids": turn.prompt_ids.tolist(),
        "token_ids": turn.token_ids.tolist(),
        "tokens": pieces(turn.token_ids, decode),
        "sampled_logprobs": turn.sampled_logprobs.tolist(),
        "logprobs": learnt.get("logprobs"),
        "ratios": learnt.get("ratios"),
        "stop_reason": str(turn.stop_reason),
        "reward": turn.reward,
        "restart": turn.restart,
        "info": dict(turn.info),
        "advantages": learnt.get("advantages"),
    }
