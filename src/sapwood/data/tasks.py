"""An environment's tasks and their known answers -> demonstrations, to begin with before any reinforcement.

sapwood data tasks recipe.yaml --count 4000 --out demonstrations.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

from sapwood.envs import EnvFamily, Split
from sapwood.errors import ConfigError, StorageError
from sapwood.paths import replacing


def write_tasks(family: EnvFamily, split: Split, count: int, seed: int, out: Path) -> int:
    """Write {prompt, response} lines of `count` tasks; returns how many.

    Raises ConfigError for a world that writes its prompts itself or knows no answers, StorageError where `out` can't be
    written.
    """
    try:
        with replacing(out) as file:
            for task in family.tasks(split, count, seed):
                if not task.prompt or task.answer is None:
                    raise ConfigError(
                        f"env: task {task.id!r} has no prompt and answer of its own, so it can't be a demonstration; "
                        "use a world of questions with answers, such as prompts or reasoning_gym."
                    )
                prompt = [{"role": message.role, "content": message.content} for message in task.prompt]
                file.write(json.dumps({"prompt": prompt, "response": str(task.answer)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"{out}: can't be written ({error.strerror or error}).") from error
    return count
