"""Stage `ppo`: a small network is trained on the simulator, and its days are recorded.

Stable-Baselines3's PPO on the training days of an `Hvac` family. Where its defaults are poor for buildings, ours
differ (docs/environments/hvac.md has what that changes): observations and rewards are scaled by fixed numbers
(`scaling_of`), and the first powers are drawn with a standard deviation of exp(-1) and not of 1, since the best powers
of an hour lie within a quarter of full power. A rollout is made of whole episodes, so that training continues from a
checkpoint bit for bit.

Training keeps its state in `checkpoints/` of the stage's folder, written aside and named by its own hash: a stage that
was killed goes on from the newest that is whole.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sapwood.envs.hvac.layout import world_of
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import MissingExtra, Stopped, TrainingStopped
from sapwood.pipeline.digests import digests
from sapwood.pipeline.ppo_policy import CLIP, PpoPolicy, Scaling, load_ppo, packed
from sapwood.pipeline.trajectories import play, recorded, replace, write
from sapwood.progress import Progress
from sapwood.sections import Positive, Section
from sapwood.signals import Stopping
from sapwood.types import Task

if TYPE_CHECKING:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

TRAJECTORY, POLICY = "ppo_trajectory.json", "ppo_final.zip"
CURVE, PICTURE = "training_curve.csv", "training_curve.png"
CHECKPOINTS = "checkpoints"
FORMAT = 1
#: Training days whose random control says how large rewards are.
SCALE_DAYS = 20
#: Lines of progress of a training.
LINES = 50
#: Controllers that the recorded days are compared with.
COMPARED = ("proportional", "one_step_optimal")
#: Options that a training can be continued with other values of.
_FREE = {"total_steps", "record_days", "checkpoint_every", "policy", "trust"}

Record = dict[str, float | int | None]


class PpoOptions(Section):
    """Training a network on the simulator, and recording it.

    total_steps: of the simulator, in whole rollouts; learning_rate, gamma, batch_size, n_epochs, gae_lambda,
    clip_range, ent_coef, vf_coef, max_grad_norm: Stable-Baselines3's, with its defaults; n_envs: simulators side by
    side; rollout_steps: of all of them between two updates, rounded up to whole episodes; hidden: widths of policy and
    critic; log_std_init: log of the standard deviation of the first powers.

    record_days: training days in the trajectory file; checkpoint_every: steps between checkpoints.
    policy: a PPO file of Stable-Baselines3 to record instead of training one; trust: load it although it can run code
    of its maker.
    """

    total_steps: Positive = 500_000
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 3e-4
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.99
    n_envs: Annotated[int, Field(ge=1, le=256)] = 8
    rollout_steps: Annotated[int, Field(ge=2)] = 2048
    batch_size: Annotated[int, Field(ge=2)] = 64
    n_epochs: Positive = 10
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    ent_coef: Annotated[float, Field(ge=0)] = 0.0
    vf_coef: Annotated[float, Field(ge=0)] = 0.5
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.5
    hidden: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)] = (64, 64)
    log_std_init: Annotated[float, Field(ge=-10, le=3)] = -1.0
    record_days: Positive = 300
    checkpoint_every: Positive = 50_000
    policy: Path | None = None
    trust: bool = False


@dataclass(frozen=True)
class PpoResult:
    """What the stage made. steps: trained; returns: mean physical return of the recorded days by controller."""

    trajectory: Path
    policy: Path
    steps: int
    days: int
    recorded_steps: int
    returns: Mapping[str, float] = field(default_factory=dict)


def run(
    options: PpoOptions,
    family: Hvac,
    out_dir: Path,
    progress: Progress | None = None,
    *,
    seed: int = 0,
    stopping: Stopping | None = None,
) -> PpoResult:
    """Train (or load) a policy, and record it: `ppo_final.zip`, `ppo_trajectory.json`, a training curve.

    A training that was cut short in `out_dir` with the same options is continued. stopping: signals that the caller
    watches already. Raises Stopped where one came (training is saved), TrainingStopped where training diverged,
    StorageError and DataError.
    """
    progress = progress or Progress()
    out_dir.mkdir(parents=True, exist_ok=True)
    steps = 0
    if options.policy is None:
        with contextlib.nullcontext(stopping) if stopping else Stopping() as watched:
            steps = _Training(options, family, out_dir, progress, seed, watched).run()
    else:
        load_ppo(options.policy, family, trust=options.trust)  # a file that is refused replaces nothing
        replace(out_dir / POLICY, iter([options.policy.read_bytes()]))
    policy = load_ppo(out_dir / POLICY, family, trust=options.trust)
    return _record(options, family, policy, out_dir, progress, seed, steps)


def _record(
    options: PpoOptions, family: Hvac, policy: PpoPolicy, out: Path, progress: Progress, seed: int, steps: int
) -> PpoResult:
    """Play the policy's mean action on training days."""
    days = options.record_days
    if family.start == "day" and days > len(family.days("train")):
        days = len(family.days("train"))
        progress.note(f"ppo: the world has {days} training days, and each looks the same twice: {days} are recorded.")
    tasks = family.tasks("train", days, seed)
    episodes = []
    for number, task in enumerate(tasks, 1):
        episodes.append(play(family, task, policy, policy.value))
        progress.work("recording PPO", number, len(tasks))
    file = recorded(family, "ppo", seed, episodes, policy.about)
    path = write(out / TRAJECTORY, file)
    baselines = family.baselines()
    returns = {"ppo": float(np.mean([episode.total for episode in episodes]))}
    for name in COMPARED:
        if name in baselines:
            returns[name] = float(np.mean([baselines[name](task) for task in tasks]))
    told = ", ".join(f"{name} {value:.1f}" for name, value in returns.items())
    progress.note(f"ppo: return of {len(tasks)} training days: {told}.")
    return PpoResult(path, out / POLICY, steps, len(tasks), file.count, returns)


# --- the world that is trained on --------------------------------------------------------------------------------


def scaling_of(family: Hvac, seed: int) -> Scaling:
    """Fixed numbers that bring observations and rewards to about 1.

    Zones: degrees from the target, 5 K as 1. Weather: mean and deviation on `SCALE_DAYS` training days under random
    control. People: their largest heat as 1. Rewards: divided by the mean size of a step's on those days.
    """
    env = family.simulator(_length(family))
    rng = np.random.default_rng([seed, 3])
    seen: list[NDArray[np.float32]] = []
    sizes: list[float] = []
    for task in family.tasks("train", min(SCALE_DAYS, len(family.days("train"))), seed):
        seen.append(family.reset_simulator(env, task))
        done = False
        while not done:
            action = rng.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)
            observation, reward, terminated, truncated, _ = env.step(action)
            seen.append(observation)
            sizes.append(abs(float(reward)))
            done = terminated or truncated
    env.close()
    weather = np.array(seen, np.float64)[:, -4:]
    mean, spread = weather.mean(0), np.maximum(weather.std(0), 0.05)
    mean[3], spread[3] = 0.0, max(weather[:, 3].max(), 1.0)
    zones = np.array(seen).shape[1] - 4
    return Scaling(
        (*[family.target] * zones, *mean.tolist()),
        (*[5.0] * zones, *spread.tolist()),
        max(float(np.mean(sizes)), 1e-6),
    )


class TrainingDays(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One of the simulators that are trained on: every reset begins the next training day of an endless list.

    The list is a function of the seed and the simulator's number alone: permutations of the family's training days,
    one after the other. first: the episode to begin with. Rewards are divided by `reward`; `info["return"]` has the
    physical return at an episode's end.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own declaration)

    def __init__(self, family: Hvac, reward: float, seed: int, number: int, first: int = 0) -> None:
        self.family, self.reward, self.seed, self.number = family, reward, seed, number
        self.simulator = family.simulator(_length(family))
        self.observation_space, self.action_space = self.simulator.observation_space, self.simulator.action_space
        self.episode = first
        self._block = -1
        self._tasks: list[Task] = []
        self._total = 0.0

    def task(self, episode: int) -> Task:
        """The task of an episode, counted from 0."""
        days = len(self.family.days("train"))
        block, place = divmod(episode, days)
        if block != self._block:
            drawn = int(np.random.default_rng([self.seed, 4, self.number, block]).integers(2**31))
            self._block, self._tasks = block, self.family.tasks("train", days, drawn)
        return self._tasks[place]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin the next day; the arguments are Gymnasium's and change nothing."""
        task = self.task(self.episode)
        self.episode += 1
        self._total = 0.0
        return self.family.reset_simulator(self.simulator, task), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One time step of the simulator."""
        observation, reward, terminated, truncated, _ = self.simulator.step(action)
        self._total += reward
        info = {"return": self._total} if terminated or truncated else {}
        return observation, reward / self.reward, terminated, truncated, info

    def close(self) -> None:
        """End the simulator."""
        self.simulator.close()


def _length(family: Hvac) -> int:
    """Steps of a training episode."""
    return family.train_horizon or family.horizon


# --- training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """All that a continued training needs. rows: of the training curve."""

    steps: int
    content: Mapping[str, Any]
    rows: Sequence[Record]


class _Training:
    """One training: from its newest checkpoint, if there is one, to the total."""

    def __init__(
        self, options: PpoOptions, family: Hvac, out: Path, progress: Progress, seed: int, stopping: Stopping
    ) -> None:
        self.options, self.family, self.out, self.progress = options, family, out, progress
        self.seed, self.stopping = seed, stopping
        length = _length(family)
        episodes = -(-options.rollout_steps // (options.n_envs * length))
        self.n_steps = episodes * length
        self.per_rollout = self.n_steps * options.n_envs
        self.total = -(-options.total_steps // self.per_rollout) * self.per_rollout
        self.scaling = scaling_of(family, seed)
        self.rows: list[Record] = []
        self.fingerprint = self._fingerprint()
        self.kept: list[Path] = []  # own checkpoints; others go when the next is written

    def _fingerprint(self) -> str:
        """What a checkpoint must have been made with for this training to go on from it."""
        view = {name: getattr(self.family, name) for name in ("horizon", "train_horizon", "start", "start_spread")}
        options = {name: value for name, value in self.options.model_dump(mode="json").items() if name not in _FREE}
        content = [FORMAT, self.seed, options, world_of(self.family), view, digests(self.family.epw)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def run(self) -> int:
        """Train, and write the policy and the curve; returns the steps."""
        with _own_randomness():
            state, other = self._newest()
            if other:
                self.progress.note(
                    f"{self.out}: its checkpoints are of other options or go further; training begins anew."
                )
            done = state.steps if state else 0
            model = self._model(done)
            if state is not None:
                self.rows = list(state.rows)
                self._restore(model, state)
                if 0 < done < self.total:
                    self.progress.note(f"ppo: going on from step {done:,} of {self.total:,}.")
            self.progress.start(self.total, "PPO", done)
            try:
                if done < self.total:
                    model.learn(self.total - done, _watch(self, state), log_interval=2**31, reset_num_timesteps=False)
                self._finish(model)
            finally:
                model.get_env().close()  # pyright: ignore[reportOptionalMemberAccess]
        return self.total

    def _model(self, done: int) -> PPO:
        try:
            from stable_baselines3 import PPO
            from stable_baselines3.common.logger import Logger
            from stable_baselines3.common.vec_env import DummyVecEnv
        except ImportError:
            raise MissingExtra("stable-baselines3", "pipeline", "PPO training") from None
        from sapwood.pipeline.ppo_network import Scaled

        first = done // (self.options.n_envs * _length(self.family))
        worlds = DummyVecEnv(
            [
                lambda i=i: TrainingDays(self.family, self.scaling.reward, self.seed, i, first)
                for i in range(self.options.n_envs)
            ]
        )
        o = self.options
        model = PPO(
            "MlpPolicy",
            worlds,
            learning_rate=o.learning_rate,
            n_steps=self.n_steps,
            batch_size=min(o.batch_size, self.per_rollout),
            n_epochs=o.n_epochs,
            gamma=o.gamma,
            gae_lambda=o.gae_lambda,
            clip_range=o.clip_range,
            ent_coef=o.ent_coef,
            vf_coef=o.vf_coef,
            max_grad_norm=o.max_grad_norm,
            policy_kwargs={
                "net_arch": list(o.hidden),
                "log_std_init": o.log_std_init,
                "features_extractor_class": Scaled,
                "features_extractor_kwargs": {"mean": self.scaling.mean, "scale": self.scaling.scale, "clip": CLIP},
            },
            seed=int(np.random.default_rng([self.seed, 5]).integers(2**31)),
            device="cpu",
        )
        model.set_logger(Logger(folder=None, output_formats=[]))
        return model

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def state(self, model: PPO) -> _State:
        """A copy of the training as it stands between two rollouts."""
        import torch

        kind, keys, position, has_gauss, gauss = np.random.get_state()
        content = {
            "policy": copy.deepcopy(model.policy.state_dict()),
            "optimizer": copy.deepcopy(model.policy.optimizer.state_dict()),
            "updates": model._n_updates,
            "torch": torch.get_rng_state(),
            "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss],
        }
        return _State(model.num_timesteps, content, list(self.rows))

    def _restore(self, model: PPO, state: _State) -> None:
        model.policy.load_state_dict(state.content["policy"])
        model.policy.optimizer.load_state_dict(state.content["optimizer"])
        model._n_updates = state.content["updates"]
        model.num_timesteps = state.steps

    def save(self, state: _State) -> None:
        """Write a checkpoint and drop older ones. Its name holds its hash, so a damaged one is known."""
        import torch

        made = io.BytesIO()
        content = {"format": FORMAT, "fingerprint": self.fingerprint, "steps": state.steps, "rows": list(state.rows)}
        torch.save({**content, **state.content}, made)
        data = made.getvalue()
        folder = self.out / CHECKPOINTS
        path = folder / f"step_{state.steps:09d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        replace(path, iter([data]))
        self.kept = [*(old for old in self.kept if old != path), path][-2:]
        for old in folder.glob("step_*.pt"):
            if old not in self.kept:
                old.unlink(missing_ok=True)

    def _newest(self) -> tuple[_State | None, bool]:
        """(the newest whole checkpoint that leads to this total, whether there are only others)."""
        other = False
        for path in sorted((self.out / CHECKPOINTS).glob("step_*.pt"), reverse=True):
            content = _content(path)
            if content is None:
                self.progress.note(f"{path}: damaged; left out.")
            elif content["fingerprint"] != self.fingerprint or content["steps"] > self.total:
                other = True
            else:
                self.kept = [path]
                known = {name: content[name] for name in ("policy", "optimizer", "updates", "torch", "numpy")}
                return _State(content["steps"], known, content["rows"]), False
        return None, other

    # ---- what is left ----------------------------------------------------------------------------------------

    def _finish(self, model: PPO) -> None:
        import torch

        if not all(bool(torch.isfinite(value).all()) for value in model.policy.parameters()):
            raise self.diverged(model.num_timesteps)
        self.save(self.state(model))
        saved = io.BytesIO()
        model.save(saved, exclude=["start_time", "ep_info_buffer", "ep_success_buffer"])
        about = {
            "world": world_of(self.family),
            "scaling": asdict(self.scaling),
            "steps": self.total,
            "seed": self.seed,
            "options": self.options.model_dump(mode="json", exclude={"policy", "trust", "record_days"}),
        }
        replace(self.out / POLICY, iter([packed(saved.getvalue(), about)]))
        replace(self.out / CURVE, iter([_table(self.rows)]))
        replace(self.out / PICTURE, iter([_picture(self.rows, self.family)]))

    def diverged(self, step: int) -> TrainingStopped:
        """The error for weights that are no numbers any more."""
        return TrainingStopped(
            f"ppo: the network's weights became non-finite before step {step:,}; lower ppo.learning_rate "
            f"({self.options.learning_rate:g})."
        )

    def stopped(self, step: int) -> Stopped:
        """The error for a training that a signal ended."""
        return Stopped(
            f"ppo: stopped by {self.stopping.reason} at step {step:,} of {self.total:,}; it is saved, and the same "
            "command goes on from there.",
            self.stopping.exit_code,
        )


def _content(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content, or None where it isn't what its name says."""
    import torch

    data = path.read_bytes()
    if not path.stem.endswith("-" + hashlib.sha256(data).hexdigest()[:16]):
        return None
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _watch(training: _Training, state: _State | None) -> BaseCallback:
    """What Stable-Baselines3 calls between rollouts: rows of the curve, checkpoints, progress, signals."""
    from sapwood.pipeline.ppo_network import Between

    lines = max(1, training.total // LINES)
    last = {"saved": state.steps if state else 0, "told": state.steps if state else 0}
    kept: list[_State] = []

    def began() -> None:
        """Random numbers go on where they were; making the model has used some."""
        if state is not None:
            _set_randomness(state.content)

    def between(model: PPO, row: Record | None) -> None:
        import torch

        step = model.num_timesteps
        if row is not None:
            training.rows.append(row)
            if not all(bool(torch.isfinite(value).all()) for value in model.policy.parameters()):
                raise training.diverged(step)
            if step - last["told"] >= lines or step >= training.total:
                last["told"] = step
                told = {"reward": row["return"], **{k: v for k, v in row.items() if k not in ("return", "steps")}}
                training.progress.step(step, told)
        kept[:] = [training.state(model)]
        if step - last["saved"] >= training.options.checkpoint_every:
            last["saved"] = step
            training.save(kept[0])

    def asked() -> None:
        """A rollout that is left half-way is played again when training goes on."""
        if training.stopping.requested is not None:
            training.save(kept[0])
            raise training.stopped(kept[0].steps)

    return Between(began, between, asked)


# --- randomness, curve -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Stable-Baselines3 draws from the global generators: the caller's are as they were afterwards.

    One thread: the networks are too small for more, and the sums then don't depend on the machine's cores.
    """
    import torch

    kept = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        torch.set_num_threads(kept[3])


def _set_randomness(content: Mapping[str, Any]) -> None:
    import torch

    kind, keys, position, has_gauss, gauss = content["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(content["torch"])


def _table(rows: Sequence[Record]) -> bytes:
    """The curve as CSV."""
    names = list(rows[0]) if rows else ["steps"]
    lines = [",".join(names)]
    lines += [",".join("" if row.get(name) is None else f"{row[name]:.6g}" if name != "steps" else str(row[name])
                       for name in names) for row in rows]  # fmt: skip
    return ("\n".join(lines) + "\n").encode("ascii")


def _picture(rows: Sequence[Record], family: Hvac) -> bytes:
    """The curve as PNG: returns, the critic, and the policy's spread and change."""
    from sapwood.canvas import INK, Sheet, room

    panels = (
        ("Return of a training episode, sampled powers", "return"),
        ("The same, close up", "return"),
        ("Explained variance of the critic", "explained_variance"),
        ("Value loss (scaled rewards)", "value_loss"),
        ("Standard deviation of the powers", "std"),
        ("KL of an update, old to new", "approx_kl"),
    )
    sheet = Sheet(len(panels), 3, f"PPO: {family.describe().split(', days never')[0]}")
    for index, (title, name) in enumerate(panels):
        plot = sheet.plot(index, title)
        points = [(float(row["steps"] or 0), float(row[name] or 0.0)) for row in rows if row.get(name) is not None]
        if index == 1:
            points = points[len(points) // 2 :]
        if not points:
            plot.scale((0.0, 1.0), (0.0, 1.0))
            plot.note("no data")
            continue
        steps, values = [x for x, _ in points], [y for _, y in points]
        plot.scale(room(steps), room(values))
        plot.line(steps, values, "", color=INK, lw=1.2)
    made = io.BytesIO()
    sheet.figure.savefig(made, format="png", dpi=110, metadata={"Software": None})
    return made.getvalue()
