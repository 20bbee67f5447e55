import os
import sys

import pytest
from tests.chats import tokenizer
from tests.worlds import Faulty, Guess

from sapwood import rollout
from sapwood.chat import Chat
from sapwood.engines import Sampling
from sapwood.engines.scripted import ScriptedEngine
from sapwood.envs._process import LocalHost, WorkerPool, reference
from sapwood.errors import ConfigError, EnvError
from sapwood.plugins import load
from sapwood.rollout import collect
from sapwood.types import Task


def play(family, tasks, replies=("a", "b")):
    tok = tokenizer()
    return collect(family, tasks, 1, ScriptedEngine(tok, list(replies)), Chat(tok), Sampling(max_new_tokens=8), 0)


def test_failures_are_contained_and_recorded():
    names = ["raise-in-start", "raise-in-step", "hang", "die", "noisy", "raise-in-close", "fine"]
    groups = play(Faulty(), [Task(n) for n in names])
    errors = {g.task.id: g.trajectories[0].error for g in groups}
    assert errors == {
        "raise-in-start": "ValueError: no weather",
        "raise-in-step": "KeyError: 'zone 7'",
        "hang": "EnvError: the environment took longer than 1 s, so its process was killed",
        "die": "EnvError: the environment's process died (exit code 3): Segmentation fault",
        "noisy": None,
        "raise-in-close": None,
        "fine": None,
    }
    hung = groups[2].trajectories[0]
    assert [turn.text for turn in hung.turns] == ["a", "b"]
    assert groups[5].trajectories[0].info == {"close_error": "OSError: busy"}
    pids = [g.trajectories[0].turns[0].info["pid"] for g in groups[1:]]
    assert len(set(pids)) == len(pids)
    assert os.getpid() not in pids
    with pytest.raises(ProcessLookupError):
        os.kill(hung.turns[0].info["pid"], 0)


def test_both_hosts_tell_the_same_story():
    task = Task("t", metadata={"answer": 7})
    family = Guess()
    with WorkerPool(family) as pool:
        hosts = [LocalHost(family, task), pool.host(task)]
        for reply in (None, "3", "garbage \x00 \ud7ff", "7"):
            for host in hosts:
                host.begin(reply)
            here, there = [host.finish() for host in hosts]
            assert here == there
        for host in hosts:
            host.close()


def test_a_worker_is_reused():
    with WorkerPool(Faulty()) as pool:
        said = []
        for name in ("fine", "raise-in-step", "again"):
            host = pool.host(Task(name))
            host.begin(None)
            said.append(host.finish())
            host.close()
        assert said[0] == said[1] == said[2]  # the first observation names the process
        host = pool.host(Task("closed with an answer on its way"))
        host.begin(None)
        host.close()
        host = pool.host(Task("fresh"))
        host.begin(None)
        assert host.finish() != said[0]
        host.close()
        host.close()


def test_more_episodes_than_processes(monkeypatch):
    monkeypatch.setattr(rollout, "MAX_PROCESSES", 2)
    names = ["fine", "raise-in-step", "a", "raise-in-start", "b", "c"]
    groups = play(Faulty(), [Task(n) for n in names])
    assert [bool(g.trajectories[0].error) for g in groups] == [False, True, False, True, False, False]
    assert len({t.info["pid"] for g in groups for t in g.trajectories[0].turns if t.info}) == 2


def test_an_interrupted_run_leaves_no_process():
    pids = []

    def interrupt(prompt, request):
        pids.append(int(prompt.rsplit("process ", 1)[1].split("<")[0]))
        if len(pids) == 3:
            raise KeyboardInterrupt
        return "a"

    tok = tokenizer()
    with pytest.raises(KeyboardInterrupt):
        collect(
            Faulty(),
            [Task(str(i)) for i in range(4)],
            1,
            ScriptedEngine(tok, interrupt),
            Chat(tok),
            Sampling(),
            0,
        )
    assert len(set(pids)) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_family_that_the_worker_cannot_make_is_an_error():
    class Inner(Guess):
        pass

    with pytest.raises(ConfigError, match="top level"):
        reference(Inner)
    with pytest.raises(EnvError, match="JSON-serialisable"):
        play(Faulty(), [Task("odd", metadata={"x": object()})])


def test_a_class_from_a_file_is_found_by_its_path(tmp_path):
    file = tmp_path / "my_world.py"
    file.write_text("from tests.worlds import Faulty\nclass Mine(Faulty):\n    pass\n")
    cls = load("env", f"{file}:Mine")
    assert reference(cls) == f"{file}:Mine"
    [group] = play(cls(), [Task("fine")])
    assert group.trajectories[0].terminated
    assert reference(Guess) == "tests.worlds:Guess"
    assert "tests.worlds" in sys.modules
