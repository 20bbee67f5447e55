"""Write the figures of benchmarks/results/*.json into docs/benchmarks.md, between its markers.

    python benchmarks/update_docs.py [--check]

--check changes nothing and fails where the page differs from the results.
"""

from __future__ import annotations

import argparse
from typing import Any

from _harness import REPOSITORY, RESULTS, number, read_rows, say

PAGE = REPOSITORY / "docs" / "benchmarks.md"
BEGIN = "<!-- results: written by benchmarks/update_docs.py -->"
END = "<!-- end of results -->"


def section(title: str, rows: list[dict[str, Any]]) -> str:
    """One result file as Markdown: the machine, a table, the notes."""
    machines = dict.fromkeys(describe(row["machine"]) for row in rows)
    head = "| row | shape | dtype | ours | peer | ratio | unit | peer is |\n|---|---|---|---|---|---|---|---|"
    lines = [
        f"| `{row['name']}` | {row['shape']} | {row['dtype']} | {number(row['ours'])} | {number(row['peer'])} | "
        f"{number(row['ratio'])} | {row['unit']} | {row.get('peer_name', '')} |"
        for row in rows
    ]
    notes = [f"- `{row['name']}`, {row['dtype']}: {row['note']}." for row in rows if row.get("note")]
    parts = [f"### {title}", "\n".join(machines), "\n".join([head, *lines])]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def describe(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    known = {"cpu", "flags", "threads", "cores", "memory_gib", "torch"}
    if not known <= machine.keys():
        return ", ".join(f"{key} {value}" for key, value in machine.items())
    flags = ", ".join(machine["flags"]) or "no vector flags known"
    return (
        f"{machine['cpu']} ({flags}), {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, torch {machine['torch']}."
    )


def rendered(page: str) -> str:
    """The page with its results replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = []
    for path in sorted(RESULTS.glob("*.json")):
        rows = read_rows(path)
        if isinstance(rows, list) and rows:
            sections.append(section(path.stem, rows))
    body = "\n\n".join(sections) or "No results yet: run `make bench`."
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def update() -> None:
    """Rewrite the page."""
    PAGE.write_text(rendered(PAGE.read_text()))
    say(f"wrote {PAGE.relative_to(REPOSITORY)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where the page differs from the results")
    if not parser.parse_args().check:
        update()
        return 0
    page = PAGE.read_text()
    if page != rendered(page):
        say(f"{PAGE.name} differs from benchmarks/results: run python benchmarks/update_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
