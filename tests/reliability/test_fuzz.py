"""The fuzz in short, and that it notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability import fuzz
from tests.reliability.fuzz import CANARY, Case, try_case

ROOT = Path(__file__).parents[2]


def run_fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: every case forks, which a test runner's threads wouldn't survive.
    command = [sys.executable, "-m", "tests.reliability.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)


def test_malformed_input_is_answered_by_a_sentence() -> None:
    done = run_fuzz("--cases", "150", "--fast", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all" in done.stdout.splitlines()[-2]


@pytest.mark.slow
def test_a_thousand_malformed_inputs_are_answered() -> None:
    done = run_fuzz("--cases", "1000", "--seed", "2")
    assert done.returncode == 0, done.stdout + done.stderr


def answer(text: str, code: int = 1):
    def run() -> int:
        print(text, file=sys.stderr)
        return code

    return run


def crash() -> int:
    raise KeyError("x")


def smuggle() -> int:
    Path(CANARY).touch()
    return answer("sapwood: file.json: no.")()


def overwrite() -> int:
    Path("kept").write_text("other")
    return answer("sapwood: file.json: no.")()


def wait() -> int:
    time.sleep(60)
    return 0


GOOD = answer("sapwood: file.json line 3: no number; give one.")


@pytest.mark.parametrize(
    ("case", "outcome", "why"),
    [
        (Case(GOOD, ("file.json",)), "answered", ""),
        (Case(lambda: 0), "valid", ""),
        (Case(GOOD, ("other.json",)), "failed", "it names none of other.json"),
        (Case(answer("something is wrong")), "failed", "no sentence of Sapwood's"),
        (Case(answer("sapwood: no.", 3)), "failed", "exit code 3"),
        (Case(answer("sapwood: \x1b[2J")), "failed", "control characters for the terminal"),
        (Case(answer("sapwood: " + "x" * 6000)), "failed", "an answer of 6,010 characters"),
        (Case(crash), "failed", "it shows 'Traceback (most recent call last)'"),
        (Case(smuggle), "failed", "it ran code that the input holds"),
        (Case(overwrite, kept=("kept",)), "failed", "changed or removed: kept"),
        (Case(wait), "failed", "it hung"),
    ],
)
def test_a_case_is_judged(case: Case, outcome: str, why: str, tmp_path: Path, monkeypatch) -> None:
    if case.run is wait:
        monkeypatch.setattr(fuzz, "WALL_SECONDS", 1)
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "kept").write_text("as it was")
    verdict = try_case(case, folder)
    assert (verdict.outcome, verdict.why) == (outcome, why)
