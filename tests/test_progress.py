"""What a run shows: the compact line, the live display, JSON lines, and the log of all of them."""

from __future__ import annotations

import io
import json
import logging
import math
import re

import pytest
from rich.console import Console

from sapwood.progress import COMPACT, DISPLAYED, HELD_OUT, Progress, duration, printable, quiet


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and that it can show more than ASCII."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


PPO = {
    "loss": 0.4,
    "policy_loss": 0.32451,
    "value_loss": 0.12344,
    "reward": 1.5604,
    "advantages": 0.2299,
    "entropy": 0.678,
    "learning_rate": 1e-6,
    "kl": 0.0123,
}


def lines_of(*steps: dict[str, float], total: int = 3, done: int = 0) -> list[str]:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.start(total, done=done)
        for number, metrics in enumerate(steps, done + 1):
            progress.step(number, metrics, {"tokens_per_second": 1234.4})
    return stream.getvalue().splitlines()


def test_the_compact_line_of_ppo() -> None:
    legend, line = lines_of(PPO, total=1)
    assert line == "step 1/1: PL:0.3245 VL:0.1234 R:1.560 A:0.230 E:0.678 LR:1.00e-06 KL:1.23e-02 | 1,234 tok/s"
    assert legend == (
        "PL policy loss, VL value loss, R reward, A advantage, E entropy, LR learning rate, "
        "KL KL divergence from the reference"
    )


def test_of_data_the_loss_stands_for_the_policy_loss() -> None:
    _, line = lines_of({"loss": 0.69312, "accuracy": 0.5, "margin": -0.01, "learning_rate": 5e-5}, total=1)
    assert line == "step 1/1: L:0.6931 ACC:0.500 M:-0.010 LR:5.00e-05 | 1,234 tok/s"


def test_held_out_results_are_told_in_words_with_their_interval() -> None:
    measured = {"reward": 1.0, "eval/return": 0.58333, "eval/low": 0.5338, "eval/high": 0.63286, "eval/loss": 0.5}
    _, line, plain = lines_of(measured, {"reward": 2.0, "eval/return": -3.0, "eval/low": math.nan}, total=2)
    assert "| held-out return 0.583 [0.534, 0.633], loss 0.5000 |" in line
    assert "| held-out return -3.000 |" in plain  # one task has no interval


def test_an_abbreviation_is_explained_once_and_before_its_first_use() -> None:
    lines = lines_of({"reward": 0.25}, {"reward": 0.5, "grad_norm": 2.0}, {"reward": 0.5, "grad_norm": 1.0})
    assert [line for line in lines if not line.startswith("step")] == ["R reward", "G gradient norm"]
    assert lines[0] == "R reward"
    assert lines[2] == "G gradient norm"
    assert lines[3].startswith("step 2/3: R:0.500 G:2.00")


def test_a_step_without_numbers_is_a_line_all_the_same() -> None:
    assert lines_of({"updates": 0}, total=1) == ["step 1/1: | 1,234 tok/s"]


def test_time_left_counts_the_steps_of_this_session(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 100.0])  # made, started, and asked after the step
    monkeypatch.setattr("sapwood.progress.time.monotonic", lambda: next(clock))
    # Of 12 steps ten were made before; the eleventh took 100 s, so the last one will too.
    assert lines_of({"reward": 1.0}, total=12, done=10)[-1].endswith("| 1:40 left")


def test_work_is_told_when_it_is_done_and_phases_only_to_the_log() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.work("proportional", 1, 2)
        progress.work("proportional", 2, 2)
        progress.phase("learning")
    assert stream.getvalue() == "proportional 2/2\n"


def test_everything_shown_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sapwood")
    with Progress(stream=io.StringIO()) as progress:
        progress.start(2)
        progress.phase("sampling")
        progress.phase("sampling")
        progress.step(1, {"reward": 0.25})
        progress.note("a note")
        progress.warn("step 1: entropy_collapse")
    told = [(record.levelname, re.sub(r"\| .* left", "", record.message)) for record in caplog.records]
    assert told == [
        ("INFO", "phase: sampling"),
        ("INFO", "R reward"),
        ("INFO", "step 1/2: R:0.250 "),
        ("INFO", "a note"),
        ("WARNING", "step 1: entropy_collapse"),
    ]


def test_json_lines_are_one_object_each_and_hold_everything(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with Progress(json_lines=True, stream=stream) as progress:
        progress.start(1)
        progress.work("held-out", 2, 2)
        progress.step(1, {"reward": math.nan, "updates": 2}, {"tokens_per_second": 10.0})
        progress.note("a note")
        progress.warn("look")
    assert stream.getvalue() == ""
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"step": 1, "reward": None, "updates": 2, "tokens_per_second": 10.0},
        {"note": "a note"},
        {"warning": "look"},
    ]


# ---- the live display ------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


def screen(progress: Progress) -> list[str]:
    """The display as it stands, without its colours."""
    console = Console(file=io.StringIO(), width=140)
    with console.capture() as held:
        console.print(progress._render())
    return [line.rstrip() for line in held.get().splitlines()]


def test_the_display_shows_values_trends_and_what_is_going_on(terminal: Terminal) -> None:
    with Progress(stream=terminal) as progress:
        progress.start(4)
        for step, reward in enumerate((0.0, 0.5, 1.0), 1):
            progress.step(step, {"reward": reward, "kl": None, "loss": -0.25}, {"tokens_per_second": 2500.0})
        progress.phase("sampling")
        bar, values, *rest = screen(progress)
    assert bar.startswith("training")
    assert "3/4" in bar
    assert bar.endswith("sampling")
    # 0, 0.5 and 1 are the lowest, the middle and the highest of eight bars; a loss that never changes is flat.
    assert re.match(r"reward +1\.000 ▁▅█ +loss +-0\.2500 ▁▁▁ +tokens/s +2,500 ▁▁▁$", values)
    assert rest == []


def test_the_last_warnings_stay_in_sight_and_notes_scroll_by(terminal: Terminal) -> None:
    with Progress(stream=terminal) as progress:
        progress.start(4)
        progress.note("a line [that] stays")
        for number in range(5):
            progress.warn(f"warning number {number}")
        shown = screen(progress)
    assert shown[-3:] == ["! warning number 2", "! warning number 3", "! warning number 4"]
    assert "a line [that] stays" in terminal.getvalue()
    assert "warning: warning number 0" in terminal.getvalue()


def test_without_utf8_there_are_no_bars(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "encoding", "latin-1")
    with Progress(stream=terminal) as progress:
        progress.start(4)
        progress.step(1, {"reward": 0.0})
        progress.step(2, {"reward": 1.0})
        assert screen(progress)[1] == "reward 1.000"


def test_a_narrow_terminal_has_fewer_columns(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with Progress(stream=terminal) as progress:
        progress.start(4)
        progress.step(1, {"reward": 0.0, "entropy": 1.0, "grad_norm": 2.0})
        assert len(screen(progress)) == 4  # the bar, and a value a line


def test_what_comes_from_elsewhere_cannot_steer_the_terminal(terminal: Terminal) -> None:
    hostile = "a\x1b[2Jb\rc\x07\u202ed"
    assert printable(hostile) == "a\ufffd[2Jb\ufffdc\ufffd\ufffdd"
    with Progress(stream=terminal) as progress:
        progress.note(hostile)
        progress.warn(hostile)
    assert "\x1b[2Jb" not in terminal.getvalue()
    assert "\x07" not in terminal.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.4, 75, 3700)] == ["0:00", "0:59", "1:15", "1:01:40"]


def test_advice_of_libraries_is_silenced() -> None:
    quiet()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_abbreviations_differ() -> None:
    names = [short.name for short in COMPACT]
    assert len(set(names)) == len(names)
    assert [name for name in names if name in ("PL", "VL", "R", "A", "E", "LR")] == ["PL", "VL", "R", "A", "E", "LR"]
    assert len({metric for metric, *_ in (*DISPLAYED, *HELD_OUT)}) >= len(DISPLAYED)
