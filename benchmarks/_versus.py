"""A training step of ours beside a trainer of TRL's: what the four benchmarks of steps share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _harness import Options, Outcome, Row, Side, machine, median, rate_ratio, take_turns, time_ratio

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
OURS = "ours"


@dataclass(frozen=True)
class Contest:
    """One row's contestants: peers are variants of one trainer, and the fastest counts.

    spec: what both sides get; ours: the loop's part of it (see _loop.py); peers: label -> further spec of TRL's side.
    by_tokens: the row is trained tokens per second in place of seconds per step.
    """

    name: str
    script: str
    peer_name: str
    shape: str
    spec: Mapping[str, Any]
    ours: Mapping[str, Any]
    peers: Mapping[str, Mapping[str, Any]]
    note: str = ""
    by_tokens: bool = False
    python: str = "bench"


def contest(made: Contest, options: Options, rounds: int) -> list[Row]:
    """The speed row and the memory row of one dtype, from the same processes."""
    facts = machine(options.threads)
    name = made.name
    sides = [
        Side(f"ours {name}", "_ours.py", {**made.spec, **made.ours, "task": "train"}, {OURS: {}}, False, warm_up=True),
        *(
            Side(f"{label} {name}", made.script, {**made.spec, **spec}, {label: {}}, python=made.python, warm_up=True)
            for label, spec in made.peers.items()
        ),
    ]
    outcome = take_turns(sides, rounds, options.time_limit)
    best = _fastest(outcome, made)
    return [_speed(made, facts, outcome, best), _memory(made, facts, outcome, best)]


def _fastest(outcome: Outcome, made: Contest) -> str | None:
    medians = {label: median(outcome.seconds(label)) for label in made.peers}
    known = {label: seconds for label, seconds in medians.items() if seconds is not None}
    return min(known, key=lambda label: known[label]) if known else None


def _speed(made: Contest, facts: dict[str, Any], outcome: Outcome, best: str | None) -> Row:
    measured = outcome.rates if made.by_tokens else outcome.seconds
    ours, theirs = measured(OURS), measured(best) if best else []
    mine, peer = median(ours), median(theirs)
    notes = [made.note, *_variants(outcome, made, best), *outcome.reasons]
    if peer is None and not made.by_tokens and outcome.bounds:
        peer = min(outcome.bounds.values())
        notes.append("so peer and ratio are lower bounds")
    gathering = median([result["gathering_seconds"] for result in outcome.results.get(OURS, ())])
    if gathering is not None and gathering >= 0.1:
        notes.insert(0, f"{gathering:.1f} s of ours is sampling and reward")
    return Row(
        name=f"{made.name}_{SHORT[made.spec['dtype']]}",
        ours=mine,
        peer=peer,
        ratio=(rate_ratio if made.by_tokens else time_ratio)(mine, peer),
        unit="trained tokens/s" if made.by_tokens else "s/step",
        shape=made.shape,
        dtype=made.spec["dtype"],
        machine=facts,
        peer_name=f"{made.peer_name}, {best}" if best and len(made.peers) > 1 else made.peer_name,
        note="; ".join(note for note in notes if note),
        samples={"ours": ours, "peer": theirs},
    )


def _variants(outcome: Outcome, made: Contest, best: str | None) -> Sequence[str]:
    """What the slower variants of the peer took."""
    others = {label: median(outcome.seconds(label)) for label in made.peers if label != best}
    return [f"{label} took {seconds:.3g} s a step" for label, seconds in others.items() if seconds is not None]


def _memory(made: Contest, facts: dict[str, Any], outcome: Outcome, best: str | None) -> Row:
    ours = outcome.peaks.get(f"ours {made.name}")
    peer = outcome.peaks.get(f"{best} {made.name}") if best else None
    return Row(
        name=f"{made.name}_memory_{SHORT[made.spec['dtype']]}",
        ours=ours,
        peer=peer,
        ratio=time_ratio(ours, peer),
        unit="MiB peak RSS",
        shape=made.shape,
        dtype=made.spec["dtype"],
        machine=facts,
        peer_name=f"{made.peer_name}, {best}" if best and len(made.peers) > 1 else made.peer_name,
        note="; ".join(outcome.reasons),
    )
