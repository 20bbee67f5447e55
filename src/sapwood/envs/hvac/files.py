"""The JSON files of buildings: read with a sentence for all that is wrong with one, written aside and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sapwood.errors import DataError, StorageError

#: A larger file is refused before it is read: it would not fit in memory.
MAX_BYTES = 4 * 2**30


def load_json(path: Path, kind: str) -> dict[str, Any]:
    """The object in a JSON file of ours of the given kind. Raises DataError for anything else."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: not a {kind}: it is a folder or a device.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: {size:,} bytes are too many for a {kind}; split it by episodes.")
        found = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such {kind}.") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a {kind}: it is no UTF-8 text.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: not a {kind}, or cut short: no JSON at {place} ({error.msg}).") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not a {kind}: its JSON is nested too deeply or has a number too long.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a {kind}: it holds no JSON object.")
    return found


def replace(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file aside, to the disk, and rename it; what fails leaves what was there. Raises StorageError."""
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"{path}: can't be written: {error.strerror or error}; what was there before is as it was."
        ) from error
