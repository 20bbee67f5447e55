"""Where an environment runs: in this process, or in one of its own that can be killed.

Both hosts have two-part calls: `begin` sends a reply and `finish` waits for what it led to, so that the environments
of many episodes work at the same time. A worker process talks JSON lines over its standard input and output (never
pickle), is reused by later episodes, and is killed when a call exceeds the family's `step_timeout`.

    parent                                            worker (python -m sapwood.envs._process)
    {"family": "module:Class", "options": {...}}  ->  {"ready": true}
    {"start": {task}}                             ->  {"observation": {...}}     or {"error": "ValueError: ..."}
    {"step": "reply"}                             ->  {"step": {...}}            or {"error": "ValueError: ..."}
    {"close": true}                               ->  {"closed": true}
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import numpy as np

from sapwood import plugins
from sapwood.envs import Env, EnvFamily, Observation, Step
from sapwood.errors import ConfigError, EnvError
from sapwood.types import Message, Task

#: Seconds that a worker may take to start Python and import the family.
READY_TIMEOUT = 120.0


class RemoteError(EnvError):
    """An exception raised by an environment in its own process; the text is "Type: message"."""


class Host(ABC):
    """Runs the environment of one episode."""

    @abstractmethod
    def begin(self, reply: str | None) -> None:
        """Start the environment (None) or send it a reply."""

    @abstractmethod
    def finish(self) -> Observation | Step:
        """What the last `begin` led to. Raises whatever the environment raised, or EnvError for a time limit."""

    @abstractmethod
    def close(self) -> None:
        """Close the environment."""


class LocalHost(Host):
    """An environment in this process."""

    def __init__(self, family: EnvFamily, task: Task) -> None:
        self._family, self._task = family, task
        self._env: Env | None = None
        self._reply: str | None = None

    def begin(self, reply: str | None) -> None:
        """Note what to do; the environment works in `finish`."""
        self._reply = reply

    def finish(self) -> Observation | Step:
        """Start or step the environment."""
        if self._env is None:
            self._env = self._family.make(self._task)
            return self._env.start()
        assert self._reply is not None
        return self._env.step(self._reply)

    def close(self) -> None:
        """Close the environment if it was made."""
        if self._env is not None:
            self._env.close()
            self._env = None


class WorkerPool:
    """Worker processes of one family, each holding at most one environment at a time. A context manager."""

    def __init__(self, family: EnvFamily) -> None:
        self._family = family
        self._idle: list[Worker] = []

    def host(self, task: Task) -> ProcessHost:
        """A host for the task, in an idle worker or a fresh one."""
        worker = self._idle.pop() if self._idle else self._started()
        return ProcessHost(worker, task, self._idle.append, self._family.step_timeout)

    def _started(self) -> Worker:
        opening = {"family": reference(type(self._family)), "options": self._family.model_dump(mode="json")}
        return Worker(("-m", "sapwood.envs._process"), opening)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._idle:
            self._idle.pop().kill()


class ProcessHost(Host):
    """An environment in a worker process. Seconds count from `begin`; a worker that exceeds them is killed."""

    def __init__(self, worker: Worker, task: Task, release: Callable[[Worker], None], timeout: float) -> None:
        self._worker: Worker | None = worker
        self._task, self._release, self._timeout = task, release, timeout
        self._deadline = 0.0
        self._answer_due = False

    def begin(self, reply: str | None) -> None:
        """Send the call; a worker that has just been started is sent it as soon as it is ready."""
        if self._worker is None:
            raise EnvError("the environment's process has ended")
        try:
            self._worker.wait_ready()
            request = {"start": _task_to_json(self._task)} if reply is None else {"step": reply}
            self._worker.send(request)
        except EnvError:
            self._kill()
            raise
        self._deadline = time.monotonic() + self._timeout
        self._answer_due = True

    def finish(self) -> Observation | Step:
        """Wait for the worker's answer, until the time limit."""
        assert self._worker is not None
        try:
            answer = self._worker.receive(self._deadline, f"the environment took longer than {self._timeout:g} s")
        except EnvError:
            self._kill()
            raise
        self._answer_due = False
        if "error" in answer:
            raise RemoteError(answer["error"])
        return _observation(answer["observation"]) if "observation" in answer else _step(answer["step"])

    def close(self) -> None:
        """Close the environment and give the worker back; a worker that doesn't answer is killed."""
        if self._worker is None:
            return
        if self._answer_due:  # an interrupted run doesn't wait for what it won't use
            self._kill()
            return
        try:
            self._worker.send({"close": True})
            answer = self._worker.receive(time.monotonic() + self._timeout, "closing the environment took too long")
        except EnvError:
            self._kill()
            raise
        worker, self._worker = self._worker, None
        self._release(worker)
        if "error" in answer:
            raise RemoteError(answer["error"])

    def _kill(self) -> None:
        assert self._worker is not None
        self._worker.kill()
        self._worker = None


class Worker:
    """A process that answers JSON lines, and can be killed.

    program: arguments of the Python interpreter that name it; opening: the first request, answered once it is ready.
    """

    def __init__(self, program: Sequence[str], opening: Mapping[str, Any]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        self._process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # an interrupt of the run reaches the parent only, which then kills the workers
        )
        assert self._process.stdout is not None
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()
        self._ready = False
        self._started = time.monotonic()
        self.send(opening)

    def wait_ready(self) -> None:
        """Wait until the worker has answered its opening. Raises EnvError with its reason if it can't."""
        if self._ready:
            return
        answer = self.receive(self._started + READY_TIMEOUT, "the environment's process did not get ready")
        if "error" in answer:
            raise RemoteError(answer["error"])
        self._ready = True

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request. Raises EnvError for a worker that has died."""
        try:
            line = json.dumps(request, default=_plain)
        except TypeError as error:
            raise EnvError(f"an isolated environment's task must be JSON-serialisable: {error}") from error
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EnvError(self._obituary()) from error

    def receive(self, deadline: float, complaint: str) -> dict[str, Any]:
        """The next answer, until `deadline` (time.monotonic). Raises EnvError with `complaint` for a late one."""
        try:
            line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise EnvError(f"{complaint}, so its process was killed") from None
        if line is None:
            raise EnvError(self._obituary())
        return json.loads(line)

    def kill(self) -> None:
        """End the process and whatever it started."""
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._log.close()

    def _obituary(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the environment's process died ({how})" + (f": {lines[-1]}" if lines else "")


def reference(cls: type) -> str:
    """A plugin reference by which another process finds a class. Raises ConfigError for a class in a function."""
    if "<locals>" in cls.__qualname__ or "." in cls.__qualname__:
        raise ConfigError(f"{cls.__qualname__} must be at the top level of a module to run in a process of its own.")
    module = sys.modules[cls.__module__]
    if cls.__module__ == "__main__" or cls.__module__.startswith("sapwood_plugin_"):
        path = getattr(module, "__file__", None)
        if path is None:
            raise ConfigError(f"{cls.__qualname__} must be in a file to run in a process of its own.")
        return f"{path}:{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def _pump(stream: IO[bytes], answers: queue.SimpleQueue[bytes | None]) -> None:
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(None)


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as JSON knows them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON-serialisable")


def _task_to_json(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "prompt": [dataclasses.astuple(message) for message in task.prompt],
        "answer": task.answer,
        "metadata": dict(task.metadata),
        "seed": task.seed,
    }


def _task(data: Mapping[str, Any]) -> Task:
    return Task(data["id"], _messages(data["prompt"]), data["answer"], data["metadata"], data["seed"])


def _messages(pairs: list[list[str]]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in pairs)


def _observation(data: Mapping[str, Any]) -> Observation:
    return Observation(_messages(data["messages"]), data["restart"])


def _step(data: Mapping[str, Any]) -> Step:
    observation = None if data["observation"] is None else _observation(data["observation"])
    return Step(observation, data["reward"], data["terminated"], data["truncated"], data["info"])


def _observation_to_json(observation: Observation) -> dict[str, Any]:
    return {
        "messages": [dataclasses.astuple(message) for message in observation.messages],
        "restart": observation.restart,
    }


def _step_to_json(step: Step) -> dict[str, Any]:
    observation = None if step.observation is None else _observation_to_json(step.observation)
    return {
        "observation": observation,
        "reward": step.reward,
        "terminated": step.terminated,
        "truncated": step.truncated,
        "info": dict(step.info),
    }


class _Server:
    """The worker's side of the conversation."""

    def __init__(self) -> None:
        self._family: EnvFamily | None = None
        self._env: Env | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if "family" in request:
            self._family = _find(request["family"])(**request["options"])
            return {"ready": True}
        assert self._family is not None
        if "start" in request:
            self._env = self._family.make(_task(request["start"]))
            return {"observation": _observation_to_json(self._env.start())}
        if "step" in request:
            assert self._env is not None
            return {"step": _step_to_json(self._env.step(request["step"]))}
        env, self._env = self._env, None
        if env is not None:
            env.close()
        return {"closed": True}


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(":")
    return plugins.load("env", name) if module.endswith(".py") else getattr(importlib.import_module(module), attribute)


def describe(error: BaseException) -> str:
    """An environment's exception in one line: "Type: message"."""
    text = str(error) if isinstance(error, RemoteError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def main() -> None:
    """Serve until standard input closes."""
    # What native code prints must not mix with the answers, so they get a descriptor of their own.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = _Server()
    for line in sys.stdin.buffer:
        try:
            text = json.dumps(server.answer(json.loads(line)), default=_plain)
        except Exception as error:  # the worker's side of the rollout boundary: recorded on the trajectory
            text = json.dumps({"error": describe(error)})
        out.write(text.encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
