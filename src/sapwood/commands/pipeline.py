"""`sapwood pipeline`: self-distillation in a building, stage by stage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sapwood.commands import Command
from sapwood.commands.shared import recipe_arguments, show_progress, split
from sapwood.errors import ConfigError, Stopped

if TYPE_CHECKING:
    from sapwood.pipeline.stages import Done, Pipeline

#: As `sapwood.pipeline.stages.STAGES`, which imports torch.
_STAGES = ("all", "ppo", "select", "rollout", "distill", "finetune", "grpo", "eval")


def _arguments(made: argparse.ArgumentParser) -> None:
    recipe_arguments(made)
    made.add_argument(
        "--stage", choices=_STAGES, default="all", help="run one stage only (default: all that is needed)"
    )
    made.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="with --stage: a file of your own in place of another stage's, such as rollout=day1.json; may be repeated",
    )
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="with --stage: write there, not into the pipeline's folder"
    )
    made.add_argument("--force", action="store_true", help="run what is up to date too")
    made.add_argument("--dry-run", action="store_true", help="check the recipe, print it in full and stop")
    made.add_argument("--json", action="store_true", help="print JSON objects on stdout: progress, then the stages")


def _run(given: argparse.Namespace) -> int:
    from sapwood.pipeline.recipe import dump_pipeline, load_pipeline

    files, overrides = split(given)
    recipe = load_pipeline(files, overrides)
    if given.dry_run:
        print(dump_pipeline(recipe), end="")
        return 0
    inputs = _inputs(given.input)
    with show_progress(given.json) as progress:
        from sapwood.pipeline.stages import Pipeline

        stage = None if given.stage == "all" else given.stage
        pipeline = Pipeline(recipe, progress, stage, inputs, given.out, given.force)
        try:
            pipeline.run()
        except Stopped as stop:
            progress.stop()
            print(f"sapwood: {stop}", file=sys.stderr)
            return stop.exit_code
    _tell(pipeline, given.json)
    return 0


def _inputs(texts: list[str]) -> dict[str, list[Path]]:
    """NAME=PATH arguments by name."""
    found: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--input {text}: write it as NAME=PATH, such as rollout=runs/day1.json.")
        found.setdefault(name, []).append(Path(path))
    return found


def _tell(pipeline: Pipeline, as_json: bool) -> None:
    """What was done, and the table of the last stage."""
    if as_json:
        print(json.dumps({"stages": [_record(done) for done in pipeline.done]}, sort_keys=True, default=str))
        return
    from rich.console import Console

    if pipeline.result is not None:
        Console().print(pipeline.result.table.render())
    for done in pipeline.done:
        state = "up to date" if done.skipped else f"{done.seconds:,.0f} s"
        print(f"{done.name:<12} {state:>12}  {done.outputs[0]}")


def _record(done: Done) -> dict[str, object]:
    return {
        "stage": done.name,
        "skipped": done.skipped,
        "seconds": done.seconds,
        "outputs": [str(path) for path in done.outputs],
        "summary": dict(done.summary),
    }


COMMAND = Command("Run the self-distillation pipeline in a building, or one stage of it.", _arguments, _run)
