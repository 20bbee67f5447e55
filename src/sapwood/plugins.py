"""Names to classes: "grpo" is the `PLUGIN` of sapwood/algorithms/grpo.py, "package.module:Class" anything else.

Adding a built-in is one file in the folder of its kind that sets `PLUGIN`; nothing needs registering. For rewards and
metrics, "file.py:function" is enough: the function becomes a class of its kind.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapwood.errors import ConfigError, DataError, SapwoodError, UnknownPlugin
from sapwood.paths import expanded

#: Characters of another program's words that a message repeats.
_SAID = 300
KINDS = {
    "algorithm": "sapwood.algorithms",
    "env": "sapwood.envs",
    "engine": "sapwood.engines",
    "reward": "sapwood.rewards",
    "metric": "sapwood.metrics",
    "tracker": "sapwood.trackers",
}
#: Where a plain function can stand for a class: module and name of what makes the class.
FUNCTIONS = {
    "reward": ("sapwood.rewards._function", "reward_class"),
    "metric": ("sapwood.metrics._function", "metric_class"),
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

    Accepts a built-in name, "package.module:Class" or "path/to/file.py:Class"; for a reward or a metric also a
    function in place of the class. Raises UnknownPlugin with the nearest known name, or ConfigError where the module
    is there but can't be imported, or lacks the name.
    """
    if ":" in name:
        return _load_reference(kind, name)
    if name not in known(kind):
        near = difflib.get_close_matches(name, known(kind), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        if name.endswith(".py"):
            hint = f"; name what is in the file: {name}:NAME."
        raise UnknownPlugin(f"unknown {kind} {name!r}{hint} Known: {', '.join(known(kind))}.")
    return importlib.import_module(f"{KINDS[kind]}.{name}").PLUGIN


def _load_reference(kind: str, reference: str) -> Any:
    module_name, _, attribute = reference.rpartition(":")
    if not module_name or not attribute.isidentifier():
        raise ConfigError(f"{kind} {reference!r}: write it as path/to/file.py:NAME or package.module:NAME.")
    if module_name.endswith(".py"):
        module = _import_file(kind, reference, expanded(module_name))
    else:
        module = _imported(kind, reference, lambda: importlib.import_module(module_name))
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"{kind} {reference!r}: {module_name} has no {attribute!r}{hint}")
    found = getattr(module, attribute)
    if kind in FUNCTIONS and inspect.isroutine(found):
        maker, name = FUNCTIONS[kind]
        return getattr(importlib.import_module(maker), name)(found)
    return found


def where_raised(error: BaseException, file: str) -> str | None:
    """ "file.py line 7": the innermost line of `file` that an exception passed; None where it passed none."""
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{_shown(file)} line {inside[-1].lineno}" if inside else None


def place_of(function: Callable[..., Any]) -> str:
    """ "file.py line 3": where a function is defined; its module where that can't be told."""
    code = getattr(function, "__code__", None)
    return f"{_shown(code.co_filename)} line {code.co_firstlineno}" if code else str(function.__module__)


def call(what: str, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The result of a user's function. Raises DataError with `what` and the line for whatever it raises."""
    try:
        return function(*args, **keywords)
    except SapwoodError:
        raise
    except (Exception, SystemExit) as error:  # the boundary to code that isn't ours
        code = getattr(function, "__code__", None)
        inner = traceback.extract_tb(error.__traceback__)[1:]  # below this very line
        line = where_raised(error, code.co_filename if code else inner[-1].filename) if inner else None
        place = f" at {line}; fix it there" if line else ", called as it was; check its parameters"
        raise DataError(f"{what} raised {_described(error)}{place}.") from error


def _described(error: BaseException) -> str:
    said = " ".join(str(error).split()).rstrip(".")
    said = said if len(said) <= _SAID else f"{said[:_SAID]} ..."
    return f"{type(error).__name__} ({said})" if said else type(error).__name__


def _shown(file: str) -> str:
    """A path from here where the file lies below, as it is otherwise."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _imported(kind: str, reference: str, load: Callable[[], Any]) -> Any:
    """What `load` imports; whatever the module raises is told as one sentence."""
    try:
        return load()
    except ModuleNotFoundError as error:
        raise UnknownPlugin(f"{kind} {reference!r}: no module {error.name!r}; is it installed?") from error
    except SyntaxError as error:
        line = f" line {error.lineno}" if error.lineno else ""
        place = _shown(error.filename) if error.filename else reference.rpartition(":")[0]
        raise ConfigError(f"{kind} {reference!r}: {place}{line} is not Python: {error.msg}.") from error
    except SapwoodError:
        raise
    except (Exception, SystemExit) as error:  # the boundary to code that isn't ours
        line = where_raised(error, str(expanded(reference.rpartition(":")[0]).resolve()))
        place = f" at {line}" if line else ""
        raise ConfigError(f"{kind} {reference!r}: importing it raised {_described(error)}{place}.") from error


def _import_file(kind: str, reference: str, path: Path) -> Any:
    if not path.is_file():
        beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [file.name for file in beside if file.is_file()], n=1)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else f"paths begin at {Path.cwd()}."
        raise UnknownPlugin(f"{kind} {reference!r}: there is no file {str(path)!r}; {hint}")
    path = path.resolve()
    name = f"sapwood_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _imported(kind, reference, lambda: loader.exec_module(module))
    except SapwoodError:
        del sys.modules[name]
        raise
    return module
