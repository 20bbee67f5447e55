"""`sapwood view`: the same page as `sapwood report`, in a browser on this machine, while runs go on."""

from __future__ import annotations

import argparse
from pathlib import Path

from sapwood.commands import Command


def _arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders to put side by side, or files of trajectories"
    )
    made.add_argument(
        "--port", type=_port, metavar="N", help="port to listen on, 0 for any (6017, or the next free one)"
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 65535")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from sapwood.report import Server

    with Server(arguments.runs, arguments.port) as server:
        print(f"{server.url}  (this machine only; Ctrl-C ends it)", flush=True)
        try:
            server.serve()
        except KeyboardInterrupt:
            return 0
    return 0


COMMAND = Command("Show runs in a browser on this machine while they go on.", _arguments, _run)
