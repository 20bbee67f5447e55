"""An environment's tasks and their known answers -> demonstrations, to begin with before any reinforcement.

sapwood data tasks recipe.yaml --count 4000 --out demonstrations.jsonl
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from sapwood.envs import EnvFamily, Split
from sapwood.errors import ConfigError, StorageError


def write_tasks(family: EnvFamily, split: Split, count: int, seed: int, out: Path) -> int:
    """Write {prompt, response} lines of `count` tasks; returns how many.

    Raises ConfigError for a world that writes its prompts itself or knows no answers, StorageError where `out` can't be
    written.
    """
    aside = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            for task in family.tasks(split, count, seed):
                if not task.prompt or task.answer is None:
                    raise ConfigError(
                        f"env: task {task.id!r} has no prompt and answer of its own, so it can't be a demonstration; "
                        "use a world of questions with answers, such as prompts or reasoning_gym."
                    )
                prompt = [{"role": message.role, "content": message.content} for message in task.prompt]
                file.write(json.dumps({"prompt": prompt, "response": str(task.answer)}, ensure_ascii=False) + "\n")
        os.replace(aside, out)
    except OSError as error:
        raise StorageError(f"{out}: can't be written ({error.strerror or error}).") from error
    return count
