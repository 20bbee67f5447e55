"""`sapwood report`: one page about runs, to keep and to send."""

from __future__ import annotations

import argparse
from pathlib import Path

from sapwood.commands import Command

MAX_SAMPLES = 10_000


def _arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders to put side by side, or files of trajectories"
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (report.html in the folder of a single run, or here)"
    )
    made.add_argument(
        "--max-samples",
        type=_count,
        default=MAX_SAMPLES,
        metavar="N",
        help=f"trajectories in the page, of all runs together ({MAX_SAMPLES}); it says what is left out",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from sapwood.report import write_report

    written = write_report(arguments.runs, arguments.out, arguments.max_samples)
    left = f" of {written.total:,}; --max-samples {written.total} has all" if written.taken < written.total else ""
    print(f"{written.path}: {written.size / 1e6:.1f} MB, {written.taken:,} trajectories{left}")
    return 0


COMMAND = Command("Write what runs left as one page that opens without a network.", _arguments, _run)
