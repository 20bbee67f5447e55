"""What a stage's result follows from, as hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sapwood.run import writing


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    made = hashlib.sha256()
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        if file != path:
            made.update(f"{file.relative_to(path).as_posix()}\0".encode("utf-8", "surrogateescape"))
        with writing(file), file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                made.update(chunk)
    return made.hexdigest()


def digests(*paths: Path | str | None) -> list[str]:
    """Of those that are there; "" for the others."""
    return [digest(Path(path)) if path is not None and Path(path).exists() else "" for path in paths]
