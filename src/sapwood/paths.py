"""Where Sapwood keeps what it can make again, and how a full disk is told."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

#: What the system says where a disk is full or a quota used up.
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when it is whole; what fails leaves all as it was. Raises OSError."""
    aside = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            aside.unlink(missing_ok=True)
        raise


def cache_dir() -> Path:
    """Converted bundled models and prepared data: $SAPWOOD_CACHE, or the user's cache folder."""
    given = os.environ.get("SAPWOOD_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapwood"
    return expanded(given) if given else base


def expanded(path: Path | str) -> Path:
    """With ~ as the home directory. Unlike Path's own, it leaves the home of nobody (~nobody) as it is."""
    return Path(os.path.expanduser(path))
