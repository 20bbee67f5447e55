"""`sapwood checkpoints`: what a run has saved, whether it is whole, and which of it to keep."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sapwood.commands import Command
from sapwood.commands.shared import positive
from sapwood.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from sapwood.checkpoint import Checkpoint
    from sapwood.sections import CheckpointSection


def arguments(made: argparse.ArgumentParser) -> None:
    """The command's options."""
    made.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    made.add_argument("--fast", action="store_true", help="compare sizes only, don't hash the files")
    made.add_argument("--prune", type=positive, metavar="KEEP", help="remove all whole ones but the newest KEEP")
    made.add_argument("--damaged", action="store_true", help="remove damaged and half-written ones")
    made.add_argument("--best", metavar="METRIC", help="mark the best by this metric (checkpoint.best), and keep it")
    made.add_argument("--json", action="store_true", help="print a JSON object")


def run(given: argparse.Namespace) -> int:
    """List, verify, remove; 1 where one is damaged and stays."""
    from sapwood import checkpoint
    from sapwood.optimizer import higher_is_better
    from sapwood.run import writing

    folder: Path = given.run
    if not (folder / "recipe.yaml").is_file():
        raise StorageError(f"{folder}: not a run folder, it has no recipe.yaml.")
    found = checkpoint.found(folder, verify=not given.fast)
    section = _section(folder / "recipe.yaml")
    metric = given.best or section.best
    higher = section.mode == "max" or (section.mode == "auto" and metric is not None and higher_is_better(metric))
    best = checkpoint.best_of(found, metric, higher) if metric else None
    if given.best and found and best is None:
        known = sorted({name for each in found for name in each.metrics})
        told = ", ".join(known) or "none"
        raise ConfigError(f"--best: no checkpoint has the metric {given.best!r}; known are {told}.")
    removed: list[Path] = []
    if given.prune or given.damaged:
        _refuse_while_training(folder)
    if given.damaged:
        removed += [each.path for each in found if each.problem is not None]
        removed += sorted((folder / "checkpoints").glob(".step_*"))
    if given.prune:
        whole = [each.path for each in found if each.problem is None]
        removed += [path for path in whole[: -given.prune] if best is None or path != best.path]
    for path in removed:
        with writing(path):
            checkpoint.discard(path)
    kept = [each for each in found if each.path not in removed]
    if given.json:
        told = [_record(each, best is not None and each.path == best.path) for each in kept]
        print(json.dumps({"checkpoints": told, "removed": [str(path) for path in removed]}, sort_keys=True))
    else:
        _show(kept, best, metric)
        for path in removed:
            print(f"removed {path}")
    return 1 if any(each.problem for each in kept) else 0


COMMAND = Command("List, verify and prune the checkpoints of a run.", arguments, run)


def _section(recipe: Path) -> CheckpointSection:
    """The recipe's section alone: the plugins that the rest names may be elsewhere."""
    from pydantic import ValidationError

    from sapwood import configfile
    from sapwood.sections import CheckpointSection

    try:
        source = configfile.read(recipe)
        return CheckpointSection.model_validate(source.data.get("checkpoint") or {})
    except ConfigError as error:
        raise StorageError(f"{error} The run folder is damaged.") from error
    except ValidationError as error:
        told = configfile.explain(error, source, ("checkpoint",), CheckpointSection)
        raise StorageError(f"{told} The run folder is damaged.") from error


def _refuse_while_training(folder: Path) -> None:
    from sapwood.run import in_use

    holder = in_use(folder)
    if holder is not None:
        raise StorageError(f"{folder}: process {holder} is training this run; wait for it, or stop it first.")


def _record(each: Checkpoint, best: bool) -> dict[str, object]:
    return {
        "path": str(each.path),
        "step": each.step,
        "bytes": each.bytes,
        "time": each.time,
        "whole": each.problem is None,
        "resumable": each.resumable,
        "problem": each.problem,
        "best": best,
        "metrics": dict(each.metrics),
    }


def _show(found: list[Checkpoint], best: Checkpoint | None, metric: str | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found:
        print("no checkpoints")
        return
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("checkpoint", "written", "MiB", metric or "held out", "state"):
        table.add_column(column, justify="right" if column == "MiB" else "left", overflow="fold")
    shown = (metric,) if metric else ("eval/return", "eval/loss")
    for each in found:
        value = next((each.metrics[name] for name in shown if name in each.metrics), None)
        state = each.problem or ("whole" if each.resumable else "whole, weights only")
        told = (each.path.name, each.time, f"{each.bytes / 2**20:.1f}", "-" if value is None else f"{value:.4g}", state)
        table.add_row(*map(Text, told), style="bold" if best is not None and each.path == best.path else None)
    Console().print(table)
    if best is not None:
        print(f"best by {metric}: {best.path}")
