"""A limit on hangs that says nothing of speed: code that would run for ever is stopped after minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def finishes(code: str, seconds: float = 300.0) -> None:
    """Run code in a process of its own; fails where it raises, or is still at it long after any sane time.

    What it printed last is shown, so let it say what it is about to do.
    """
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run([sys.executable, "-c", code], timeout=seconds, capture_output=True, text=True, cwd=root)
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")
        pytest.fail(f"not done after {seconds:.0f} s; it was at {printed[-200:]!r}")
    assert done.returncode == 0, done.stderr[-2000:]
