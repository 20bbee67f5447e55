"""Trackers behind their queues: what fails is told once, tried again and given up; training never waits."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.tracking import Broken, Hangs, Recorder, Refuses

from sapwood.errors import ConfigError, MissingExtra
from sapwood.trackers import TrackedRun, Tracker, _hub
from sapwood.trackers._hub import Trackers, distributions, picked, quiet_stdout, shown, watch_stdout
from sapwood.trackers.check import check_tracker


@pytest.fixture
def run(tmp_path):
    return TrackedRun(tmp_path, "run", {})


def tracked(run, *trackers, pauses=(0.0,), steps=range(1, 4)):
    """The notes of a run of a few steps."""
    hub = Trackers([(type(tracker).__name__, tracker) for tracker in trackers], pauses)
    hub.start(run)
    for step in steps:
        hub.scalars(step, {"reward": step / 2, "gap": math.nan, "name": "x", "on": True})
    hub.finish("finished")
    return hub.notes()


class Slow(Recorder):
    """Takes its first number only when it is let."""

    gate: ClassVar[threading.Event] = threading.Event()

    def scalars(self, step, values):
        self.gate.wait(10)
        super().scalars(step, values)


class Stumbles(Recorder):
    """Every call fails at first."""

    failed: ClassVar[set[Any]] = set()

    def scalars(self, step, values):
        if step not in self.failed:
            self.failed.add(step)
            raise TimeoutError
        super().scalars(step, values)


class Chatty(Recorder):
    """Prints, as some packages do."""

    def start(self, run):
        print("welcome to the tracker")
        return super().start(run)

    def address(self):
        return "https://example.org/run"


def test_finite_numbers_reach_the_tracker_in_order(run):
    assert tracked(run, Recorder()) == []
    assert Recorder.calls[1:] == [
        *(("scalars", step, {"reward": step / 2, "on": 1.0}) for step in (1, 2, 3)),
        ("finish", "finished"),
    ]


def test_a_failure_is_tried_again_and_told_once(run):
    Stumbles.failed.clear()
    assert tracked(run, Stumbles()) == ["tracker Stumbles: TimeoutError; it is tried again, and training goes on."]
    assert [call[1] for call in Recorder.calls[1:-1]] == [1, 2, 3]


def test_a_tracker_that_keeps_failing_is_given_up_and_the_others_go_on(run):
    notes = tracked(run, Broken(), Recorder(), steps=range(1, 20))
    assert notes == [
        "tracker Broken: ConnectionError: the server is gone; it is tried again, and training goes on.",
        "tracker Broken: it kept failing and is left out from here on; the run folder has every number.",
    ]
    # Of the broken one step 1, of the other all 19; both are told that the session is over.
    assert [call[1] for call in Recorder.calls if call[0] == "scalars"].count(1) == 2
    assert sorted({call[1] for call in Recorder.calls if call[0] == "scalars"}) == list(range(1, 20))
    assert [call[0] for call in Recorder.calls].count("finish") == 2


def test_a_record_that_cannot_be_taken_is_lost_alone(run):
    class Picky(Recorder):
        def scalars(self, step, values):
            if step == 2:
                raise ValueError("no twos,\nplease.")
            super().scalars(step, values)

    assert tracked(run, Picky()) == [
        "tracker Picky: ValueError: no twos, please; it is tried again, and training goes on."
    ]
    assert [call[1] for call in Recorder.calls if call[0] == "scalars"] == [1, 3]


def test_a_tracker_that_hangs_holds_up_nothing(run):
    hub = Trackers([("hangs", Hangs()), ("fine", Recorder())])
    hub.start(run)
    for step in range(100):
        hub.scalars(step, {"reward": 1.0})
    hub.finish("finished", seconds=0.2)
    assert hub.notes() == ["tracker hangs: 100 records were not sent within 0.2 s; the run folder has them all."]
    assert len([call for call in Recorder.calls if call[0] == "scalars"]) == 100


def test_of_a_slow_tracker_the_oldest_records_are_dropped(run, monkeypatch):
    monkeypatch.setattr(_hub, "WAITING", 3)
    Slow.gate.clear()
    hub = Trackers([("slow", Slow())])
    hub.start(run)
    hub.scalars(0, {"reward": 0.0})
    while hub._workers[0]._calls:  # taken, and held
        time.sleep(0.001)
    for step in range(1, 7):
        hub.scalars(step, {"reward": 0.0})
    assert hub.notes() == ["tracker slow: it is too slow, so its oldest records are dropped beyond 3 that wait."]
    Slow.gate.set()
    hub.finish("finished")
    assert [call[1] for call in Recorder.calls if call[0] == "scalars"] == [0, 4, 5, 6]


def test_a_tracker_that_is_long_in_starting_is_not_waited_for(run):
    gate = threading.Event()

    class Late(Recorder):
        def start(self, run):
            gate.wait(10)
            raise ConfigError("trackers: wrong password.")

    hub = Trackers([("late", Late())])
    hub.start(run, seconds=0.05)
    assert hub.notes() == ["tracker late: not ready after 0.05 s; training doesn't wait for it."]
    hub.scalars(1, {"reward": 1.0})
    gate.set()
    hub.finish("finished")
    assert hub.notes() == ["tracker late: trackers: wrong password."]


def test_what_a_user_can_mend_is_raised_and_the_others_are_ended(run):
    hub = Trackers([("fine", Recorder()), ("refuses", Refuses())])
    with pytest.raises(ConfigError, match="there is no such project"):
        hub.start(run)
    assert Recorder.calls[-1] == ("finish", "failed")


def test_check_comes_before_anything_else(run):
    class Missing(Recorder):
        def check(self):
            raise MissingExtra("pack", "pack", "the tracker 'missing'")

    with pytest.raises(MissingExtra, match="pip install"):
        Trackers([("missing", Missing())]).check()
    assert not run.dir.joinpath("trackers.json").exists()


def test_what_trackers_print_does_not_reach_standard_output(run, capsys):
    notes = tracked(run, Chatty())
    print("a line of ours")
    assert capsys.readouterr().out == "a line of ours\n"
    assert notes == ["tracker Chatty: https://example.org/run"]


def test_other_threads_print_while_one_is_silent(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back at the end
    watch_stdout()
    before = sys.stdout
    with quiet_stdout():
        with quiet_stdout():
            print("dropped")
        other = threading.Thread(target=print, args=("kept",))
        other.start()
        other.join()
        print("dropped too")
        assert sys.stdout is before
    assert sys.stdout is before  # a stream that is replaced while another thread prints ends the process
    assert capsys.readouterr().out == "kept\n"


def test_a_broken_file_of_names_is_a_new_run(run):
    run.dir.joinpath("trackers.json").write_text("{torn")
    tracked(run, Recorder())
    assert Recorder.calls[0][1].id is None
    assert run.dir.joinpath("trackers.json").read_text() == '{\n  "Recorder": "the-run-1"\n}\n'


# ---- secrets ---------------------------------------------------------------------------------------------------


class Options(Recorder):
    """With an address and innocent names."""

    url: str = ""
    max_tokens: int = 0
    keys: int = 0


@pytest.mark.parametrize(
    "options",
    [{"api_key": "s3cr3t"}, {"password": "s3cr3t"}, {"hf_token": "s3cr3t"}, {"AWS_SECRET_ACCESS_KEY": "s3cr3t"},
     {"url": "https://me:s3cr3t@host/x"}, {"url": "https://host/?write_token=s3cr3t"}],
)  # fmt: skip
def test_secrets_are_refused_without_being_repeated(options):
    with pytest.raises(ValueError, match=r"environment variable") as told:
        Options.model_validate(options)
    assert "s3cr3t" not in told.value.errors()[0]["msg"]  # type: ignore[attr-defined]


def test_what_only_sounds_like_a_secret_is_not():
    made = Options.model_validate({"url": "https://host:8080/a?step=1", "max_tokens": 3, "keys": 2})
    assert made.max_tokens == 3


# ---- samples ---------------------------------------------------------------------------------------------------


def record(member=0, reward=0.0, **changes):
    turn = {
        "prompt": "go", "reply": "gone", "stop_reason": "eos", "token_ids": [1, 2, 3], "advantages": [0.5, 0.5, -1.0],
        "ratios": [1.0, math.e, None],
    }  # fmt: skip
    parts = {"env": reward}
    return {
        "task": "t",
        "group": 0,
        "member": member,
        "reward": reward,
        "reward_parts": parts,
        "turns": [turn],
    } | changes


def test_the_first_the_best_and_the_worst_are_picked():
    chosen = picked([record(0, 0.5), record(1, 2.0), record(2, -1.0), record(3, 9.0, error="broke")])
    assert {name: text.splitlines()[0] for name, text in chosen.items()} == {
        "first": "task t   group 0, member 0",
        "best": "task t   group 0, member 1",
        "worst": "task t   group 0, member 2",
    }
    assert list(picked([record(0, 1.0), record(1, 1.0)])) == ["first"]
    assert "error: broke" in picked([record(0, error="broke")])["first"]
    assert picked([]) == {}


def test_a_sample_is_shown_with_its_reward_and_turns():
    assert shown(record(reward=0.25)) == (
        "task t   group 0, member 0\nreward 0.25   (env 0.25)\n"
        "--- prompt of turn 1 ---\ngo\n--- reply 1 (eos) ---\ngone"
    )
    long = record(turns=[{"prompt": "", "reply": f"r{i}" + "x" * 3000, "stop_reason": "length"} for i in range(6)])
    text = shown(long)
    assert "--- reply 3 (length) ---\nr2" in text
    assert "--- reply 2" not in text
    assert "[1,002 more characters]" in text  # 3,002 of which 2,000 are shown
    assert "[800 characters before]" in shown(record(turns=[{"prompt": "p" * 2000, "reply": ""}]))
    assert shown(record(turns=[{"reply": "\ud83d \0"}])).endswith("? \ufffd")


def test_distributions_are_over_trajectories_turns_and_tokens():
    found = distributions([record(0, 0.5), record(1, math.nan), record(2, 9.0, error="broke")])
    assert {name: values.tolist() for name, values in found.items()} == {
        "rewards": [0.5, 0.0],
        "reply_tokens": [3.0, 3.0],
        "advantages": [0.5, 0.5, -1.0] * 2,
        "log_ratios": [0.0, 1.0] * 2,
    }
    bare = distributions([{"reward": 1.0, "turns": [{"reply": "x"}]}])
    assert {name: values.tolist() for name, values in bare.items()} == {"rewards": [1.0], "reply_tokens": [0.0]}
    assert distributions([]) == {}


def test_trackers_that_are_none_cost_nothing():
    hub = Trackers(())
    assert not hub
    hub.scalars(1, {"reward": 1.0})
    hub.samples(1, [{"not": "looked at"}])
    hub.finish("finished")
    assert hub.notes() == []


def test_a_tracker_that_breaks_its_contract_is_told(tmp_path):
    class Forgets(Recorder):
        def start(self, run):
            return str(run.resumed_from)

    check_tracker(Recorder, tmp_path)
    with pytest.raises(ConfigError, match="same name for a resumed run: 'None', then '2'"):
        check_tracker(Forgets, tmp_path)


def test_histograms_are_arrays(run):
    hub = Trackers([("recorder", Recorder())])
    hub.start(run)
    hub.samples(4, [record()], prefix="eval/")
    hub.finish("stopped")
    (_, step, texts), (_, _, arrays) = Recorder.calls[1:3]
    assert (step, list(texts)) == (4, ["eval/samples/first"])
    assert all(isinstance(values, np.ndarray) and values.ndim == 1 for values in arrays.values())
    assert isinstance(Recorder(), Tracker)
