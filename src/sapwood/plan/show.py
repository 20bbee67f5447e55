"""A plan for people and for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sapwood.config import Recipe
from sapwood.plan.advice import size
from sapwood.plan.making import Plan
from sapwood.plan.memory import Memory
from sapwood.plan.timing import Time

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0


def show(made: Plan, recipe: Recipe, *, as_json: bool = False) -> None:
    """Print it on stdout."""
    if as_json:
        print(json.dumps(to_json(made), indent=2))
        return
    # A pipe has no width, so lines are as long as they are there.
    terminal = Console().is_terminal
    Console(width=None if terminal else 1000).print(render(made, recipe))


def render(made: Plan, recipe: Recipe) -> RenderableType:
    """For a terminal."""
    lines = [
        f"{recipe.algorithm['name']} of {recipe.model.name} on {made.device}, nothing loaded",
        *_parameter_lines(made),
        _token_line(made),
    ]
    time = _time_lines(made.time) if made.time is not None else []
    if made.device != "cpu":
        time = ["time: not estimated on a GPU"]
    advice = [Padding(Text(sentence), (0, 0, 0, 2), expand=False) for sentence in made.advice]
    return Group(*map(Text, lines), _table(made.memory), Text(verdict(made)), *advice, *map(Text, time))


def _parameter_lines(made: Plan) -> list[str]:
    counts = made.parameters
    lines = [f"parameters: {counts.total:,}, of which {counts.trained:,} are trained"]
    if counts.others:
        others = ", ".join(f"{name} {count:,}" for name, count in counts.others.items())
        lines[0] = f"parameters: {counts.total:,} in the policy; {others}; {counts.trained:,} are trained"
    return lines


def _token_line(made: Plan) -> str:
    tokens = made.tokens
    text = f"micro-batches: {tokens['typical']:,} distinct tokens, the largest {tokens['largest']:,}"
    if tokens["at_most"] > tokens["largest"]:
        text += f", at most {tokens['at_most']:,}"
    return f"{text} (optim.token_budget {tokens['budget']:,})"


def _table(memory: Memory) -> Table:
    """A row a part: at the peak, and at most at any time where that is more."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    table.add_column(f"at the peak ({memory.where})", justify="right", no_wrap=True)
    table.add_column("at any time", justify="right", no_wrap=True)
    for part in memory.parts:
        now = part.at(memory.where)
        table.add_row(part.name, mebi(now) if now else "-", mebi(part.most))
    table.add_section()
    table.add_row("in all", mebi(memory.peak), "")
    return table


def mebi(count: int) -> str:
    """Bytes in MiB, whole; "< 1 MiB" for less."""
    rounded = round(count / 2**20)
    return f"{rounded:,} MiB" if rounded else "< 1 MiB"


def needs(made: Plan) -> str:
    """What it needs of what there is: no full stop."""
    assert made.room is not None
    told = f"needs {size(made.memory.peak)}"
    if round(made.at_most / 2**20) > round(made.memory.peak / 2**20):
        told += f" ({size(made.at_most)} at most)"
    return f"the run {told} of the {size(made.room.bytes)} {made.room.limit}"


def verdict(made: Plan) -> str:
    """Whether it fits, in a sentence."""
    if made.room is None:
        return f"The run needs {size(made.memory.peak)}; this system doesn't say how much memory there is."
    told = needs(made)
    told = told[0].upper() + told[1:]
    return {
        "yes": f"It fits: {needs(made)}.",
        "maybe": f"It may not fit: {needs(made)}.",
        "no": f"It does not fit: {needs(made)}.",
        "unknown": f"{told}.",
    }[made.fits]


def _time_lines(time: Time) -> list[str]:
    parts = ", ".join(f"{name} {span(seconds)}" for name, seconds in time.step.items())
    lines = [f"time: {between(time.low, time.high)} for {time.steps:,} steps"]
    lines.append(f"  a step: {parts}")
    if time.evaluations:
        lines.append(f"  {time.evaluations:,} evaluations: {span(time.evaluation)} each")
    return lines


def between(low: float, high: float) -> str:
    """A range of seconds in words: "about 7 to 12 minutes"."""
    for unit, name in ((_DAY, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if high >= 2 * unit:
            return f"about {_number(low / unit)} to {_number(high / unit)} {name}"
    return f"about {max(round(low), 1)} to {max(round(high), 2)} seconds"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 3 else f"{value:.1f}".removesuffix(".0")


def span(seconds: float) -> str:
    """Seconds in few words: "0.4 s", "12 s", "3 min"."""
    if seconds >= 2 * _MINUTE:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def to_json(made: Plan) -> dict[str, Any]:
    """Plain data: bytes and seconds."""
    memory = made.memory
    told: dict[str, Any] = {
        "device": made.device,
        "parameters": {
            "policy": made.parameters.total,
            "trained": made.parameters.trained,
            **made.parameters.others,
        },
        "tokens": dict(made.tokens),
        "memory": {
            "parts": {part.name: {p: part.at(p) for p in memory.phases} for part in memory.parts},
            "phases": {phase: memory.total(phase) for phase in memory.phases},
            "peak": memory.peak,
            "peak_phase": memory.where,
            "at_most": made.at_most,
        },
        "room": None if made.room is None else {"bytes": made.room.bytes, "limit": made.room.limit},
        "fits": made.fits,
        "advice": list(made.advice),
        "time": None,
    }
    if made.time is not None:
        time = made.time
        told["time"] = {
            "seconds": [round(time.low, 1), round(time.high, 1)],
            "steps": time.steps,
            "step": {name: round(value, 3) for name, value in time.step.items()},
            "evaluation": round(time.evaluation, 3),
            "evaluations": time.evaluations,
        }
    return told
