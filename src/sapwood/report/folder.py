"""A run folder as one plain value for the page, read again cheaply while the run goes on."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sapwood.errors import StorageError
from sapwood.report.days import days
from sapwood.report.evaluations import evaluation
from sapwood.report.names import HEADLINES, place
from sapwood.report.reading import Problems, Tail, finite, read_json, read_yaml, shorter, whole
from sapwood.report.recipes import flatten, options
from sapwood.report.samples import SampleFile, building_file, holds_trajectories, list_samples
from sapwood.report.series import Series, clock, longest_seconds
from sapwood.report.status import lock_held, status_of

#: Warnings and events in the page; further ones are counted.
ENTRIES = 3000
_MARKS = ("recipe.yaml", "metrics.jsonl", "samples")
_READ = (
    "recipe.yaml",
    "environment.json",
    "evaluation.json",
    "metrics.jsonl",
    "timing.jsonl",
    "warnings.jsonl",
    "events.jsonl",
)


class RunFolder:
    """A run folder, or a bare file of trajectories, to read. Raises StorageError where it is neither.

    `state` reads what has changed since the call before. building: a trajectory file of a building.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.bare = self.path.is_file()
        if not self.path.exists():
            raise StorageError(f"{self.path}: there is no such run folder.")
        if not self.bare and not any((self.path / mark).exists() for mark in _MARKS):
            raise StorageError(
                f"{self.path}: not a run folder, it has no recipe.yaml, no metrics and no samples{_nearest(self.path)}"
            )
        if self.bare and not holds_trajectories(self.path):
            raise StorageError(
                f"{self.path}: no run folder and no file of trajectories (JSON records with turns, or with a prompt "
                "and a reply, as `sapwood rollout` and `sapwood generate` write them)."
            )
        self.building = self.bare and building_file(self.path, Problems()) is not None
        self._days: dict[str, Any] | None = None
        self.folder = self.path.parent if self.bare else self.path
        self._series = {name: (Tail(self.folder, f"{name}.jsonl"), Series()) for name in ("metrics", "timing")}
        self._lists: dict[str, tuple[Tail, list[dict[str, Any]]]] = {
            name: (Tail(self.folder, f"{name}.jsonl"), []) for name in ("warnings", "events")
        }

        self.version = 0  # goes up with every state that is another
        self._stamped: Any = None
        self._whole: dict[str, Any] | None = None
        self._vital: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """What the page calls it."""
        return self.path.resolve().name or str(self.path)

    def samples(self, problems: Problems | None = None) -> list[SampleFile]:
        """The files of trajectories, held-out ones first, each kind by step."""
        return list_samples(self.path, problems or Problems())

    def state(self, final: bool = False) -> dict[str, Any]:
        """Everything but the samples. final: nobody watches, so a line cut short is a finding and not on its way."""
        if self.bare:  # the samples are all that there is
            return _bare_state(self.name, self.path) | self._bare_days()
        stamp = self._stamp()
        if self._whole is None or stamp != self._stamped:
            self._stamped = stamp
            self.version += 1
            self._whole, self._vital = self._read(final)
        # A run can die without writing anything, so this is asked again every time.
        status = status_of(*self._vital, quiet=self._quiet(), held=lock_held(self.folder))
        return self._whole | {"status": {"state": status.state, "detail": status.detail}}

    def _bare_days(self) -> dict[str, Any]:
        """What the days of a building add to the state of a bare file; read once."""
        if not self.building:
            return {}
        if self._days is None:
            problems = Problems()
            data = building_file(self.path, problems)
            found = None if data is None else days(data, problems)
            what = {**_BLANK["what"], "algorithm": found["controller"], "world": found["world"]} if found else {}
            if found:
                what["model"] = found["model"]
            self._days = {
                "days": found,
                "what": what or _BLANK["what"],
                "facts": [[name, text] for name, text in found["options"]] if found else [],
                "problems": problems.told(),
            }
        return self._days | {"problems": list(self._days["problems"])}

    def _stamp(self) -> Any:
        """What changes where any file but a sample does."""
        found: list[Any] = []
        for name in _READ:
            try:
                status = os.stat(self.folder / name)
                found.append((status.st_size, status.st_mtime_ns, status.st_ino))
            except OSError:
                found.append(None)
        return found, _steps_of_folders(self.folder / "checkpoints"), sorted(_folders(self.folder / "evidence"))[:200]

    def _read(self, final: bool) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """(the state without its status, what the status is told from)."""
        problems = Problems()
        for tail, series in self._series.values():
            again, records = tail.read()
            if again:
                series.clear()
            series.add(records)
        for tail, kept in self._lists.values():
            again, records = tail.read()
            if again:
                kept.clear()
            kept.extend(records)
        recipe = read_yaml(self.folder, "recipe.yaml", problems)
        if not (self.folder / "recipe.yaml").exists():
            problems.add("recipe.yaml: not there, so what ran is not known.")
        environment = read_json(self.folder, "environment.json", problems)
        evaluated = evaluation(read_json(self.folder, "evaluation.json", problems), problems)
        events = _events(self._lists["events"][1])
        metrics, timing = self._series["metrics"][1], self._series["timing"][1]
        done, total = metrics.last_step, _steps(recipe, metrics)
        finished = any(value is not None for value in evaluated.values())
        self._tell(problems, final)
        state = {
            **_BLANK,
            "name": self.name,
            "path": str(self.path),
            "done": done,
            "total": total,
            "what": _what(recipe),
            "facts": _facts(environment),
            "headline": _headline(metrics, evaluated),
            "curves": _curves(metrics, timing),
            "clock": clock(timing),
            "evaluation": evaluated,
            "recipe": options(recipe),
            "environment": flatten(environment) if isinstance(environment, Mapping) else [],
            "warnings": _warnings(self._lists["warnings"][1]),
            "events": events[-ENTRIES:],
            "counts": {"warnings": len(self._lists["warnings"][1]), "events": len(events)},
            "checkpoints": self._stamped[1],
            "evidence": self._stamped[2],
            "problems": problems.told(),
        }
        return state, (events, done, total, finished, longest_seconds(timing))

    def _tell(self, problems: Problems, final: bool) -> None:
        for name, (tail, series) in self._series.items():
            if series.bad_records:
                problems.add(f"{name}.jsonl: records without a step: {series.bad_records:,}; left out.")
            if series.left_out:
                many = len(series.left_out)
                problems.add(f"{name}.jsonl: metrics that are too many, or too long in name: {many:,}; left out.")
            self._tell_of_tail(problems, tail, final)
        for tail, _ in self._lists.values():
            self._tell_of_tail(problems, tail, final)
        if not self._series["metrics"][1].records:
            problems.add("metrics.jsonl: no finished step yet.")

    def _tell_of_tail(self, problems: Problems, tail: Tail, final: bool) -> None:
        for sentence in tail.problems.told():
            problems.add(sentence)
        if tail.torn and final:
            problems.add(f"{tail.name}: its last line is cut short; left out.")

    def _quiet(self) -> float | None:
        """Seconds since anything was written."""
        paths = [self.folder / name for name in (*_READ, "samples", "checkpoints", "logs")]
        paths += list((self.folder / "logs").glob("*.log"))[:1000]
        moments = []
        for path in paths:
            try:
                moments.append(os.stat(path).st_mtime)
            except OSError:
                continue
        return max(0.0, time.time() - max(moments)) if moments else None


def check_together(folders: Sequence[RunFolder]) -> None:
    """Refuse a building's trajectory files beside runs or other files (StorageError): they have no axis in common."""
    building = [folder for folder in folders if folder.building]
    others = [folder for folder in folders if not folder.building]
    if building and others:
        raise StorageError(
            f"{building[0].path} has the days of a building, and {others[0].path} is another kind; write a report of "
            "each kind: days can be put beside days, and runs beside runs."
        )


#: The state of a run of which nothing is known.
_BLANK: dict[str, Any] = {
    "done": None,
    "total": None,
    "what": {"algorithm": "", "model": "", "world": "", "start": ""},
    "facts": [],
    "headline": None,
    "curves": [],
    "clock": {"x": [], "y": []},
    "evaluation": {"returns": None, "held_out": None},
    "recipe": [],
    "environment": [],
    "warnings": [],
    "events": [],
    "counts": {"warnings": 0, "events": 0},
    "checkpoints": [],
    "evidence": [],
    "problems": [],
    "days": None,
}


def _bare_state(name: str, path: Path) -> dict[str, Any]:
    status = {"state": "file", "detail": "A file of trajectories, without a run."}
    return {**_BLANK, "name": name, "path": str(path), "status": status}


def _nearest(path: Path) -> str:
    """A hint where runs lie below, or the folder is a part of a run."""
    above = next((p for p in list(path.resolve().parents)[:3] if (p / "recipe.yaml").is_file()), None)
    if above is not None:
        return f"; did you mean {above}?"
    found = [*path.glob("*/recipe.yaml"), *path.glob("*/*/recipe.yaml")] if path.is_dir() else []
    below = [str(p.parent) for p in sorted(found)[:3]]
    return f"; runs below it are {', '.join(below)}{' ...' if len(found) > 3 else ''}." if below else "."


def _steps(recipe: Mapping[str, Any], metrics: Series) -> int | None:
    """run.steps; of a run over epochs what its progress so far makes of them."""
    run = recipe.get("run")
    if not isinstance(run, Mapping):
        return None
    steps, epochs = whole(run.get("steps")), finite(run.get("epochs"))
    if steps is not None and steps > 0:
        return steps
    seen = metrics.points("epoch")
    if epochs and seen and seen[-1][1] > 0:
        step, epoch = seen[-1]
        return max(step, round(epochs * step / epoch))
    return None


def _what(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What ran, in a few words each."""

    def named(section: str) -> Mapping[str, Any]:
        value = recipe.get(section)
        return value if isinstance(value, Mapping) else {}

    model = named("model")
    lora = model.get("lora")
    how = f"LoRA rank {lora.get('rank')}" if isinstance(lora, Mapping) else "all weights"
    quantised = f", {model['quantize']}" if model.get("quantize") not in (None, "none") else ""
    return {
        "algorithm": _short(named("algorithm").get("name")),
        "model": f"{_short(model.get('name'))} ({how}{quantised})" if model else "",
        "start": _short(model.get("init_from")),
        "world": _world(recipe),
    }


def _world(recipe: Mapping[str, Any]) -> str:
    env, data = recipe.get("env"), recipe.get("data")
    if isinstance(env, Mapping):
        words = [
            _short(env.get(key)) for key in ("name", "task", "building", "climate") if isinstance(env.get(key), str)
        ]
        return " ".join(words)
    sources = data.get("sources") if isinstance(data, Mapping) else None
    paths = [_short(item.get("path")) for item in sources or [] if isinstance(item, Mapping)]
    more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + more


def _short(value: Any) -> str:
    return "" if value is None else str(value)[:200]


def _facts(environment: Any) -> list[list[str]]:
    """Hardware and versions, [label, text]."""
    if not isinstance(environment, Mapping):
        return []
    packages, git = environment.get("packages"), environment.get("git")
    memory = finite(environment.get("memory_bytes"))
    facts = [
        ("Hardware", ", ".join(_short(environment[key]) for key in ("gpu", "cpu") if environment.get(key))),
        ("Cores", _short(environment.get("cores"))),
        ("Memory", f"{memory / 2**30:.1f} GiB" if memory else ""),
        ("Seed", _short(environment.get("seed"))),
        ("Sapwood", _short(environment.get("sapwood"))),
        ("Python", _short(environment.get("python"))),
    ]
    if isinstance(packages, Mapping):
        facts += [(str(key), _short(packages[key])) for key in ("torch", "transformers") if packages.get(key)]
    if isinstance(git, Mapping) and git.get("commit"):
        facts.append(("Commit", _short(git["commit"])[:12] + (", modified" if git.get("modified") else "")))
    command = environment.get("command")
    if isinstance(command, list):
        facts.append(("Command", " ".join(["sapwood", *map(str, command)])[:2000]))
    return [[label, text] for label, text in facts if text]


def _headline(metrics: Series, evaluated: Mapping[str, Any]) -> dict[str, Any] | None:
    """The held-out figure that says how good the model is: before training, best, last, with intervals where known."""
    name, more = next(((n, up) for n, up in HEADLINES if n in metrics.names), (None, True))
    if name is None:
        return None
    points = metrics.points(name)
    if not points:
        return None
    trained = [point for point in points if point[0] > 0]
    base = next((point for point in points if point[0] == 0), None)
    best = (max if more else min)(trained, key=lambda point: point[1]) if trained else None

    def told(point: tuple[int, float] | None) -> dict[str, Any] | None:
        if point is None:
            return None
        bounds = ("eval/low", "eval/high") if name == "eval/return" else (f"{name}/lo", f"{name}/hi")
        low, high = (metrics.at(bound, point[0]) for bound in bounds)
        return {"step": point[0], "value": shorter(point[1]), "lo": shorter(low), "hi": shorter(high)}

    return {
        "name": name,
        "title": place(name).title,
        "more": more,
        "base": told(base),
        "best": told(best),
        "last": told(trained[-1] if trained else None),
        "difference": _headline_difference(name, evaluated),
    }


def _headline_difference(name: str, evaluated: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paired difference between trained and base model of the final evaluation."""
    if name == "eval/return" and evaluated["returns"]:
        differences = evaluated["returns"]["differences"]
        return differences[0] if differences else None
    if evaluated["held_out"]:
        metric = name.removeprefix("eval/")
        return next((d for d in evaluated["held_out"]["differences"] if d["metric"] == metric), None)
    return None


def _curves(metrics: Series, timing: Series) -> list[dict[str, Any]]:
    found = []
    for series, speed in ((metrics, False), (timing, True)):
        for curve in series.curves():
            found.append({**curve, **asdict(place(curve["name"], speed))})
    return found


def _warnings(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for record in records[-ENTRIES:]:
        metrics = record.get("metrics")
        remedies = record.get("remedies")
        found.append(
            {
                "step": whole(record.get("step")),
                "name": _short(record.get("name")) or "warning",
                "message": str(record.get("message") or "")[:4000],
                "remedies": [str(item)[:2000] for item in remedies[:20]] if isinstance(remedies, list) else [],
                "metrics": [[str(k), shorter(finite(v))] for k, v in list(metrics.items())[:50]]
                if isinstance(metrics, Mapping)
                else [],
            }
        )
    return found


def _events(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "step": whole(record.get("step")),
            "time": _short(record.get("time")),
            "kind": _short(record.get("kind")) or "event",
            "message": str(record.get("message") or "")[:4000],
        }
        for record in records
    ]


def _folders(folder: Path) -> list[str]:
    try:
        return [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
    except OSError:
        return []


def _steps_of_folders(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    matches = [re.fullmatch(r"step_(\d{1,15})", name) for name in _folders(folder)]
    return sorted(int(match[1]) for match in matches if match)
