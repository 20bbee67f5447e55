"""Rewrite the help of every command inside docs/cli.md: `make docs`. A test fails where it is out of date."""

from pathlib import Path

from sapwood.cli import dump_help

MARK = "<!-- help: written by `make docs` -->\n\n"


def main() -> None:
    """Replace everything below the mark."""
    page = Path(__file__).parents[1] / "docs" / "cli.md"
    above, _, _ = page.read_text(encoding="utf-8").partition(MARK)
    page.write_text(above + MARK + dump_help() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
