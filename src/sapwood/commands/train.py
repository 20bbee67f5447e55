"""`sapwood train`: a run by a recipe, into a fresh folder, or the going on of one."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sapwood.commands import Command
from sapwood.commands.shared import load, recipe_arguments, show_progress, split
from sapwood.errors import ConfigError, SapwoodError, Stopped, StorageError

if TYPE_CHECKING:
    from sapwood.config import Recipe
    from sapwood.progress import Progress
    from sapwood.resume import Start
    from sapwood.run import Run
    from sapwood.train import TrainResult


def arguments(made: argparse.ArgumentParser) -> None:
    """The command's options."""
    recipe_arguments(made, "*")
    made.add_argument("--algorithm", metavar="NAME", help="short for algorithm.name=...")
    made.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on with the run in run.dir, or with the run or checkpoint at PATH",
    )
    made.add_argument("--dry-run", action="store_true", help="check the recipe, print it in full and stop")
    made.add_argument(
        "--plan", action="store_true", help="print parameters, memory by part and estimated time, load nothing and stop"
    )
    made.add_argument("--json", action="store_true", help="print a JSON object a step on stdout, or the plan as JSON")


def run(given: argparse.Namespace) -> int:
    """Train; the exit code."""
    if given.resume and (os.path.isfile(given.resume) or "=" in given.resume):
        # A run and a checkpoint are folders: argparse took the recipe after a bare --resume for a path.
        given.recipe, given.resume = [given.resume, *given.recipe], ""
    if not given.recipe and not given.resume:
        print("sapwood train: give a recipe, or --resume RUN to go on with a run.", file=sys.stderr)
        return 2
    recipe, asked = _recipe(given)
    recipe.check_trainable()
    if given.dry_run:
        from sapwood.config import dump_recipe

        print(dump_recipe(recipe), end="")
        return 0
    if given.plan:
        return _plan(recipe, given.json)
    resumes = asked if given.resume is not None else _ask(recipe, given.json)
    progress = show_progress(given.json)
    opened, start = _resume(recipe, resumes) if resumes is not None else _create(recipe)
    with _told_at_the_end(opened):
        try:
            with progress:
                from sapwood.train import train

                for note in start.notes if start else ():
                    progress.note(note)
                if (doubt := _memory_warning(recipe, progress)) is not None:
                    progress.warn(doubt)
                result = train(recipe, opened, progress, start)
        except Stopped as stop:
            if not opened.abandon():
                print(f"sapwood: {stop}", file=sys.stderr)
            else:
                print(f"sapwood: {str(stop).split(';')[0]}; nothing had been measured yet.", file=sys.stderr)
            return stop.exit_code
        except SapwoodError:
            if not opened.abandon():
                print(f"sapwood: {opened.saved()}", file=sys.stderr)
            raise
        except KeyboardInterrupt:
            told = "nothing had been logged yet." if opened.abandon() else opened.saved()
            print(f"sapwood: stopped at once by Ctrl-C; {told}", file=sys.stderr)
            return 130
    _tell(result, given.json)
    return 0


@contextmanager
def _told_at_the_end(run: Run) -> Iterator[None]:
    """Close the run after use, and say what its trackers have found out while they ended."""
    try:
        with run:
            yield
    finally:
        for note in run.notes():
            print(f"sapwood: {note}", file=sys.stderr)


COMMAND = Command("Train a model by a recipe, into a new run folder.", arguments, run)


def _plan(recipe: Recipe, as_json: bool) -> int:
    """What the run would need; 1 where that doesn't fit."""
    with show_progress() as progress:
        from sapwood.plan import plan
        from sapwood.plan.show import show

        made = plan(recipe, progress)
    show(made, recipe, as_json=as_json)
    return 1 if made.fits == "no" else 0


def _memory_warning(recipe: Recipe, progress: Progress) -> str | None:
    """One line where this machine's memory clearly doesn't hold the run."""
    from sapwood.plan import warning

    progress.phase("planning")
    try:
        return warning(recipe)
    except Exception as error:  # advice on a run must not end it; what is wrong with the run, the run will say
        logging.getLogger("sapwood").debug("no plan: %r", error)
        return None


def _recipe(given: argparse.Namespace) -> tuple[Recipe, Path]:
    """The recipe, and the run or checkpoint to resume if one is to be resumed."""
    extra = [f"algorithm.name={given.algorithm}"] if given.algorithm else []
    path = Path(given.resume) if given.resume else None
    files, overrides = split(given)
    if path is None:
        if not files:
            raise ConfigError("give a recipe beside its overrides, or --resume RUN to go on with a run.")
        recipe = load(given, extra)
        if given.resume is None:
            recipe = _repeated(recipe, files, overrides)
        return recipe, recipe.run.dir
    runs = (f for f in (path, *path.parents[:3]) if os.path.isfile(f / "recipe.yaml"))
    folder = next((f for f in runs if f.parent.name != "checkpoints"), None)  # a checkpoint has a recipe too
    if folder is None:
        raise StorageError(f"--resume: {path} is no run folder and no checkpoint of one.")
    from sapwood.config import load_recipe

    own = files or [str(folder / "recipe.yaml")]
    recipe = load_recipe(own, [*overrides, *extra, f"run.dir={folder}"])
    return recipe, path


def _repeated(recipe: Recipe, files: list[str], overrides: list[str]) -> Recipe:
    """A run's own recipe repeats the run in a new folder beside it."""
    from sapwood.run import free_name

    first = Path(files[0])
    own = first.name == "recipe.yaml" and len(files) == 1 and (first.parent / "environment.json").is_file()
    if not own or any(item.startswith("run.dir=") for item in overrides):
        return recipe
    folder = free_name(first.parent)
    print(f"sapwood: repeating {first.parent} in {folder}", file=sys.stderr)
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": folder})})


def _ask(recipe: Recipe, as_json: bool) -> Path | None:
    """On a terminal, offer to go on with an unfinished run that stands where a new one is to be made."""
    folder = recipe.run.dir
    if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()) or not (folder / "recipe.yaml").is_file():
        return None
    from sapwood.run import Run

    run = Run.open(folder)
    if run.finished:
        return None
    question = f"{folder} holds an unfinished run ({run.progress_told()}). Go on with it? [Y/n] "
    print(question, end="", file=sys.stderr, flush=True)
    return folder if sys.stdin.readline().strip().lower() in ("", "y", "yes") else None


def _create(recipe: Recipe) -> tuple[Run, Start | None]:
    from sapwood.run import Run

    return Run.create(recipe), None


def _resume(recipe: Recipe, asked: Path) -> tuple[Run, Start]:
    """The run's folder, cut back to the checkpoint to go on from."""
    from sapwood import resume
    from sapwood.config import load_recipe
    from sapwood.run import Run

    folder = recipe.run.dir
    start = resume.find(folder, None if os.path.realpath(asked) == os.path.realpath(folder) else asked)
    before = load_recipe(folder)
    notes = [*start.notes, *resume.check_recipe(before, recipe, start.step)]
    notes += resume.environment_notes(folder / "environment.json")
    if start.step:
        notes.append(f"going on after step {start.step} ({start.folder})")
    opened = Run.resume(recipe, start.step, pending=start.pending, aside=start.aside)
    return opened, replace(start, notes=tuple(notes), before=before)


def _tell(result: TrainResult, as_json: bool) -> None:
    """The table and the paths of what a run left."""
    paths = {"adapter": result.policy_dir, "curve": result.plot, "samples": result.run_dir / "samples"}
    tables = [table for table in (result.figures, result.table) if table is not None]
    if as_json:
        found = {name: str(path) for name, path in paths.items() if path and path.exists()}
        told = {key: value for table in tables for key, value in table.to_json().items()}
        print(json.dumps({"evaluation": told, "run": str(result.run_dir), **found}, sort_keys=True))
        return
    from rich.console import Console

    for table in tables:
        Console().print(table.render())
    for name, path in {"run": result.run_dir, **paths}.items():
        if path and path.exists():
            print(f"{name:<8} {path}")
