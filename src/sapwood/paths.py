"""Where Sapwood keeps what it can make again, and how a full disk is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: What the system says where a disk is full or a quota used up.
FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_dir() -> Path:
    """Converted bundled models and prepared data: $SAPWOOD_CACHE, or the user's cache folder."""
    given = os.environ.get("SAPWOOD_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapwood"
    return Path(given).expanduser() if given else base
