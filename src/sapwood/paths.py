"""Where Sapwood keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Converted bundled models and prepared data: $SAPWOOD_CACHE, or the user's cache folder."""
    given = os.environ.get("SAPWOOD_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapwood"
    return Path(given).expanduser() if given else base
