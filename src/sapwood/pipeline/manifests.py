"""What a stage of a pipeline is, and its manifest: which options, inputs and outputs it was done with.

DIR/manifests/NAME.json says "running" from a stage's beginning on, and "done" with all hashes at its end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapwood.environment import version
from sapwood.envs.hvac.files import replace
from sapwood.pipeline.digests import digest
from sapwood.pipeline.ppo import CHECKPOINTS
from sapwood.pipeline.rollout import remove_parts

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """A stage of a round. inputs: files and folders by name; outputs: the files that are its result; options: all that
    it depends on beside them; run: does it, and says what came of it.
    """

    stage: str
    round: int
    folder: Path
    inputs: Mapping[str, tuple[Path, ...]]
    outputs: tuple[Path, ...]
    options: Mapping[str, Any]
    run: Callable[[], Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Of its manifest: that of the first round has no number."""
        return self.stage if self.round == 1 else f"{self.stage}-{self.round}"


def read(path: Path) -> dict[str, Any] | None:
    """A manifest, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def key_of(step: Step, hashes: Mapping[str, str]) -> str:
    """What a step's result follows from: its options, the contents of its inputs (not where they lie), the version."""
    inputs = {name: [hashes[str(path)] for path in paths] for name, paths in step.inputs.items()}
    told = {"stage": step.stage, "round": step.round, "options": step.options, "inputs": inputs}
    text = json.dumps({**told, "version": version("sapwood")}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_up_to_date(before: Mapping[str, Any] | None, key: str, step: Step) -> bool:
    """Whether a step was done with this key, and its outputs are as it left them."""
    if before is None or before.get("state") != "done" or before.get("key") != key:
        return False
    outputs = before.get("outputs")
    if not isinstance(outputs, Mapping) or set(outputs) != {path.name for path in step.outputs}:
        return False
    return all(path.exists() and outputs[path.name] == digest(path) for path in step.outputs)


def clear(step: Step) -> None:
    """Remove what a stage kept to go on from."""
    if step.stage == "ppo":
        shutil.rmtree(step.folder / CHECKPOINTS, ignore_errors=True)
    remove_parts(step.folder)


def write_running(path: Path, step: Step, key: str) -> None:
    """Say that a step has begun. Raises StorageError."""
    _write(path, {"format": FORMAT, "stage": step.stage, "state": "running", "key": key})


def write_done(
    path: Path,
    step: Step,
    key: str,
    hashes: Mapping[str, str],
    summary: Mapping[str, Any],
    began: str,
    seconds: float,
) -> None:
    """Say what a step was done with. hashes: of the inputs by path. Raises StorageError."""
    _write(
        path,
        {
            "format": FORMAT,
            "stage": step.stage,
            "round": step.round,
            "state": "done",
            "key": key,
            "version": version("sapwood"),
            "time": began,
            "seconds": seconds,
            "options": step.options,
            "inputs": hashes,
            "outputs": {output.name: digest(output) for output in step.outputs},
            "summary": summary,
        },
    )


def _write(path: Path, told: Mapping[str, Any]) -> None:
    replace(path, [(json.dumps(told, indent=2, default=str) + "\n").encode()])
