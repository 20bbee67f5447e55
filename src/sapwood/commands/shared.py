"""What several commands share: recipes on the command line, progress, numbers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sapwood.config import Recipe
    from sapwood.progress import Progress


def recipe_arguments(made: argparse.ArgumentParser, count: str = "+") -> None:
    """RECIPE and KEY=VALUE arguments, and --device."""
    made.add_argument(
        "recipe",
        nargs=count,
        metavar="RECIPE|KEY=VALUE",
        help="a recipe, overlays on top of it, and overrides such as optim.learning_rate=3e-5",
    )
    made.add_argument("--device", metavar="NAME", help="short for model.device=...: auto, cpu, cuda or cuda:1")


def split(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(recipe files, overrides) of the command line: what names a file is a file, what holds an `=` an override."""
    files = [item for item in arguments.recipe if "=" not in item or os.path.exists(item)]  # False for what is too long
    overrides = [item for item in arguments.recipe if item not in files]
    if arguments.device:
        overrides.append(f"model.device={arguments.device}")
    return files, overrides


def load(arguments: argparse.Namespace, extra: Iterable[str] = ()) -> Recipe:
    """The recipe of the command line."""
    from sapwood.config import load_recipe

    files, overrides = split(arguments)
    return load_recipe(files, [*overrides, *extra])


def show_progress(json_lines: bool = False) -> Progress:
    """Progress on the terminal, with third-party chatter silenced."""
    from sapwood.progress import Progress, quiet

    quiet()
    return Progress(json_lines=json_lines)


def positive(text: str) -> int:
    """An argument that counts from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
