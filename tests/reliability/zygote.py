"""A process that has imported everything and forks for every run, so that a run starts in a moment and can be killed.

python -m tests.reliability.zygote        commands and answers are JSON lines
{"recipe": {...}, "resume": false, "log": PATH}  ->  {"pid": 123}
{"wait": 123}                                    ->  {"status": 0}        negative: the signal that ended it
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """The parent's end. A context manager."""

    def __enter__(self) -> Zygote:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "tests.reliability.zygote"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def start(self, recipe: dict[str, Any], log: Path, *, resume: bool = False) -> int:
        """Begin a run; its process id."""
        return int(self._ask({"recipe": recipe, "resume": resume, "log": str(log)})["pid"])

    def wait(self, pid: int) -> int:
        """The exit status; negative for a signal."""
        return int(self._ask({"wait": pid})["status"])

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    import sapwood.train  # noqa: F401
    import tests.learning
    import tests.worlds  # noqa: F401

    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            code = os.waitstatus_to_exitcode(status)
            answer = {"status": code}
        else:
            pid = os.fork()
            if pid == 0:
                _run(command)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _run(command: dict[str, Any]) -> None:
    """In the child: what `sapwood train` does, then the end of the process."""
    os.setsid()
    faulthandler.dump_traceback_later(120, exit=True, file=open(command["log"] + ".stuck", "w"))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()  # a crash tells where, in the log
    recipe = Path(command["log"]).with_suffix(".json")
    recipe.write_text(json.dumps(command["recipe"]))
    from sapwood.cli import main

    arguments = ["train", "--json", "-v"] + (["--resume"] if command["resume"] else [])
    code = 1
    try:
        code = main([*arguments, str(recipe)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
