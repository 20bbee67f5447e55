"""Every recipe that ships parses, with every overlay, and repeats itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapwood.config import dump_recipe, load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
OVERLAYS = sorted((FOLDER / "scenarios").glob("*.yaml"))


def test_there_are_recipes_and_overlays() -> None:
    assert {"hvac_demo.yaml", "grpo_qwen3b.yaml"} <= {path.name for path in RECIPES}
    assert {"8gb.yaml", "debug.yaml"} <= {path.name for path in OVERLAYS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_repeats_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    recipe.check_trainable()
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.build_env().tasks("train", 1, 0)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_overlay_fits_every_recipe(path: Path, overlay: Path) -> None:
    assert load_recipe([path, overlay]) != load_recipe(path)


@pytest.mark.parametrize("path", [*RECIPES, *OVERLAYS], ids=lambda path: path.stem)
def test_the_first_line_says_what_it_is_for(path: Path) -> None:
    first = path.read_text().split("\n")[0]
    assert first.startswith("# ")
    assert len(first) > 20
