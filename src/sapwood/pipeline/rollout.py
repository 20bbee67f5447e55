"""Stage 3: a language model controls the building on training days, and everything it says is recorded.

Many episodes are played at once through Sapwood's engine, which reads their common few-shot examples once. With
`replies_per_state`, several replies are sampled in each state: the first one acts, the others are tried on copies of
the simulator, so that replies can be compared where the weather is the same. Episodes that are finished are kept in a
file beside the result until it is whole, so a killed rollout goes on with the ones that are missing.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from sapwood import memory
from sapwood.chat import Chat
from sapwood.engines import Completion, Engine, Request, Sampling
from sapwood.envs import Observation, Split
from sapwood.envs.hvac.layout import shortest, world_of
from sapwood.envs.hvac.text import Hvac, HvacText
from sapwood.errors import BudgetError, ConfigError
from sapwood.generate import JsonLines
from sapwood.models.identity import identity
from sapwood.models.load import Policy, load_policy
from sapwood.opening import build_chat, make_engine
from sapwood.pipeline import trajectories
from sapwood.pipeline.digests import digests
from sapwood.pipeline.trajectories import Decision, Episode, Reply, TrajectoryFile, prompt_id
from sapwood.progress import Progress
from sapwood.rollout import turn_seed, until_turn_end
from sapwood.run import writing
from sapwood.sections import ModelSection, Positive, Section
from sapwood.types import Message, Task

#: Sampled tokens of a reply: room for {"power": ...}, and for a few sentences before it.
SHORT, THOUGHTS = 64, 256
#: A stream of the seed of its own, so that temperatures don't follow the tasks.
_TEMPERATURES = 31

Temperature = Annotated[float, Field(ge=0, le=10)]


class RolloutOptions(Section):
    """What is sampled. The prompt (few-shot examples, past actions, reasoning) is the `env` section's.

    episodes: training days that are played; temperature: one for all, or a range from which each episode draws its
    own; top_k, top_p, min_p, stop: of the sampling; max_new_tokens: of one reply (64, or 256 where it may reason).
    replies_per_state: replies sampled in each state, of which the first acts; at_once: episodes that are played at the
    same time.
    """

    episodes: Positive = 64
    temperature: tuple[Temperature, Temperature] = (0.3, 0.7)
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop: tuple[str, ...] = ()
    max_new_tokens: Positive | None = None
    replies_per_state: Positive = 1
    at_once: Positive = 16

    @field_validator("temperature", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> RolloutOptions:
        low, high = self.temperature
        if low > high:
            raise ValueError(f"rollout.temperature is {low:g} to {high:g}: give the lower one first")
        if self.replies_per_state > 1 and low == 0:
            raise ValueError(
                "rollout.replies_per_state compares replies, and at temperature 0 they are all the same; raise "
                "rollout.temperature"
            )
        return self

    def sampling(self, family: Hvac, temperature: float) -> Sampling:
        """How a reply is sampled at a temperature."""
        return Sampling(
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop=self.stop,
            max_new_tokens=self.max_new_tokens or (THOUGHTS if family.reasoning else SHORT),
        )

    def temperatures(self, seed: int) -> list[float]:
        """One an episode, three decimals each."""
        low, high = self.temperature
        drawn = np.random.default_rng([seed, _TEMPERATURES]).uniform(low, high, self.episodes)
        return [round(float(t), 3) for t in drawn]


@dataclass(frozen=True)
class RolloutResult:
    """What a rollout left. parsed: share of replies that were read; forms: how often each form was; mean: of the
    episodes' physical returns; tokens: sampled in all, the further replies' included.
    """

    path: Path
    episodes: int
    decisions: int
    mean: float
    parsed: float
    forms: Mapping[str, int]
    tokens: int

    @staticmethod
    def of(path: Path, file: TrajectoryFile) -> RolloutResult:
        """Of a file that was recorded."""
        said = [reply for _, step in file.steps for reply in (step, *step.others)]
        forms = Counter(str(reply.parsed) for reply in said)
        return RolloutResult(
            path=path,
            episodes=len(file.episodes),
            decisions=file.count,
            mean=math.fsum(e.total for e in file.episodes) / len(file.episodes),
            parsed=1.0 - forms["failed"] / len(said),
            forms=dict(sorted(forms.items())),
            tokens=sum(len(reply.token_ids) for reply in said),
        )


def run(
    options: RolloutOptions,
    family: Hvac,
    model: ModelSection,
    out_dir: Path,
    progress: Progress,
    seed: int,
    *,
    name: str = "llm_rollout.json",
    split: Split = "train",
    engine: Mapping[str, Any] | None = None,
) -> RolloutResult:
    """Play `episodes` tasks of the split and write `out_dir/name`; what an interrupted run of the same left is used.

    engine: the local engine's own options. Raises SapwoodError for what a user can act on; nothing that is there is
    overwritten before the new file is whole.
    """
    check(options, family)
    path = out_dir / name
    tasks = family.tasks(split, options.episodes, seed)
    file = play_tasks(options, family, tasks, model, path, progress, seed, engine or {})
    remove_parts(out_dir)
    return RolloutResult.of(path, file)


def play_tasks(
    options: RolloutOptions,
    family: Hvac,
    tasks: Sequence[Task],
    model: ModelSection,
    path: Path,
    progress: Progress,
    seed: int,
    engine: Mapping[str, Any],
) -> TrajectoryFile:
    """Play `options.episodes` tasks and write them to `path`; what an interrupted run of the same left is used.

    The parts that are kept for that stay until `remove_parts`.
    """
    progress.phase("loading")
    policy = load_policy(model, head="lm")
    chat, sampler = build_chat(policy, model), make_engine("local", policy, engine)
    played = record(options, family, tasks, policy, chat, sampler, seed, progress, path)
    model_of = {**identity(policy), "init_from": None if model.init_from is None else str(model.init_from)}
    model_of["sampling"] = options.model_dump(mode="json", exclude={"episodes", "at_once"})
    file = TrajectoryFile("llm", seed, world_of(family), played.episodes, model_of, played.prompts)
    trajectories.write(path, file)
    return file


def remove_parts(folder: Path) -> None:
    """Remove what rollouts in a folder were kept in to go on from. Raises StorageError."""
    with writing(folder):
        for left in folder.glob("*_rollout.*.jsonl*"):
            left.unlink(missing_ok=True)


def check(options: RolloutOptions, family: Hvac) -> None:
    """Raises ConfigError for a world whose decisions can't be recorded one by one."""
    if family.memory != "state":
        raise ConfigError(
            f"env.memory is {family.memory}: a recorded decision is learnt from by itself, so the model must be given "
            "the state anew each time; set env.memory=state (history shows it its last actions)."
        )


@dataclass(frozen=True)
class Played:
    """Episodes in the order of their tasks; prompts: messages before the state, by id."""

    episodes: tuple[Episode, ...]
    prompts: dict[str, tuple[Message, ...]]


def record(
    options: RolloutOptions,
    family: Hvac,
    tasks: Sequence[Task],
    policy: Policy,
    chat: Chat,
    engine: Engine,
    seed: int,
    progress: Progress,
    path: Path,
) -> Played:
    """Play the tasks in chunks of `at_once`; each chunk is kept beside `path` as soon as it is played.

    Every chunk begins with empty caches, so a rollout that was interrupted comes out as one that wasn't.
    """
    job = {
        "family": family.model_dump(mode="json"),
        "options": options.model_dump(mode="json"),
        "model": identity(policy),
        "tasks": [task.id for task in tasks],
        "seed": seed,
        "files": digests(family.examples, family.epw),
    }
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:8]
    episodes: list[Episode] = []
    prompts: dict[str, tuple[Message, ...]] = {}
    temperatures = options.temperatures(seed)
    aside = path.with_name(f"{path.stem}.{key}.jsonl")
    if (whole := _whole(aside, len(tasks))) is not None:
        return whole
    with JsonLines(aside, job, step=options.at_once) as lines:
        for kept in lines.kept:
            _take(kept, episodes, prompts)
        if episodes:
            progress.note(f"rollout: {len(episodes)} of {len(tasks)} episodes were played before and are kept")
        while len(episodes) < len(tasks):
            first = len(episodes)
            chunk = range(first, min(first + options.at_once, len(tasks)))

            def play(chunk: range = chunk) -> list[_Live]:
                engine.load(policy)
                stage = _Stage(options, family, policy, chat, engine, seed, progress, len(tasks))
                return stage.play([(i, tasks[i], temperatures[i]) for i in chunk])

            done = memory.retry(play, lambda: _shrink(engine, progress))
            for live in done:
                prompts |= live.prompts
            episodes += [live.episode() for live in done]
            lines.write(*(_line(live) for live in done))
    return Played(tuple(episodes), prompts)


def _shrink(engine: Engine, progress: Progress) -> None:
    if not engine.shrink():
        raise BudgetError(
            "memory ran out in sampling, and the engine can't take less; lower rollout.at_once, rollout.max_new_tokens "
            "or env.few_shot, quantise the base (model.quantize) or choose a smaller model."
        )
    progress.warn("memory ran out in sampling: the engine takes fewer replies and tokens at once from here on")


# --- playing -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Live:
    """A running episode. number: its place among all; waiting: replies to the state, by member."""

    number: int
    task: Task
    world: HvacText
    sampling: Sampling
    steps: list[Decision] = field(default_factory=list)
    prompts: dict[str, tuple[Message, ...]] = field(default_factory=dict)
    prompt: str = ""
    state: str = ""
    waiting: dict[int, Completion] = field(default_factory=dict)

    def name(self, member: int) -> str:
        return f"{self.task.id}/{self.number}/{member}"

    def episode(self) -> Episode:
        task = self.task
        total = math.fsum(step.reward for step in self.steps)
        steps = tuple(self.steps)
        return Episode(task.id, int(task.metadata["day"]), int(task.metadata["hour"]), task.seed, total, steps)


@dataclass
class _Stage:
    """One chunk of episodes, played side by side."""

    options: RolloutOptions
    family: Hvac
    policy: Policy
    chat: Chat
    engine: Engine
    seed: int
    progress: Progress
    total: int
    live: dict[int, _Live] = field(default_factory=dict)

    def play(self, tasks: Sequence[tuple[int, Task, float]]) -> list[_Live]:
        """The episodes, finished. tasks: (place, task, temperature) of each."""
        opened = [self._open(*given) for given in tasks]
        try:
            while self.live:
                for completion in self.engine.step():
                    number, member = divmod(completion.request_id, self.options.replies_per_state)
                    episode = self.live[number]
                    episode.waiting[member] = completion
                    if len(episode.waiting) == self.options.replies_per_state:
                        self._act(episode)
                ended = opened[0].number + len(opened) - len(self.live)
                self.progress.work("rollout: episodes", ended, self.total)
        finally:
            for episode in opened:
                episode.world.close()
                for member in range(self.options.replies_per_state):
                    self.engine.close(episode.name(member))
        return opened

    def _open(self, number: int, task: Task, temperature: float) -> _Live:
        sampling = until_turn_end(self.options.sampling(self.family, temperature), self.chat)
        episode = _Live(number, task, self.family.make(task), sampling)
        self.live[number] = episode
        self._ask(episode, episode.world.start())
        return episode

    def _ask(self, episode: _Live, observation: Observation) -> None:
        """Submit the requests for the replies to a state."""
        *before, state = observation.messages
        episode.prompt, episode.state = prompt_id(before), state.content
        episode.prompts[episode.prompt] = tuple(before)
        ids = self.chat.start(observation.messages)
        needed = ids.size + episode.sampling.max_new_tokens
        if needed > self.policy.max_context:
            raise BudgetError(
                f"task {episode.task.id!r}: its prompt has {ids.size} tokens, which with "
                f"{episode.sampling.max_new_tokens} new tokens exceeds the model's context of "
                f"{self.policy.max_context}; lower env.few_shot, or rollout.max_new_tokens."
            )
        for member in range(self.options.replies_per_state):
            self.engine.submit(
                Request(
                    id=episode.number * self.options.replies_per_state + member,
                    token_ids=ids,
                    sampling=episode.sampling,
                    seed=turn_seed(self.seed, episode.number, member, len(episode.steps)),
                    episode=episode.name(member),
                )
            )

    def _act(self, episode: _Live) -> None:
        """All replies to a state are there: try the others, let the first one act, and go on."""
        world = episode.world
        others = [self._tried(world, episode.waiting[m]) for m in range(1, len(episode.waiting))]
        seen = tuple(shortest(world.observation))
        said, following = self._reply(world, episode.waiting[0])
        episode.waiting = {}
        columns = {name: getattr(said, name) for name in Reply.__dataclass_fields__}
        episode.steps.append(
            Decision(
                step=len(episode.steps),
                observation=seen,
                prompt=episode.prompt,
                state=episode.state,
                temperature=episode.sampling.temperature,
                others=tuple(others),
                **columns,
            )
        )
        if following is None:
            del self.live[episode.number]
            world.close()  # a simulator in a process of its own ends with its episode
        else:
            self._ask(episode, following)

    def _tried(self, world: HvacText, completion: Completion) -> Reply:
        """What a reply would do; the world stays as it is."""
        twin = copied(world)
        try:
            return self._reply(twin, completion)[0]
        finally:
            twin.close()

    def _reply(self, world: HvacText, completion: Completion) -> tuple[Reply, Observation | None]:
        """What a reply does in a world, and what the model would read next there."""
        text = self.chat.decode(completion.token_ids)
        step = world.step(text)
        told = step.info
        return Reply(
            reply=text,
            action=tuple(float(p) for p in told["powers"]),
            reward=float(told["physical_reward"]),
            parsed=told["parsed"],
            fallback=bool(told["fallback"]),
            energy=float(told["energy"]),
            comfort=float(told["comfort"]),
            token_ids=tuple(completion.token_ids.tolist()),
            sampled_logprobs=tuple(shortest(completion.logprobs)),
            kept_logmass=tuple(shortest(completion.kept_logmass)),
        ), step.observation


def copied(world: HvacText) -> HvacText:
    """A copy that lives on by itself; what never changes (the family, the building's matrices, weather) is shared.

    EnergyPlus can't be copied, so a process of its own simulates the episode so far again; close the copy after use.
    """
    shared = (world.family, world.env.physics)
    return copy.deepcopy(world, {id(item): item for item in shared})


# --- what was played before --------------------------------------------------------------------------------------


def _line(live: _Live) -> dict[str, Any]:
    prompts = {name: [[m.role, m.content] for m in messages] for name, messages in live.prompts.items()}
    return {"episode": dataclasses.asdict(live.episode()), "prompts": prompts}


def _take(kept: Mapping[str, Any], episodes: list[Episode], prompts: dict[str, tuple[Message, ...]]) -> None:
    """Add what `_line` made of a live episode."""
    episodes.append(_episode_of(kept["episode"]))
    prompts |= {name: tuple(Message(*pair) for pair in pairs) for name, pairs in kept["prompts"].items()}


def _whole(path: Path, count: int) -> Played | None:
    """All episodes of the same job, where they were played before; None where they weren't, or are damaged."""
    episodes: list[Episode] = []
    prompts: dict[str, tuple[Message, ...]] = {}
    try:
        for line in path.read_text("utf-8").splitlines():
            _take(json.loads(line), episodes, prompts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return Played(tuple(episodes), prompts) if len(episodes) == count else None


def _episode_of(plain: Mapping[str, Any]) -> Episode:
    return Episode(**{**plain, "steps": tuple(_decision_of(step) for step in plain["steps"])})


def _decision_of(plain: Mapping[str, Any]) -> Decision:
    others = tuple(Reply(**_tuples(other)) for other in plain["others"])
    return Decision(**{**_tuples(plain), "others": others})


def _tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists of numbers as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
