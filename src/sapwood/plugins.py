"""Names to classes: "grpo" is the `PLUGIN` of sapwood/algorithms/grpo.py, "package.module:Class" anything else.

Adding a built-in is one file in the folder of its kind that sets `PLUGIN`; nothing needs registering.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import Any

from sapwood.errors import ConfigError, UnknownPlugin

KINDS = {
    "algorithm": "sapwood.algorithms",
    "env": "sapwood.envs",
    "engine": "sapwood.engines",
    "reward": "sapwood.rewards",
    "metric": "sapwood.metrics",
}


def known(kind: str) -> list[str]:
    """Names of the built-in plugins of a kind, found without importing them."""
    spec = importlib.util.find_spec(KINDS[kind])
    assert spec is not None
    names = [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)]
    # `check` is the contract test of its kind, not a plugin.
    return sorted(name for name in names if not name.startswith("_") and name != "check")


def load(kind: str, name: str) -> Any:
    """The class behind a plugin name.

    Accepts a built-in name, "package.module:Class" or "path/to/file.py:Class". Raises UnknownPlugin with the
    nearest known name, or ConfigError where the module is there but the class is not.
    """
    if ":" in name:
        return _load_reference(kind, name)
    if name not in known(kind):
        near = difflib.get_close_matches(name, known(kind), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownPlugin(f"unknown {kind} {name!r}{hint} Known: {', '.join(known(kind))}.")
    return importlib.import_module(f"{KINDS[kind]}.{name}").PLUGIN


def _load_reference(kind: str, reference: str) -> Any:
    module_name, _, attribute = reference.rpartition(":")
    if module_name.endswith(".py"):
        module = _import_file(kind, Path(module_name))
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UnknownPlugin(f"{kind} {reference!r}: no module {error.name!r}; is it installed?") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{kind} {reference!r}: {module_name} has no {attribute!r}.")
    return getattr(module, attribute)


def _import_file(kind: str, path: Path) -> Any:
    if not path.is_file():
        raise UnknownPlugin(f"{kind}: no file {str(path)!r}.")
    name = f"sapwood_plugin_{path.stem}_{abs(hash(path.resolve())):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
