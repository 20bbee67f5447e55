"""Stage 4: of everything that the model said, keep what is worth learning from.

Three gates, each on what the one before let through:

1. *valid*: the reply was read, its powers are within -1..1, and no fallback acted.
2. *outliers*: the step's reward is neither below the `q_low` nor above the `q_high` quantile of the rewards of the
   valid replies, those of all files together.
3. *rank*: the score is not below the `min_percentile` quantile of the scores of what is left.

The score is the reward itself (`rank: reward`), or the advantage by a critic, r + gamma V(s') - V(s) (`value`), or the
reward less the mean of the other valid replies to the same state (`group`). The weather decides most of a reward, so
ranking by it keeps mild hours rather than good actions; the report shows for every ranking what it would keep: how far
from the best action of one step, which the simulator knows, and which hours and temperatures.

Only a language model's own decisions are kept: a controller's are refused.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sapwood.data import recordings
from sapwood.data.recordings import DecisionFile, Recorded
from sapwood.envs.hvac.building import load_building
from sapwood.envs.hvac.controllers import one_step_optimal
from sapwood.envs.hvac.files import replace as write
from sapwood.envs.hvac.layout import action_of, differences
from sapwood.envs.hvac.simulator import HvacEnv
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import DataError
from sapwood.pipeline import filter_plots, trajectories
from sapwood.pipeline.trajectories import Decision, Episode, Reply, TrajectoryFile, Value
from sapwood.progress import Progress
from sapwood.sections import Section

Rank = Literal["reward", "value", "group"]
Doubles = NDArray[np.float64]

#: In the order in which `rank: auto` takes the first that the recording allows; docs/algorithms/distill.md has why.
RANKS: tuple[Rank, ...] = ("group", "value", "reward")
DATA, REPORT, HISTOGRAM, SHARES = "distillation_data.json", "filter_report.json", "kept_rewards.png", "kept_states.png"
#: Bins of the outdoor temperature (equally filled), and of the hours of a day.
BINS = 6
#: Rewards of the same reply to the same state that differ by less are the same.
_SAME = 1e-9
#: How far a replayed reward may be from the recorded one: observations are kept as float32.
_REPEATS = 1e-3


class DistillOptions(Section):
    """Which decisions are kept.

    rank: what decides in the last gate; auto: the first of group, value and reward that the recording allows.
    min_percentile: the quantile of the scores below which decisions are dropped: 0.5 keeps the better half. q_low,
    q_high: quantiles of the rewards below and above which they are dropped as outliers. gamma: discount of the returns,
    and of the critic's advantage.
    """

    rank: Literal["auto", "reward", "value", "group"] = "auto"
    min_percentile: Annotated[float, Field(ge=0, le=1)] = 0.5
    q_low: Annotated[float, Field(ge=0, lt=1)] = 0.05
    q_high: Annotated[float, Field(gt=0, le=1)] = 0.99
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99

    @model_validator(mode="after")
    def _low_below_high(self) -> DistillOptions:
        if self.q_low >= self.q_high:
            raise ValueError(f"distill.q_low ({self.q_low:g}) must be below distill.q_high ({self.q_high:g})")
        return self


@dataclass(frozen=True)
class DistillResult:
    """What the filter left. recorded: replies before the gates; kept: after them; rank: that decided."""

    path: Path
    report: Path
    rank: Rank
    recorded: int
    kept: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One reply to a state.

    said: the reply; number: 0 for the one that acted; state: its place among all states; total: discounted return from
    here on. regret: by how much the best action of this step pays more, None where the simulator can't tell; ahead: the
    critic's advantage, None without one.
    """

    file: int
    episode: Episode
    step: Decision
    said: Decision | Reply
    number: int
    state: int
    outdoor: float
    hour: float
    total: float
    regret: float | None = None
    ahead: float | None = None

    @property
    def problem(self) -> str | None:
        """Why it is not valid, in the report's words."""
        if self.said.parsed == "failed":
            return "unreadable"
        if self.said.fallback:
            return "fallback"
        return None if all(-1.0 <= power <= 1.0 for power in self.said.action) else "out of range"


@dataclass(frozen=True)
class Filtered:
    """What the gates made of the candidates by one ranking. kept: indices; scores: of all, NaN where there is none.

    gates: what each did, for the report; cut: the least score that is kept.
    """

    rank: Rank
    kept: tuple[int, ...]
    scores: Doubles
    gates: tuple[dict[str, Any], ...]
    cut: float = math.nan

    @property
    def emptied(self) -> str | None:
        """The gate after which nothing was left."""
        return next((gate["gate"] for gate in self.gates if gate["kept"] == 0), None)


def run(
    options: DistillOptions,
    rollouts: Sequence[Path],
    family: Hvac,
    out_dir: Path,
    progress: Progress,
    *,
    critic: Value | None = None,
) -> DistillResult:
    """Filter rollout files to `distillation_data.json`, with a report and pictures.

    critic: values of observations [S, n + 4], such as those of the PPO controller; gives the ranking `value`. Raises
    DataError for files that can't be learnt from and for a filter that keeps nothing; the report is written even then.
    """
    files = [_opened(path, family, progress) for path in rollouts]
    if not files:
        raise DataError("distill: no rollout file is given; make one with `sapwood pipeline RECIPE --stage rollout`.")
    _check_models(files)
    found = candidates(files, family, options.gamma, critic, progress)
    results: dict[Rank, Filtered] = {rank: gate(found, options, rank) for rank in RANKS if _possible(rank, found)}
    chosen = results[_choose(options.rank, results)]
    report = out_dir / REPORT
    write(report, _report(files, found, options, results, chosen))
    if not chosen.kept:
        raise DataError(_emptied(chosen, options, report))
    path = out_dir / DATA
    write(path, recordings.chunks(_decisions(files, found, chosen, options)))
    for name, picture in _pictures(found, results, chosen).items():
        write(out_dir / name, [picture])
    progress.note(f"distill: {len(chosen.kept):,} of {len(found):,} replies are kept, ranked by {chosen.rank}")
    return DistillResult(path, report, chosen.rank, len(found), len(chosen.kept))


# --- reading -----------------------------------------------------------------------------------------------------


def _opened(path: Path, family: Hvac, progress: Progress) -> TrajectoryFile:
    """A rollout file that can be learnt from. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such rollout; make it with `sapwood pipeline RECIPE --stage rollout`.")
    file = trajectories.read(path)
    if file.controller != "llm":
        raise DataError(
            f"{path}: its controller is {file.controller!r}, and a model learns from its own decisions only, never "
            "from another controller's; give a language model's rollout (`sapwood pipeline RECIPE --stage rollout`)."
        )
    for name, (theirs, ours) in trajectories.check_world(file, family).items():
        progress.note(f"{path}: recorded at {name} {theirs}, and env has {ours}; its own is used")
    for episode, step in file.steps:
        for said in (step, *step.others):
            where = f"{path}: task {episode.task!r}, step {step.step}"
            if not (said.token_ids and len(said.sampled_logprobs) == len(said.kept_logmass) == len(said.token_ids)):
                raise DataError(
                    f"{where}: its token ids and log-probabilities are missing, so it can't be learnt from; record it "
                    "again with `sapwood pipeline RECIPE --stage rollout`."
                )
        if not step.temperature:
            raise DataError(
                f"{where}: it was sampled greedily, so its probabilities teach nothing; set rollout.temperature above "
                "0 and record it again."
            )
    return file


def _check_models(files: Sequence[TrajectoryFile]) -> None:
    for file in files[1:]:
        difference = recordings.model_difference(files[0].model or {}, file.model or {})
        if difference:
            raise DataError(
                f"{file.source}: recorded of another model than {files[0].source} ({difference}), and a model learns "
                "from its own decisions only; filter the rollouts of one model."
            )


def candidates(
    files: Sequence[TrajectoryFile], family: Hvac, gamma: float, critic: Value | None, progress: Progress
) -> list[Candidate]:
    """Every reply of every file, in each state the one that acted first; with regrets and critic's advantages."""
    found: list[Candidate] = []
    total, done, states = sum(len(file.episodes) for file in files), 0, 0
    for index, file in enumerate(files):
        own = _as_recorded(file, family)
        after: list[NDArray[np.float32] | None] = []
        first = len(found)
        for episode in file.episodes:
            made, following = _episode(index, episode, own, states, gamma)
            repeats = all(c.regret is not None for c in made)
            if not repeats and own.backend == "rc":
                progress.warn(f"{file.source}: task {episode.task!r} doesn't repeat here, so its regrets are not known")
            found += made
            after += following
            states += len(episode.steps)
            done += 1
            progress.work("distill: episodes", done, total)
        if critic is not None:
            found[first:] = _with_critic(found[first:], after, critic, gamma)
    return found


def _as_recorded(file: TrajectoryFile, family: Hvac) -> Hvac:
    """The family with the physics and the reward of the file."""
    changed = {name: theirs for name, (theirs, _) in differences(file.world, family).items() if theirs is not None}
    return Hvac.model_validate({**family.model_dump(), **changed}) if changed else family


def _episode(
    index: int, episode: Episode, family: Hvac, states: int, gamma: float
) -> tuple[list[Candidate], list[NDArray[np.float32] | None]]:
    """An episode's replies, and the observation after each, where it is known."""
    totals = [0.0]  # from the end: totals[k] is the return of the last k steps
    for step in reversed(episode.steps):
        totals.append(step.reward + gamma * totals[-1])
    totals.reverse()
    told = list(_replayed(episode, family))
    made: list[Candidate] = []
    after: list[NDArray[np.float32] | None] = []
    zones = len(load_building(family.building).zones)  # the outdoor temperature is the number after them
    for place, (step, (best, following)) in enumerate(zip(episode.steps, told, strict=True)):
        hour = (episode.hour + place * family.time_res / 3600.0) % 24.0
        for number, said in enumerate((step, *step.others)):
            made.append(
                Candidate(
                    file=index,
                    episode=episode,
                    step=step,
                    said=said,
                    number=number,
                    state=states + place,
                    outdoor=step.observation[zones],
                    hour=hour,
                    total=said.reward + gamma * totals[place + 1],
                    regret=None if best is None else best - said.reward,
                )
            )
            after.append(following[number])
    return made, after


_Told = tuple[float | None, list[NDArray[np.float32] | None]]


def _replayed(episode: Episode, family: Hvac) -> Iterator[_Told]:
    """For each step: the best reward of one step, and the observation after each reply; None where it isn't known.

    The simulator is put where the episode began and made to take the recorded actions; other replies act on copies.
    """
    if family.backend != "rc":
        yield from _unreplayed(episode)
        return
    env = family.simulator(len(episode.steps))
    start = np.array(episode.steps[0].observation[: env.zones])
    env.reset(seed=episode.seed, options={"day": episode.day, "hour": episode.hour, "initial_temperature": start})
    rest = _unreplayed(episode)
    for step in episode.steps:
        unknown = next(rest)
        twin = copied(env)
        best = float(twin.step(one_step_optimal(env).astype(np.float32))[1])
        others: list[NDArray[np.float32] | None] = []
        for other in step.others:
            others.append(copied(env).step(action_of(family, other.action))[0])
        observation, reward, *_ = env.step(action_of(family, step.action))
        if abs(reward - step.reward) > _REPEATS * max(1.0, abs(step.reward)):
            yield unknown
            yield from rest
            return
        yield best, [observation, *others]


def copied(env: HvacEnv) -> HvacEnv:
    """A copy of the simulator that shares what never changes."""
    return copy.deepcopy(env, {id(env.physics): env.physics})


def _unreplayed(episode: Episode) -> Iterator[_Told]:
    """What the recording itself tells: the observation after the reply that acted is that of the next step."""
    for place, step in enumerate(episode.steps, 1):
        nothing: list[NDArray[np.float32] | None] = [None] * len(step.others)
        last = place == len(episode.steps)
        yield None, [None if last else np.array(episode.steps[place].observation, np.float32), *nothing]


def _with_critic(
    found: Sequence[Candidate], after: Sequence[NDArray[np.float32] | None], critic: Value, gamma: float
) -> list[Candidate]:
    """The candidates with r + gamma V(s') - V(s) where s' is known."""
    before = critic(np.array([c.step.observation for c in found], np.float32))
    known = [i for i, observation in enumerate(after) if observation is not None]
    values = dict(zip(known, critic(np.array([after[i] for i in known], np.float32)), strict=True)) if known else {}
    return [
        replace(c, ahead=c.said.reward + gamma * float(values[i]) - float(before[i])) if i in values else c
        for i, c in enumerate(found)
    ]


# --- gates -------------------------------------------------------------------------------------------------------


def scores(found: Sequence[Candidate], rank: Rank) -> Doubles:
    """Score of every candidate [N] by a ranking; NaN where it has none."""
    if rank == "reward":
        return np.array([c.said.reward for c in found], np.float64)
    if rank == "value":
        return np.array([math.nan if c.ahead is None else c.ahead for c in found], np.float64)
    groups: dict[int, list[int]] = {}
    for i, candidate in enumerate(found):
        if candidate.problem is None:
            groups.setdefault(candidate.state, []).append(i)
    made = np.full(len(found), math.nan)
    for members in groups.values():
        rewards = np.array([found[i].said.reward for i in members])
        if len(members) > 1 and np.ptp(rewards) > _SAME:
            # Against the mean of the others: n / (n - 1) of the distance from the mean of all.
            made[members] = (rewards - rewards.mean()) * len(members) / (len(members) - 1)
    return made


def _possible(rank: Rank, found: Sequence[Candidate]) -> bool:
    """Whether the recording allows a ranking at all."""
    if rank == "value":
        return any(c.ahead is not None for c in found)
    return rank == "reward" or any(c.number for c in found)


def _choose(asked: str, results: Mapping[Rank, Filtered]) -> Rank:
    if asked == "auto":
        return next(rank for rank in RANKS if rank in results)
    for rank in results:
        if rank == asked:
            return rank
    needed = {
        "group": "several replies to each state: record them with rollout.replies_per_state=4",
        "value": "a critic: train the PPO controller first (`sapwood pipeline RECIPE --stage ppo`)",
    }[asked]
    raise DataError(f"distill.rank is {asked}, which needs {needed}; or set distill.rank=auto.")


def gate(found: Sequence[Candidate], options: DistillOptions, rank: Rank) -> Filtered:
    """The candidates that pass all gates, ranked so; a gate that lets nothing through is the last."""
    problems = Counter(problem for c in found if (problem := c.problem) is not None)
    left = [i for i, c in enumerate(found) if c.problem is None]
    gates: list[dict[str, Any]] = [{"gate": "valid", "kept": len(left), "left_out": dict(sorted(problems.items()))}]
    ranked = scores(found, rank)
    if not left:
        return Filtered(rank, (), ranked, tuple(gates))
    rewards = np.array([found[i].said.reward for i in left])
    low, high = (float(q) for q in np.quantile(rewards, [options.q_low, options.q_high]))
    out = {"below": int((rewards < low).sum()), "above": int((rewards > high).sum())}
    left = [i for i, reward in zip(left, rewards.tolist(), strict=True) if low <= reward <= high]
    gates.append({"gate": "outliers", "kept": len(left), "left_out": out, "from": low, "to": high})
    if left and rank != "reward":
        compared = [i for i in left if math.isfinite(ranked[i])]
        gates.append(
            {"gate": "compared", "kept": len(compared), "left_out": {"without a score": len(left) - len(compared)}}
        )
        left = compared
    if not left:
        return Filtered(rank, (), ranked, tuple(gates))
    cut = float(np.quantile(ranked[left], options.min_percentile))
    kept = tuple(i for i in left if ranked[i] >= cut)
    gates.append({"gate": "rank", "kept": len(kept), "left_out": {"below": len(left) - len(kept)}, "from": cut})
    return Filtered(rank, kept, ranked, tuple(gates), cut)


def _emptied(chosen: Filtered, options: DistillOptions, report: Path) -> str:
    """Which gate let nothing through, and what to change."""
    last = chosen.gates[-1]
    out = ", ".join(f"{count:,} {reason}" for reason, count in last["left_out"].items() if count) or "none came so far"
    change = {
        "valid": "lower rollout.temperature, give more examples (env.few_shot), more room (rollout.max_new_tokens) or "
        "a larger model",
        "outliers": f"lower distill.q_low ({options.q_low:g}) or raise distill.q_high ({options.q_high:g}), or record "
        "more episodes (rollout.episodes)",
        "compared": "raise rollout.temperature, so that replies to a state differ, or rank otherwise (distill.rank)",
        "rank": f"lower distill.min_percentile ({options.min_percentile:g})",
    }[str(last["gate"])]
    return f"distill: the gate {last['gate']!r} leaves nothing to learn from: {out}; {change}. See {report}."


# --- what is written ---------------------------------------------------------------------------------------------


def _decisions(
    files: Sequence[TrajectoryFile], found: Sequence[Candidate], chosen: Filtered, options: DistillOptions
) -> DecisionFile:
    kept = [found[i] for i in chosen.kept]
    above = chosen.scores[list(chosen.kept)] - chosen.cut
    advantages = above / above.mean() if above.mean() > 0 else np.ones(len(kept))
    totals = np.array([c.total for c in kept])
    deviation = float(totals.std())
    targets = (totals - totals.mean()) / deviation if deviation > 0 else np.zeros(len(kept))
    prompts = {key: messages for file in files for key, messages in file.prompts.items()}
    used = {c.step.prompt for c in kept}
    return DecisionFile(
        model=dict(files[0].model or {}),
        world=dict(files[0].world),
        rank=chosen.rank,
        gamma=options.gamma,
        prompts={key: messages for key, messages in prompts.items() if key in used},
        decisions=tuple(
            _recorded(c, files[c.file].source, *numbers)
            for c, *numbers in zip(
                kept, chosen.scores[list(chosen.kept)].tolist(), advantages.tolist(), targets.tolist(), strict=True
            )
        ),
    )


def _recorded(candidate: Candidate, file: str, score: float, advantage: float, target: float) -> Recorded:
    step, said = candidate.step, candidate.said
    assert step.prompt is not None
    assert step.state is not None
    assert step.temperature is not None
    return Recorded(
        prompt=step.prompt,
        state=step.state,
        reply=said.reply or "",
        action=said.action,
        token_ids=said.token_ids,
        sampled_logprobs=said.sampled_logprobs,
        kept_logmass=said.kept_logmass,
        temperature=step.temperature,
        reward=said.reward,
        total=candidate.total,
        score=score,
        advantage=advantage,
        value_target=target,
        source={
            "file": Path(file).name,
            "task": candidate.episode.task,
            "step": step.step,
            "reply": candidate.number,
        },
    )


@dataclass(frozen=True)
class Quality:
    """How good a selection is. decisions: how many; reward, regret: means, None where no regret is known.

    gain: mean reward less that of all valid replies to the same state, over states that have several: what learning
    these replies is worth, whatever the weather; None where there are no such states. outdoor_shift, hour_shift: total
    variation distance between the states that were kept and all valid ones, over bins of the outdoor temperature and of
    the hour: 0 keeps all alike, 1 keeps what the others lack.
    """

    decisions: int
    reward: float
    regret: float | None
    gain: float | None
    outdoor_shift: float
    hour_shift: float


def quality(found: Sequence[Candidate], kept: Sequence[int]) -> Quality | None:
    """Of the candidates with these indices, against all valid ones; None where there are none."""
    valid = [c for c in found if c.problem is None]
    chosen = [found[i] for i in kept]
    if not chosen:
        return None
    regrets = [c.regret for c in chosen if c.regret is not None]
    said: dict[int, list[float]] = {}
    for c in valid:
        said.setdefault(c.state, []).append(c.said.reward)
    gains = [c.said.reward - float(np.mean(said[c.state])) for c in chosen if len(said[c.state]) > 1]
    edges = _edges(valid)
    return Quality(
        decisions=len(chosen),
        reward=float(np.mean([c.said.reward for c in chosen])),
        regret=float(np.mean(regrets)) if regrets else None,
        gain=float(np.mean(gains)) if gains else None,
        outdoor_shift=_shift([c.outdoor for c in chosen], [c.outdoor for c in valid], edges),
        hour_shift=_shift([c.hour for c in chosen], [c.hour for c in valid], np.linspace(0, 24, BINS + 1)),
    )


def _edges(valid: Sequence[Candidate]) -> Doubles:
    """Bounds of equally filled bins of the outdoor temperature; fewer where values repeat."""
    edges = np.unique(np.quantile([c.outdoor for c in valid], np.linspace(0, 1, BINS + 1)))
    return edges if len(edges) > 1 else np.array([edges[0] - 0.5, edges[0] + 0.5])


def _shift(kept: Sequence[float], everything: Sequence[float], edges: Doubles) -> float:
    ours, theirs = (np.histogram(values, edges)[0] / len(values) for values in (kept, everything))
    return float(np.abs(ours - theirs).sum() / 2)


def _report(
    files: Sequence[TrajectoryFile],
    found: Sequence[Candidate],
    options: DistillOptions,
    results: Mapping[Rank, Filtered],
    chosen: Filtered,
) -> list[bytes]:
    valid = [i for i, c in enumerate(found) if c.problem is None]
    told = {
        "files": [file.source for file in files],
        "recorded": len(found),
        "states": len({c.state for c in found}),
        "options": options.model_dump(mode="json"),
        "rank": chosen.rank,
        "gates": list(chosen.gates),
        "emptied_by": chosen.emptied,
        "valid": _plain(quality(found, valid)),
        "rankings": {rank: _plain(quality(found, result.kept)) for rank, result in results.items()},
    }
    return [(json.dumps(told, indent=2, allow_nan=False) + "\n").encode()]


def _plain(made: Quality | None) -> dict[str, Any] | None:
    return None if made is None else {name: getattr(made, name) for name in Quality.__dataclass_fields__}


def _pictures(found: Sequence[Candidate], results: Mapping[Rank, Filtered], chosen: Filtered) -> dict[str, bytes]:
    """PNG files by name."""
    valid = [i for i, c in enumerate(found) if c.problem is None]
    rewards = [c.said.reward for c in found]
    kept = {rank: result.kept for rank, result in results.items()}
    panels = (
        ("outdoor temperature, C", [c.outdoor for c in found], _edges([found[i] for i in valid])),
        ("hour of the day", [c.hour for c in found], np.linspace(0, 24, BINS + 1)),
    )
    return {
        HISTOGRAM: filter_plots.rewards([rewards[i] for i in valid], [rewards[i] for i in chosen.kept], chosen.rank),
        SHARES: filter_plots.states(panels, valid, kept),
    }
