"""`sapwood replay`: run a skipped update again and say what isn't finite, and where."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sapwood.commands import Command
from sapwood.commands.shared import show_progress

if TYPE_CHECKING:
    from sapwood.evidence import Evidence
    from sapwood.replay import Replay


def _arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("evidence", type=Path, metavar="PATH", help="a folder of RUN/evidence/")
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights and products, in place of the recipe's; then nothing else is tried",
    )
    made.add_argument("--device", metavar="NAME", help="where to run: auto, cpu, cuda or cuda:1 (the recipe's)")
    made.add_argument("--json", action="store_true", help="print what was found as JSON")


def _run(arguments: argparse.Namespace) -> int:
    with show_progress() as progress:
        progress.phase("loading")
        from sapwood.evidence import load
        from sapwood.replay import replay

        evidence = load(arguments.evidence)
        found = replay(evidence, arguments.dtype, arguments.device, progress.phase)
    if arguments.json:
        told = {"step": evidence.step, "update": evidence.update, **found.to_json()}
        print(json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False))
    else:
        print("\n".join(_lines(evidence, found)))
    return 0


def _lines(evidence: Evidence, found: Replay) -> list[str]:
    from sapwood.replay import CAUSES

    outcome, rows = found.outcome, evidence.rows
    tokens, groups = sum(row.scored for row in rows), len({row.group for row in rows})
    seen = ", ".join(f"{name} {evidence.numbers[name]:g}" for name in ("loss", "grad_norm") if name in evidence.numbers)
    lines = [
        f"update    step {evidence.step}, update {evidence.update}: {len(rows)} rows of {groups} groups, {tokens:,} "
        "scored tokens",
        f"seen      {seen or 'no numbers were kept'}",
        f"replayed  loss {outcome.loss:g}, grad_norm {outcome.grad_norm:g}, {outcome.setup.describe()}",
        f"cause     {CAUSES[outcome.cause]}",
        *(f"          {sentence}" for sentence in outcome.found.get(outcome.cause, ())),
    ]
    for kind, sentences in outcome.found.items():
        if kind != outcome.cause:
            lines.append(f"{'with it':<10}{sentences[0]}{' ...' if len(sentences) > 1 else ''}")
    for name, other in found.variants:
        what = "finite" if other.cause == "none" else f"not finite either, in {CAUSES[other.cause]}"
        lines.append(f"{'also run':<10}{name}: {what} (loss {other.loss:g}, grad_norm {other.grad_norm:g})")
    return [*lines, *(f"try       {remedy}" for remedy in found.remedies)]


COMMAND = Command("Run a skipped update again and say what isn't finite, and where.", _arguments, _run)
