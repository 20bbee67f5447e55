"""The stages in order, what each needs and leaves, and which of them have to be run.

A stage that is done has a manifest, DIR/manifests/NAME.json: the options that it ran with, the hashes of its inputs and
outputs, the version. A stage is skipped where all of them are as they were, so a changed option or file re-runs what
depends on it, and nothing else. A stage that was killed goes on from what it had kept.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sapwood.envs.hvac.files import replace
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import ConfigError, DataError, Stopped, StorageError
from sapwood.evaluate import Interval, paired_difference
from sapwood.paths import expanded
from sapwood.pipeline import distill, evaluation, finetune, grpo, manifests, ppo, rollout, select, trajectories
from sapwood.pipeline.digests import digest, digests
from sapwood.pipeline.evaluation import Held, evaluation_seeds
from sapwood.pipeline.manifests import Step
from sapwood.pipeline.ppo_policy import load_ppo
from sapwood.pipeline.recipe import PipelineRecipe, dump_pipeline
from sapwood.progress import Progress
from sapwood.run import take_lock, writing
from sapwood.sections import ModelSection
from sapwood.signals import Interrupted, Stopping
from sapwood.source import derive

STAGES = ("ppo", "select", "rollout", "distill", "finetune", "grpo", "eval")
FOLDERS = {
    "ppo": "01_ppo_training",
    "select": "02_few_shot_samples",
    "rollout": "03_llm_rollout",
    "distill": "03_llm_rollout",
    "finetune": "04_finetuning",
    "eval": "05_evaluation",
    "grpo": "06_grpo",
}
TRAJECTORY, POLICY, EXAMPLES = ppo.TRAJECTORY, ppo.POLICY, select.EXAMPLES
ROLLOUT, DECISIONS, FINAL = "llm_rollout.json", distill.DATA, finetune.FINAL

#: Files of one's own that a stage takes in place of another stage's: name -> what it is.
INPUTS: dict[str, dict[str, str]] = {
    "ppo": {},
    "select": {"trajectory": "a trajectory file"},
    "rollout": {"examples": "few-shot examples", "adapter": "an adapter, checkpoint or run to play"},
    "distill": {"rollout": "a rollout file; several may be given", "ppo": "a policy of stage ppo"},
    "finetune": {
        "decisions": "distilled decisions",
        "examples": "few-shot examples",
        "adapter": "an adapter to go on with",
    },
    "grpo": {"examples": "few-shot examples"},
    "eval": {
        "adapter": "a trained adapter, checkpoint or run",
        "ppo": "a policy of stage ppo",
        "examples": "few-shot examples",
        "grpo": "an adapter of the other way",
    },
}
Given = Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class Done:
    """What came of a step. skipped: it was done before, with the same options and inputs."""

    name: str
    skipped: bool
    seconds: float
    summary: Mapping[str, Any]
    outputs: tuple[Path, ...]


@dataclass
class Pipeline:
    """A recipe in its folder. stage: the only one to run, or None for all; given, out: its files and folder where they
    aren't the pipeline's own; force: run what is up to date too.
    """

    recipe: PipelineRecipe
    progress: Progress
    stage: str | None = None
    given: Given = field(default_factory=dict)
    out: Path | None = None
    force: bool = False
    done: list[Done] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dir = self.recipe.run.dir
        self.family = self.recipe.family
        if self.stage is not None and self.stage not in STAGES:
            raise ConfigError(f"--stage {self.stage}: choose {', '.join(STAGES)} or all.")
        if self.stage is None and (self.given or self.out):
            raise ConfigError("--input and --out are for one stage: name it with --stage.")
        if self.stage == "grpo" and self.recipe.grpo is None:
            raise ConfigError("--stage grpo: the recipe has no grpo section; add one, such as grpo: {steps: 30}.")
        known = INPUTS[self.stage] if self.stage else {}
        for name, paths in self.given.items():
            if name not in known:
                told = "; ".join(f"{key}: {what}" for key, what in known.items()) or "it takes none"
                raise ConfigError(f"--input {name}: stage {self.stage} takes no such file ({told}).")
            if len(paths) > 1 and (self.stage, name) != ("distill", "rollout"):
                raise ConfigError(f"--input {name}: given {len(paths)} times; stage {self.stage} takes one.")
            if name == "examples" and self.family.few_shot == 0:
                raise ConfigError("--input examples: env.few_shot is 0, so no example is shown; raise it.")
            for path in paths:
                if not path.exists():
                    raise DataError(f"--input {name}={path}: no such file or folder.")

    # --- running ------------------------------------------------------------------------------------------------

    def run(self) -> list[Done]:
        """Run what has to be run. Raises SapwoodError; Stopped where a signal came, after what was done was kept."""
        with writing(self.dir):
            self.dir.mkdir(parents=True, exist_ok=True)
        with take_lock(self.dir, "is running this pipeline") or nullcontext():
            if not self._apart:
                replace(self.dir / "pipeline.yaml", [dump_pipeline(self.recipe).encode()])
            if self.stage is not None:
                self._make(self._step(self.stage, 1))
            else:
                self._all()
        return self.done

    def _all(self) -> None:
        self._make(self._step("ppo", 1))
        self._make(self._step("select", 1))
        for round in range(1, self.recipe.run.rounds + 1):
            for stage in ("rollout", "distill", "finetune"):
                self._make(self._step(stage, round))
            if self.recipe.run.rounds > 1 and not self._improves(round):
                break
        if self.recipe.grpo is not None:
            self._make(self._step("grpo", 1))
        self._make(self._step("eval", 1))

    def _improves(self, round: int) -> bool:
        """Whether a round's model is better on training days than the one that it began with; remembers the best."""
        found = {number: self._validated(number) for number in (round - 1, round)}
        better = paired_difference(found[round], found[round - 1])
        improved = better.mean > 0
        self._remember(round if improved else round - 1, round, better)
        verdict = "better" if improved else "no better, so this round was the last"
        self.progress.note(
            f"round {round}: {found[round].interval.mean:.2f} on training days, {better.mean:+.2f} "
            f"({better.lo:+.2f} .. {better.hi:+.2f}) against the one before: {verdict}"
        )
        return improved

    def _validated(self, round: int) -> Any:
        step = self._step("validate", round)
        self._make(step)
        file = trajectories.read(step.outputs[0])
        return evaluation.summary(step.name, file)

    def _remember(self, best: int, last: int, better: Interval) -> None:
        models = self._models_up_to(max(best, 1))
        told = {"best": best, "last": last, "models": models, "difference": [better.mean, better.lo, better.hi]}
        replace(self.dir / "rounds" / "best.json", [(json.dumps(told) + "\n").encode()])

    def _models_up_to(self, round: int) -> list[str]:
        """Digests of the models of the rounds."""
        return digests(*(self._outputs("finetune", number)[0] for number in range(1, round + 1)))

    def _make(self, step: Step) -> None:
        """Run a step unless it is up to date."""
        for name, paths in step.inputs.items():
            for path in paths:
                self._check_there(step, name, path)
        hashes = {str(path): digest(path) for paths in step.inputs.values() for path in paths}
        key = manifests.key_of(step, hashes)
        manifest = self._manifest(step)
        before = manifests.read(manifest)
        if not self.force and manifests.is_up_to_date(before, key, step):
            told = (before or {}).get("summary")
            self.done.append(Done(step.name, True, 0.0, told if isinstance(told, dict) else {}, step.outputs))
            self.progress.note(f"{step.name}: up to date")
            return
        if self._apart and not self.force and (before is None or before.get("state") == "done"):
            self._refuse_overwriting(step)
        if self.force:
            manifests.clear(step)
        manifests.write_running(manifest, step, key)
        self.progress.note(f"{step.name}: begins")
        began, when = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        with _told_how_to_go_on(step.name, self.force):
            told = step.run()
        seconds = round(time.perf_counter() - began, 2)
        manifests.write_done(manifest, step, key, hashes, told, when, seconds)
        self.done.append(Done(step.name, False, seconds, told, step.outputs))
        self.progress.note(f"{step.name}: {_sentence(told)} ({seconds:.0f} s)")

    def _refuse_overwriting(self, step: Step) -> None:
        for path in step.outputs:
            if path.exists():
                raise StorageError(
                    f"{step.stage}: {path} is there already and would be overwritten; give another folder by --out, or "
                    "--force."
                )

    def _check_there(self, step: Step, name: str, path: Path) -> None:
        maker = next((stage for stage in STAGES if path in self._outputs(stage, step.round)), None)
        if path.exists():
            before = None if maker is None else manifests.read(self.dir / "manifests" / f"{maker}.json")
            if step.round == 1 and before is not None and before.get("state") == "running":
                raise DataError(
                    f"{step.stage}: {path} is that of an earlier run, since stage {maker} has not finished after a "
                    f"change; run `sapwood pipeline RECIPE --stage {maker}` first."
                )
            return
        if maker is None:
            raise DataError(f"{step.stage}: {path}: there is no such file.")
        raise DataError(
            f"{step.stage}: {path} is missing; make it with `sapwood pipeline RECIPE --stage {maker}`, or name another "
            f"by --input {name}=PATH."
        )

    def _manifest(self, step: Step) -> Path:
        # A stage with files or a folder of its own is no part of the pipeline's chain.
        if self._apart:
            return step.folder / f"{step.name}.manifest.json"
        return self.dir / "manifests" / f"{step.name}.json"

    @property
    def _apart(self) -> bool:
        return self.out is not None or bool(self.given)

    # --- what each stage is -------------------------------------------------------------------------------------

    def folder(self, stage: str, round: int) -> Path:
        """Where a stage of a round writes."""
        if self.out is not None and stage == self.stage:
            return self.out
        base = self.dir if round <= 1 or stage not in ("rollout", "distill", "finetune") else self._round(round)
        return base / FOLDERS[stage]

    def _round(self, round: int) -> Path:
        return self.dir / "rounds" / f"{round:02d}"

    def _outputs(self, stage: str, round: int) -> tuple[Path, ...]:
        names = {
            "ppo": (TRAJECTORY, POLICY),
            "select": (EXAMPLES,),
            "rollout": (ROLLOUT,),
            "distill": (DECISIONS, distill.REPORT),
            "finetune": (FINAL,),
            "grpo": (FINAL,),
            "eval": (evaluation.TABLE, evaluation.PICTURE, f"{evaluation.TUNED}_rollout.json", evaluation.PAGE),
        }
        folder = self.folder(stage, round)
        return tuple(folder / name for name in names[stage])

    def _one(self, name: str, stage: str, round: int, index: int = 0) -> Path:
        """The given file, or a stage's output."""
        return self.given[name][0] if name in self.given else self._outputs(stage, round)[index]

    def _step(self, stage: str, round: int) -> Step:
        makers: dict[str, Callable[[int], Step]] = {
            "ppo": self._ppo,
            "select": self._select,
            "rollout": self._rollout,
            "distill": self._distill,
            "finetune": self._finetune,
            "grpo": self._grpo,
            "validate": self._validate,
            "eval": self._eval,
        }
        return makers[stage](round)

    def _of(
        self,
        stage: str,
        round: int,
        inputs: Mapping[str, Sequence[Path]],
        options: Mapping[str, Any],
        run: Callable[[], Any],
    ) -> Step:
        shared = {"seed": self.recipe.run.seed, "env": self.recipe.env}
        fixed = {**self._own_files(), **{name: tuple(paths) for name, paths in inputs.items()}}

        def told() -> Mapping[str, Any]:
            return _plain(run())

        folder = self.folder(stage, round)
        return Step(stage, round, folder, fixed, self._outputs(stage, round), {**shared, **options}, told)

    def _own_files(self) -> dict[str, tuple[Path, ...]]:
        """Files that the world itself reads."""
        named = {"epw": self.family.epw, "examples_file": self.family.examples}
        return {name: (Path(path),) for name, path in named.items() if path is not None}

    def _seed(self, *path: int) -> int:
        return derive(self.recipe.run.seed, 101, *path)

    def _with_examples(self, path: Path) -> Hvac:
        """The world that the language model is given: with the examples of stage `select`, unless the recipe names
        others or wants none."""
        own = self.family.examples is not None and "examples" not in self.given
        if own or self.family.few_shot == 0:
            return self.family
        return self.family.model_copy(update={"examples": str(path)})

    def _examples_input(self) -> dict[str, tuple[Path, ...]]:
        if "examples" not in self.given and (self.family.examples is not None or self.family.few_shot == 0):
            return {}
        return {"examples": (self._one("examples", "select", 1),)}

    def _world(self, inputs: Mapping[str, Sequence[Path]]) -> Hvac:
        return self._with_examples(inputs["examples"][0]) if "examples" in inputs else self.family

    def _model_of(self, round: int) -> tuple[ModelSection, dict[str, tuple[Path, ...]]]:
        """The model after a round (0: the untuned one), and the folder that it is in."""
        model = self.recipe.model
        if "adapter" in self.given:
            path = self.given["adapter"][0]
        elif round == 0:
            return model, self._model_files()
        else:
            path = self._outputs("finetune", round)[0]
        return model.model_copy(update={"init_from": path}), {"adapter": (path,), **self._model_files()}

    def _model_files(self) -> dict[str, tuple[Path, ...]]:
        """What the recipe's model is made of, as far as it lies here."""
        model = self.recipe.model
        named = {"model": model.name, "init_from": model.init_from, "chat_template": model.chat_template}
        found = {name: expanded(path) for name, path in named.items() if path is not None}
        return {name: (path,) for name, path in found.items() if path.exists()}

    def _engine(self) -> dict[str, Any]:
        return self.recipe.engine.model_dump(mode="json")

    def _ppo(self, round: int) -> Step:
        options = self.recipe.ppo
        return self._of(
            "ppo",
            round,
            {"policy": (options.policy,)} if options.policy else {},
            {"ppo": options.model_dump(mode="json")},
            lambda: ppo.run(options, self.family, self.folder("ppo", 1), self.progress, seed=self.recipe.run.seed),
        )

    def _select(self, round: int) -> Step:
        options, source = self.recipe.select, self._one("trajectory", "ppo", 1)
        return self._of(
            "select",
            round,
            {"trajectory": (source,)},
            {"select": options.model_dump(mode="json")},
            lambda: select.run(
                options, self.family, source, self.folder("select", 1), self.progress, seed=self.recipe.run.seed
            ),
        )

    def _rollout(self, round: int) -> Step:
        options = self.recipe.rollout
        examples = self._examples_input()
        model, adapter = self._model_of(round - 1)
        inputs = {**examples, **adapter}

        def play() -> Any:
            with _interruptible():
                return rollout.run(
                    options,
                    self._world(inputs),
                    model,
                    self.folder("rollout", round),
                    self.progress,
                    self._seed(round),
                    engine=self._engine(),
                )

        plain = {"rollout": options.model_dump(mode="json"), "model": self._model_plain(), "engine": self._engine()}
        return self._of("rollout", round, inputs, plain, play)

    def _model_plain(self) -> dict[str, Any]:
        return self.recipe.model.model_dump(mode="json")

    def _distill(self, round: int) -> Step:
        options = self.recipe.distill
        sources = self.given.get("rollout") or (self._outputs("rollout", round)[0],)
        policy = self._one("ppo", "ppo", 1, 1)
        # The critic's ranking is shown, and wanted only where it is asked for.
        critic = (policy,) if policy.exists() or options.rank == "value" else ()

        def run() -> Any:
            value = load_ppo(policy, self.family, trust=self.recipe.ppo.trust).value if critic else None
            return distill.run(
                options, sources, self.family, self.folder("distill", round), self.progress, critic=value
            )

        inputs = {"rollout": tuple(sources), **({"ppo": critic} if critic else {})}
        return self._of("distill", round, inputs, {"distill": options.model_dump(mode="json")}, run)

    def _finetune(self, round: int) -> Step:
        options = self.recipe.finetune
        data = self._one("decisions", "distill", round)
        model, adapter = self._model_of(round - 1)
        inputs = {"decisions": (data,), **self._examples_input(), **adapter}
        return self._of(
            "finetune",
            round,
            inputs,
            {"finetune": options.model_dump(mode="json"), "model": self._model_plain()},
            lambda: finetune.run(
                options,
                data,
                model,
                self._world(inputs),
                self.folder("finetune", round),
                self.progress,
                self._seed(round, 1),
                fresh=self.force,
            ),
        )

    def _grpo(self, round: int) -> Step:
        options, inputs = self.recipe.grpo, {**self._examples_input(), **self._model_files()}
        assert options is not None
        return self._of(
            "grpo",
            round,
            inputs,
            {
                "grpo": options.model_dump(mode="json"),
                "model": self._model_plain(),
                "rollout": self.recipe.rollout.model_dump(mode="json"),
                "engine": self._engine(),
            },
            lambda: grpo.run(
                options,
                self.recipe.rollout,
                self.recipe.model,
                self._engine(),
                self._world(inputs),
                self.folder("grpo", 1),
                self.progress,
                self._seed(0, 2),
                fresh=self.force,
            ),
        )

    def _validate(self, round: int) -> Step:
        """A round's model on training days, which decides whether there is another round."""
        model, adapter = self._model_of(round)
        inputs = {**self._examples_input(), **adapter}
        folder = self._round(round)
        days = self.recipe.run.validation_days

        def run() -> Mapping[str, Any]:
            held = Held.of(self.family, "train", days, [self._seed(0, 3)])
            with _interruptible():
                file = self._play(self._world(inputs), model, held, folder / "validation_rollout.json")
            rollout.remove_parts(folder)
            return {"mean_return": sum(e.total for e in file.episodes) / len(file.episodes)}

        options = {
            "seed": self.recipe.run.seed,
            "env": self.recipe.env,
            "model": self._model_plain(),
            "rollout": self.recipe.rollout.model_dump(mode="json"),
            "engine": self._engine(),
            "temperature": self.recipe.eval.temperature,
            "days": days,
        }
        fixed = {**self._own_files(), **{name: tuple(paths) for name, paths in inputs.items()}}
        step = Step("validate", round, folder, fixed, (folder / "validation_rollout.json",), options, run)
        return dataclasses.replace(step, stage=f"validate-{round}", round=1)

    def _play(self, family: Hvac, model: ModelSection, held: Held, path: Path) -> trajectories.TrajectoryFile:
        return evaluation.play_model(
            self.recipe.rollout,
            family,
            model,
            self.recipe.engine,
            held,
            path,
            self.progress,
            self.recipe.run.seed,
            temperature=self.recipe.eval.temperature,
        )

    def _eval(self, round: int) -> Step:
        policy = self._one("ppo", "ppo", 1, 1)
        tuned, adapter = self._model_of(self._best_round())
        inputs: dict[str, tuple[Path, ...]] = {"ppo": (policy,), **adapter, **self._examples_input()}
        if "grpo" in self.given or self.recipe.grpo is not None:
            inputs["grpo"] = (self._one("grpo", "grpo", 1),)
        options = {
            "eval": self.recipe.eval.model_dump(mode="json"),
            "model": self._model_plain(),
            "rollout": self.recipe.rollout.model_dump(mode="json"),
            "engine": self._engine(),
        }
        return self._of("eval", 1, inputs, options, lambda: self._evaluate(tuned, inputs))

    def _best_round(self) -> int:
        """The round whose model is evaluated."""
        if self.recipe.run.rounds == 1:
            return 1
        try:
            told = json.loads((self.dir / "rounds" / "best.json").read_text("utf-8"))
            best, known = max(int(told["best"]), 1), told["models"]
        except (OSError, ValueError, KeyError, TypeError):
            return 1
        if best > self.recipe.run.rounds or known != self._models_up_to(best):
            model = self._outputs("finetune", best)[0]
            raise DataError(f"eval: {model}: the rounds aren't up to date; run the pipeline without --stage.")
        return best

    def _evaluate(self, tuned: ModelSection, inputs: Mapping[str, Sequence[Path]]) -> Mapping[str, Any]:
        """Play everyone, and write the stage's files and the page."""
        recipe, folder, family = self.recipe, self.folder("eval", 1), self._world(inputs)
        held = Held.of(family, "eval", recipe.eval.days, evaluation_seeds(recipe.run.seed, recipe.eval.seeds))
        policy = load_ppo(inputs["ppo"][0], family, trust=recipe.ppo.trust)
        files: dict[str, trajectories.TrajectoryFile] = {}
        with _interruptible():
            for name, make in evaluation.known_controllers(family).items():
                self.progress.phase(f"evaluating {name}")
                files[name] = evaluation.play_controller(name, family, held, recipe.run.seed, make)
            files[evaluation.PPO] = evaluation.play_controller(
                evaluation.PPO, family, held, recipe.run.seed, lambda task: policy, policy.value
            )
            models = {evaluation.BASE: recipe.model, evaluation.TUNED: tuned}
            if "grpo" in inputs:
                models[evaluation.GRPO] = recipe.model.model_copy(update={"init_from": inputs["grpo"][0]})
            for name, model in models.items():
                files[name] = self._play(family, model, held, folder / f"{name}_rollout.json")
        result = evaluation.publish(family, held, files, folder)
        rollout.remove_parts(folder)
        self.progress.stop()
        self.result = result
        means = {row.name: round(row.interval.mean, 2) for row in result.table.results}
        return {"mean_return": means, "table": str(result.path), "picture": str(result.picture)}

    result: evaluation.EvaluationResult | None = field(default=None, init=False)


# --- what is told ------------------------------------------------------------------------------------------------


def _plain(result: Any) -> dict[str, Any]:
    """A stage's result as plain data: what is not is told as text."""
    if isinstance(result, Mapping):
        return dict(result)
    told: dict[str, Any] = {}
    for item in dataclasses.fields(result):
        value = getattr(result, item.name)
        if isinstance(value, str | int | float | bool) or value is None:
            told[item.name] = value
        elif isinstance(value, Path):
            told[item.name] = str(value)
        elif isinstance(value, Mapping) and all(isinstance(v, str | int | float | bool) for v in value.values()):
            told[item.name] = {str(key): v for key, v in value.items()}
    return told


def _sentence(told: Mapping[str, Any]) -> str:
    """The numbers of a summary in one line."""
    parts = []
    for name, value in told.items():
        if isinstance(value, Mapping):
            inner = ", ".join(f"{key} {_number(v)}" for key, v in value.items())
            parts.append(f"{name.replace('_', ' ')}: {inner}" if inner else "")
        elif isinstance(value, bool | int | float):
            parts.append(f"{name.replace('_', ' ')} {_number(value)}")
    return "; ".join(part for part in parts if part) or "done"


def _number(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Work that a signal ends at once, and that goes on from what it had kept."""
    with Stopping() as stopping:
        try:
            with stopping.interruptible():
                yield
        except Interrupted:
            raise Stopped(f"stopped by {stopping.reason}", stopping.exit_code) from None


@contextmanager
def _told_how_to_go_on(name: str, force: bool) -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        why = str(stop).split(";")[0].split(". ")[0].rstrip(".")
        again = " without --force" if force else ""
        raise Stopped(f"{why} in stage {name}; the same command{again} goes on from there.", stop.exit_code) from None
