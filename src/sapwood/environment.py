"""Facts about where a run happens: versions, hardware, commit. Gathered without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Packages whose version can change a result.
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "gymnasium",
    "numpy",
    "peft",
    "pydantic",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
)


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """JSON-serialisable facts for environment.json. Nothing that names a person or a host."""
    return {
        "sapwood": version("sapwood"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "git": git_commit(Path(__file__).parent),
        "command": sys.argv[1:],
    }


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or its control group's limit if that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name)
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds `folder`, and whether files differ from it; None outside of git."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                [git, "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package below someone else's repository is no checkout of this one.
    if ask("ls-files", "--error-unmatch", "errors.py") is None:
        return None
    return {"commit": ask("rev-parse", "HEAD"), "modified": bool(ask("status", "--porcelain"))}
