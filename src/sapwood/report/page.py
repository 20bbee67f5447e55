"""The page: a template, its style and scripts in one file, and the data in blocks that no browser executes.

Nothing that a run wrote is ever put into the HTML itself. Data stands in `<script type="application/json">` and in
base64, and reaches the document through textContent alone. The Content-Security-Policy allows the one script and the
one style by their hashes, no connection (to the same server only, where one serves the page), and no HTML from text.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

from sapwood.environment import version
from sapwood.errors import StorageError
from sapwood.report.folder import RunFolder, check_together
from sapwood.report.names import GROUPS
from sapwood.report.reading import Problems
from sapwood.report.samples import choose, pack_file

#: In the order in which they are joined; each may use what those before it export.
MODULES = (
    "dom",
    "text",
    "format",
    "store",
    "chart",
    "curves",
    "days",
    "summary",
    "evaluation",
    "recipe",
    "timeline",
    "list",
    "tokens",
    "trajectory",
    "samples",
    "main",
)
_MARK = '<meta name="generator" content="sapwood report">'


@dataclass(frozen=True)
class Written:
    """A report that was written: bytes of the file, trajectories in it and in the runs."""

    path: Path
    size: int
    taken: int
    total: int


def write_report(runs: Iterable[Path | str], out: Path | str | None = None, max_samples: int = 10_000) -> Written:
    """Write one page about run folders (or bare files of trajectories) that needs nothing but a browser.

    Trajectory files of buildings are put side by side day by day; they can't be mixed with anything else.

    out: report.html in the folder of the only run, or here, unless given. max_samples: trajectories of all runs
    together; the page says what is left out. Raises StorageError.
    """
    folders = [RunFolder(path) for path in runs]
    check_together(folders)
    path = _target(folders, None if out is None else Path(out))
    report = envelope(folders, live=False)
    report["runs"] = [folder.state(final=True) for folder in folders]
    counted = _Counted()
    aside = path.with_name(path.name + ".part")
    try:
        try:
            with open(aside, "w", encoding="ascii", newline="\n") as file:
                _write(file, folders, report, max_samples, counted)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return Written(path, path.stat().st_size, counted.taken, counted.total)
    except OSError as error:
        raise StorageError(
            f"{path}: the report can't be written: {error.strerror or error}; name another file with --out."
        ) from error


@dataclass
class _Counted:
    taken: int = 0
    total: int = 0


def _target(folders: list[RunFolder], out: Path | None) -> Path:
    if out is None:
        single = len(folders) == 1 and not folders[0].bare
        out = (folders[0].path if single else Path()) / "report.html"
    if out.is_dir():
        out = out / "report.html"
    try:
        if out.exists() and _MARK not in out.read_bytes()[:4096].decode("utf-8", "replace"):
            raise StorageError(f"{out}: is there and is no report, so it is left alone; name another file with --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error.strerror or error}; name another with --out.") from error
    return out


def _write(file: IO[str], folders: list[RunFolder], report: dict[str, Any], most: int, counted: _Counted) -> None:
    """The whole page, chunk by chunk, so that its size never stands in memory."""
    shares = _shares([sum(1 for _ in folder.samples()) for folder in folders], most)
    index: list[list[Any]] = []
    blocks: list[str] = []
    with _Spool() as spool:
        for number, (folder, share) in enumerate(zip(folders, shares, strict=True)):
            problems = Problems()
            choice = choose(folder.samples(problems), share)
            counted.total += choice.total
            told = report["runs"][number]["problems"] + problems.told()
            for place, (sample_file, part) in enumerate(choice.kept):
                packed = pack_file(sample_file, part)
                told += packed.problems
                counted.taken += len(packed.rows)
                index.append([number, packed.index()])
                for at, chunk in enumerate(packed.chunks):
                    spool.add(f"c{number}-{place}-{at}-texts", chunk.texts)
                    spool.add(f"c{number}-{place}-{at}-tokens", chunk.tokens)
            report["runs"][number]["problems"] = told[:200]
            report["runs"][number]["left_out"] = choice.sentence and (
                f"{choice.sentence}: whole steps, spread evenly, were kept. Write it with --max-samples {choice.total} "
                "for all of them, or open the run with sapwood view."
            )
        head, tail = html(report, live=False)
        file.write(head)
        blocks.append(_block("index", compressed(index)))
        file.writelines(blocks)
        file.writelines(spool.blocks())
        file.write(tail)


def _shares(files: list[int], most: int) -> list[int]:
    """Parts of `most` for the runs that have samples."""
    having = sum(1 for n in files if n)
    return [most // having if n else 0 for n in files] if having else [0 for _ in files]


class _Spool:
    """Blocks that wait for the page's head, which says what is in them; on disk, as they may be large."""

    def __enter__(self) -> _Spool:
        self._file = tempfile.TemporaryFile("w+", encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, content: bytes) -> None:
        """Keep a block."""
        self._file.write(_block(name, content))

    def blocks(self) -> Iterator[str]:
        """All of them."""
        self._file.seek(0)
        while part := self._file.read(2**20):
            yield part


def _block(name: str, content: bytes) -> str:
    return f'<script type="application/octet-stream" id="{name}">{base64.b64encode(content).decode("ascii")}</script>\n'


def compressed(data: Any) -> bytes:
    """Gzip of the JSON."""
    return gzip.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode("ascii"), 6, mtime=0)


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: ASCII, and without any character that HTML gives a meaning."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def envelope(folders: list[RunFolder], live: bool) -> dict[str, Any]:
    """What a page knows besides its runs."""
    return {
        "format": 1,
        "live": live,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "sapwood": version("sapwood") or "",
        "groups": GROUPS,
        "count": len(folders),
        "building": all(folder.building for folder in folders) and bool(folders),
        "runs": [],
    }


def policy(live: bool) -> str:
    """The Content-Security-Policy of a page."""
    connect = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src '{_hash(_script())}'; style-src '{_hash(_style())}'; img-src data:; {connect}"
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def html(report: dict[str, Any], live: bool) -> tuple[str, str]:
    """(what comes before the blocks of samples, what comes after)."""
    page = _asset("page.html")
    parts = {
        "policy": policy(live),
        "generator": _MARK,
        "style": f"<style>{_style()}</style>",
        "data": f'<script type="application/json" id="report">{embedded(report)}</script>',
        "script": f"<script>{_script()}</script>",
    }
    head, _, tail = page.partition("<!--blocks-->")
    return _filled(head, parts), _filled(tail, parts)


def _filled(text: str, parts: dict[str, str]) -> str:
    return re.sub(r"<!--(\w+)-->|\{\{(\w+)\}\}", lambda match: parts[match[1] or match[2]], text)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


@cache
def _style() -> str:
    return _asset("style.css")


@cache
def _script() -> str:
    """All modules in one script, each in a scope of its own; imports and exports become plain constants."""
    modules = "\n".join(_scoped(name, _asset(f"{name}.js")) for name in MODULES)
    return f'"use strict";\n(() => {{\n{modules}\n}})();\n'


def _scoped(name: str, module: str) -> str:
    exported = re.findall(r"^export (?:const|async function|function|class) ([\w$]+)", module, flags=re.MULTILINE)
    body = re.sub(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', r"const \1 = module_\2;", module, flags=re.MULTILINE)
    body = re.sub(r"^export ", "", body, flags=re.MULTILINE)
    return f"const module_{name} = (() => {{\n{body}\nreturn {{ {', '.join(exported)} }};\n}})();"


def _asset(name: str) -> str:
    return files("sapwood.report").joinpath("assets", name).read_text(encoding="ascii")
