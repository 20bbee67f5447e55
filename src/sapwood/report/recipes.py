"""A recipe as a flat list of options, to compare, and which of them differ from Sapwood's defaults.

Defaults are read from the sections' own models. Those of an algorithm's options stand in its class, which is read as
text: importing it would import torch, and a plugin that a foreign recipe names must never be run.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sapwood import sections

#: Options in the page, and characters of a value.
OPTIONS, LENGTH = 3000, 4000
_SECTIONS: dict[str, type[BaseModel]] = {
    "model": sections.ModelSection,
    "model.lora": sections.LoraSection,
    "critic": sections.CriticSection,
    "optim": sections.OptimSection,
    "eval": sections.EvalSection,
    "early_stopping": sections.EarlyStoppingSection,
    "checkpoint": sections.CheckpointSection,
    "guards": sections.GuardsSection,
    "samples": sections.SamplesSection,
}
_UNKNOWN = object()


def flatten(data: Any) -> list[list[str]]:
    """[dotted key, value as text] of every option, lists of plain values in one piece."""
    found: list[list[str]] = []
    for path, value in _leaves(data, (), frozenset()):
        if len(found) >= OPTIONS:
            found.append(["...", f"only the first {OPTIONS:,} options are shown"])
            break
        found.append([".".join(path)[:500], _shown(value)])
    return found


def options(recipe: Mapping[str, Any]) -> list[list[str | None]]:
    """[key, value, default] of every option; default is None where the value is the default, or where none is known."""
    defaults = _defaults(recipe)
    return [
        [key, value, defaults[key] if key in defaults and defaults[key] != value else None]
        for key, value in flatten(recipe)
    ]


def _leaves(data: Any, path: tuple[str, ...], above: frozenset[int]) -> Iterator[tuple[tuple[str, ...], Any]]:
    nested = isinstance(data, Mapping) or (isinstance(data, list) and any(isinstance(i, Mapping | list) for i in data))
    if not nested or not data or id(data) in above or len(path) > 30:
        yield path, data
        return
    items = data.items() if isinstance(data, Mapping) else enumerate(data)
    for key, value in items:
        yield from _leaves(value, (*path, str(key)), above | {id(data)})


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            text = "(nested in itself)"
    return text if len(text) <= LENGTH else f"{text[:LENGTH]}... ({len(text):,} characters)"


def _defaults(recipe: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for section, model in _SECTIONS.items():
        for key, info in model.model_fields.items():
            if not info.is_required():
                value = info.get_default(call_default_factory=True)
                if not isinstance(value, BaseModel):
                    found[f"{section}.{key}"] = _shown(list(value) if isinstance(value, tuple) else value)
    model, algorithm = recipe.get("model"), recipe.get("algorithm")
    lora = model.get("lora") if isinstance(model, Mapping) else None
    rank = lora.get("rank") if isinstance(lora, Mapping) else None
    if isinstance(rank, int):
        found["model.lora.alpha"] = _shown(2.0 * rank)  # it follows the rank
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else None
    if isinstance(name, str):
        found |= {f"algorithm.{key}": _shown(value) for key, value in algorithm_defaults(name).items()}
    return found


@cache
def algorithm_defaults(name: str) -> dict[str, Any]:
    """Defaults of a built-in algorithm's options that are plain values; {} for any other."""
    package = importlib.util.find_spec("sapwood.algorithms")
    if package is None or package.origin is None or not name.isidentifier():
        return {}
    folder = Path(package.origin).parent
    if name.startswith("_") or not (folder / f"{name}.py").is_file():
        return {}
    tree = _parsed(folder / f"{name}.py")
    plugin = next((_name(n.value) for n in tree.body if isinstance(n, ast.Assign) and _assigns(n, "PLUGIN")), None)
    return _class_defaults(folder, f"{name}.py", plugin, 0) if plugin else {}


def _class_defaults(folder: Path, file: str, name: str, depth: int) -> dict[str, Any]:
    """Of a class and, first, of its bases: in the same file, or imported from another of the package."""
    tree = _parsed(folder / file)
    found: dict[str, Any] = {}
    home = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if home is None:
        for node in tree.body:
            if not isinstance(node, ast.ImportFrom) or all(alias.name != name for alias in node.names):
                continue
            module = node.module or ""
            if module.startswith("sapwood.algorithms") and depth < 8:
                part = module.removeprefix("sapwood.algorithms").lstrip(".")
                return _class_defaults(folder, f"{part or '__init__'}.py", name, depth + 1)
        return {}
    for base in reversed(home.bases):
        if (base_name := _name(base)) and depth < 8:
            found |= _class_defaults(folder, file, base_name, depth + 1)
    for node in home.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            if ast.unparse(node.annotation).startswith("ClassVar"):
                continue
            value = _literal(node.value)
            if value is _UNKNOWN:
                found.pop(node.target.id, None)
            else:
                found[node.target.id] = list(value) if isinstance(value, tuple) else value
    return found


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])


def _name(node: ast.expr | None) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(_name(target) == name for target in node.targets)


def _literal(node: ast.expr) -> Any:
    """The value of a plain default, or of the `default` of a pydantic Field."""
    if isinstance(node, ast.Call) and _name(node.func) == "Field":
        given = [word.value for word in node.keywords if word.arg == "default"] or node.args[:1]
        return _literal(given[0]) if given else _UNKNOWN
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _UNKNOWN
