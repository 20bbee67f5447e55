"""Rewrite the tables of metrics and abbreviations inside docs/metrics.md: `make docs`. A test fails where they are old.

All of them come from code: `sapwood.metricnames` and `sapwood.progress`.
"""

from __future__ import annotations

from pathlib import Path

from sapwood.metricnames import GROUPS, MetricInfo, sections
from sapwood.progress import COMPACT

BEGIN, END = "<!-- metrics: written by `make docs` -->\n\n", "<!-- end of metrics -->"


def tables() -> str:
    """The legend of the compact line, and a table a section."""
    legend = ["| | metric | meaning |", "|---|---|---|"]
    legend += [f"| `{short.name}` | `{short.metric}` | {short.meaning} |" for short in COMPACT]
    parts = ["\n".join(["## The line of a step", "", *legend])]
    for title, infos in sections().items():
        head = "| metric | unit | range | meaning | healthy | logged by |\n|---|---|---|---|---|---|"
        parts.append("\n".join([f"## {title}", "", head, *map(_row, infos)]))
    return "\n\n".join(parts) + "\n\n"


def _row(info: MetricInfo) -> str:
    limits = info.limits.replace("..", "…").strip()
    by = ", ".join(group if group in GROUPS else f"[{group}](algorithms/{group}.md)" for group in info.by)
    unit = info.unit.replace("^2", "²") if info.unit != "-" else ""
    return f"| `{info.name}` | {unit} | {limits} | {info.meaning} | {info.healthy} | {by} |"


def main() -> None:
    """Replace what is between the marks."""
    page = Path(__file__).parents[1] / "docs" / "metrics.md"
    above, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, below = rest.partition(END)
    page.write_text(above + BEGIN + tables() + END + below, encoding="utf-8")


if __name__ == "__main__":
    main()
