"""Evidence: an update that was skipped because its loss or gradient wasn't finite, kept whole.

    evidence/step_000012_1/
      summary.json            step, update, the numbers seen, the tasks of the batch's groups
      rows.npz                every array of the update's rows
      texts.jsonl             a line a row: its task, group, member, reward and text
      policy/  critic/  training_state.pt  recipe.yaml  manifest.json      the weights then, as in a checkpoint

`sapwood replay` runs the update again and says what isn't finite, and where.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapwood import checkpoint, resume
from sapwood.algorithms import Algorithm
from sapwood.config import Recipe, dump_recipe, load_recipe
from sapwood.errors import StorageError
from sapwood.models.roles import Models
from sapwood.run import writing
from sapwood.types import Group, Ids, Row, Task, Trajectory

FORMAT = 1
SUMMARY, ROWS, TEXTS = "summary.json", "rows.npz", "texts.jsonl"
_README = """\
An update that was left out because its loss or gradient wasn't finite: step {step}, update {update}.

    sapwood replay {name}

runs it again and says what isn't finite, and where. summary.json has the numbers, texts.jsonl the rows as text,
rows.npz their arrays; policy/ (and critic/) are the weights that the update was computed with.
"""


@dataclass(frozen=True)
class Evidence:
    """What is kept of an update. update: 1, 2 ... within its step; steps: of the whole run, for schedules.

    rows: those of the update; groups: of the whole batch, tasks' ids and numbers of attempts only; numbers: what was
    measured, as far as it got; token_budget: of its packing; algorithm: its state; rng: the global generator's state
    before the update, for dropout; parameters: adapters and heads, by parameter group.
    """

    folder: Path
    recipe: Recipe
    step: int
    update: int
    steps: int
    rows: list[Row]
    groups: list[Group]
    numbers: dict[str, float]
    token_budget: int
    algorithm: dict[str, Any]
    rng: Tensor | None
    parameters: dict[str, list[Tensor]]


def save(
    run_dir: Path,
    recipe: Recipe,
    models: Models,
    algorithm: Algorithm,
    groups: Sequence[Group],
    rows: Sequence[Row],
    *,
    step: int,
    update: int,
    steps: int,
    numbers: Mapping[str, float],
    token_budget: int,
    decode: Callable[[Ids], str],
    rng: Tensor | None = None,
) -> Path | None:
    """Write evidence/step_NNNNNN_U/ and drop all but the newest `guards.keep_evidence`; None where that is 0.

    groups: the whole batch; rows: the update's; models: as they are while the update is skipped; decode: token ids to
    text with special tokens. Raises StorageError where it can't be written; nothing half-written stays.
    """
    if not recipe.guards.keep_evidence:
        return None
    target = run_dir / "evidence" / f"step_{step:06d}_{update}"
    scratch = target.with_name(f".{target.name}.partial")
    state = {
        "step": step,
        "algorithm": algorithm.state(),
        "rng": rng,
        "parameters": resume.trained(models),
    }
    summary = {
        "format": FORMAT,
        "step": step,
        "update": update,
        "steps": steps,
        "algorithm": recipe.algorithm["name"],
        "token_budget": token_budget,
        "rows": len(rows),
        "tokens": sum(row.scored for row in rows),
        "numbers": {name: _shown(value) for name, value in sorted(numbers.items())},
        "groups": [{"task": group.task.id, "members": len(group.trajectories)} for group in groups],
    }
    with writing(target):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")
            with (scratch / TEXTS).open("w", encoding="utf-8") as file:
                for number, row in enumerate(rows):
                    file.write(json.dumps(_text(number, row, groups, decode), ensure_ascii=False) + "\n")
            np.savez_compressed(scratch / ROWS, **_arrays(rows))  # pyright: ignore[reportArgumentType]
            (scratch / "README.txt").write_text(_README.format(step=step, update=update, name=target), "utf-8")
            finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
            checkpoint.fill(checkpoint.snapshot(models, step, state, finite, dump_recipe(recipe)), scratch)
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for old in found(run_dir)[: -recipe.guards.keep_evidence]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def found(run_dir: Path) -> list[Path]:
    """A run's evidence folders, oldest first."""
    named = [(_place(path), path) for path in (run_dir / "evidence").glob("step_*") if path.is_dir()]
    return [path for place, path in sorted(named) if place is not None]


def load(folder: Path) -> Evidence:
    """Read it back, verified by its manifest. Raises StorageError where it is none, damaged or of a later version."""
    _check(folder)
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
        known, step, update = int(summary["format"]), int(summary["step"]), int(summary["update"])
        groups = [_group(str(entry["task"]), int(entry["members"])) for entry in summary["groups"]]
        numbers = {str(name): float(value) for name, value in summary["numbers"].items()}
        steps, token_budget = int(summary["steps"]), int(summary["token_budget"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{folder / SUMMARY}: can't be read as evidence of a skipped update ({error}).") from error
    if known > FORMAT:
        raise StorageError(f"{folder}: a later version of Sapwood wrote it (format {known}); replay it with that one.")
    rows = _rows(folder / ROWS, len(groups))
    state = checkpoint.load_state(folder)
    missing = [name for name in ("algorithm", "rng", "parameters") if name not in state]
    if missing:
        raise StorageError(f"{folder / checkpoint.STATE}: isn't that of a skipped update, it has no {missing[0]!r}.")
    return Evidence(
        folder=folder,
        recipe=load_recipe(folder),
        step=step,
        update=update,
        steps=steps,
        rows=rows,
        groups=groups,
        numbers=numbers,
        token_budget=token_budget,
        algorithm=state["algorithm"],
        rng=state["rng"],
        parameters=state["parameters"],
    )


def _check(folder: Path) -> None:
    """Raises StorageError unless the folder is evidence, whole."""
    if not folder.is_dir():
        near = ", ".join(path.name for path in found(folder.parent.parent)) or "none"
        where = f"; there: {near}" if folder.parent.name == "evidence" else ""
        raise StorageError(f"{folder}: there is no such folder{where}.")
    if not (folder / SUMMARY).is_file():
        run = folder.parent if folder.name == "evidence" else folder
        inside = found(run)
        if inside:
            raise StorageError(f"{folder}: name one of its skipped updates: {', '.join(map(str, inside))}.")
        what = "a run without skipped updates" if (folder / "metrics.jsonl").is_file() else "no evidence folder"
        raise StorageError(f"{folder}: is {what}; replay takes RUN/evidence/step_NNNNNN_U.")
    problem = checkpoint.read(folder).problem
    if problem is not None:
        raise StorageError(f"{folder}: can't be replayed, {problem}; copy it again from where the run is.")


def _place(path: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"step_(\d+)_(\d+)", path.name)
    return (int(match[1]), int(match[2])) if match else None


def _group(task: str, members: int) -> Group:
    known = Task(task)
    return Group(known, [Trajectory(known) for _ in range(members)])


def _shown(value: float) -> float | str:
    """JSON has no NaN and no infinity: these are written as text, which float() reads."""
    return float(value) if math.isfinite(value) else str(float(value))


def _text(number: int, row: Row, groups: Sequence[Group], decode: Callable[[Ids], str]) -> dict[str, Any]:
    return {
        "row": number,
        "task": groups[row.group].task.id,
        "group": row.group,
        "member": row.member,
        "reward": _shown(row.reward),
        "text": decode(row.token_ids),
    }


# --- rows as arrays ----------------------------------------------------------------------------------------------

_SCALARS = {"group": np.int64, "member": np.int64, "reward": np.float64, "bootstrap": np.float64}
_SCALARS |= {"temperature": np.float64}
_WHOLE = ("token_ids", "loss_mask")
#: Arrays over a row's scored tokens.
PER_TOKEN = tuple(f.name for f in dataclasses.fields(Row) if f.name not in (*_SCALARS, *_WHOLE))


def _arrays(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    """Rows end to end: "length" and "scored" [R], then every field; "has/NAME" [R] where some rows lack it."""
    found: dict[str, NDArray[Any]] = {
        "length": np.array([len(row.token_ids) for row in rows], np.int64),
        "scored": np.array([row.scored for row in rows], np.int64),
    }
    for name, kind in _SCALARS.items():
        found[name] = np.array([getattr(row, name) for row in rows], kind)
    for name in (*_WHOLE, *PER_TOKEN):
        arrays = [getattr(row, name) for row in rows]
        present = [array for array in arrays if array is not None]
        if present:
            found[name] = np.concatenate(present)
            found[f"has/{name}"] = np.array([array is not None for array in arrays])
    return found


def _rows(path: Path, groups: int) -> list[Row]:
    """Rows from their arrays. Raises StorageError where they don't fit together."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        length, scored = arrays["length"].tolist(), arrays["scored"].tolist()
        fields: list[dict[str, Any]] = [{} for _ in length]
        for name, kind in _SCALARS.items():
            for one, value in zip(fields, arrays[name].astype(kind).tolist(), strict=True):
                one[name] = value
        for name in (*_WHOLE, *PER_TOKEN):
            if name not in arrays:
                continue
            sizes = length if name in _WHOLE else scored
            holders = [i for i, has in enumerate(arrays[f"has/{name}"].tolist()) if has]
            cuts = np.cumsum([sizes[i] for i in holders])
            if len(arrays[name]) != (cuts[-1] if len(cuts) else 0):
                raise ValueError(f"{name} has {len(arrays[name])} values, not {cuts[-1] if len(cuts) else 0}")
            for i, part in zip(holders, np.split(arrays[name], cuts[:-1]), strict=True):
                fields[i][name] = part
        rows = [Row(**one) for one in fields]
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path}: can't be read as the rows of an update ({error}).") from error
    if any(not 0 <= row.group < groups or row.scored != size for row, size in zip(rows, scored, strict=True)):
        raise StorageError(f"{path}: its rows don't fit {SUMMARY}; copy the folder again from where the run is.")
    return rows
