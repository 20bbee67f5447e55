"""Recipe files that are made to break their reader: each is refused by a sentence with its line, and nothing is run."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sapwood import cli
from sapwood.config import load_recipe
from sapwood.configfile import parse_value
from sapwood.errors import ConfigError, printable

BASE = """\
run: {dir: runs/x, steps: 10}
env: {name: prompts, items: [{prompt: hi}]}
rewards: [exact_match]
algorithm: grpo
"""


def sentence(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).removeprefix(str(path))


BOMB = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
HOSTILE = [
    (BOMB, " line 1: not valid YAML: its aliases unfold to far too many values."),
    ("env: &a\n  items: *a\n", " line 1: not valid YAML: a value holds itself."),
    ("x: " + "[" * 5000, ": not a recipe: values are nested more than 60 deep."),
    ("x: " + "[" * 90 + "]" * 90, " line 1: not valid YAML: values are nested more than 60 deep."),
    ("? [a, b]\n: c\n", " line 1: not valid YAML: a key must be a word."),
    ("a: 1\n{b: 1}: c\n", " line 2: not valid YAML: a key must be a word."),
    ("a: 1\nb: !!int x\n", " line 2: not valid YAML: 'x' can't be read as int."),
    ('a: !!int ""\n', " line 1: not valid YAML: '' can't be read as int."),
    ("a: !!bool maybe\n", " line 1: not valid YAML: 'maybe' can't be read as bool."),
    ("a: " + "9" * 5000, "can't be read as int."),
    ('a: "\\ud800"\n', "can't be read as text."),
    ("a: !!set {x, y}\n", "a recipe is plain data, and the tag 'tag:yaml.org,2002:set' asks for something else."),
    ('a: !!binary "/w=="\n', "a recipe is plain data, and the tag 'tag:yaml.org,2002:binary' asks for something else."),
    ("a: !!timestamp x\n", "a recipe is plain data"),
]


@pytest.mark.parametrize(("text", "expected"), HOSTILE, ids=[text[:20] for text, _ in HOSTILE])
def test_hostile_yaml_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in sentence(tmp_path / "r.yaml", text)


@pytest.mark.parametrize("tag", ["object/apply:os.system", "object/new:os.system", "name:os.system"])
def test_tags_run_nothing(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    told = sentence(tmp_path / "r.yaml", f'a: !!python/{tag} ["touch {canary}"]\n')
    assert "a recipe is plain data" in told
    assert not canary.exists()


def test_emoji_of_json_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE.replace("prompt: hi", 'prompt: "\\ud83d\\ude00"'))  # json.dumps writes an emoji so
    assert load_recipe(path).build_env().tasks("train", 1, 0)[0].prompt[0].content == "\U0001f600"


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    told = sentence(tmp_path / "r.yaml", BASE + "".join(f"k{i}: 1\n" for i in range(500))).split("\n")
    assert len(told) == 11
    assert told[-1] == "... and 490 more of this kind."


def test_long_keys_and_control_characters_are_not_echoed(tmp_path: Path) -> None:
    told = sentence(tmp_path / "r.yaml", BASE + f'"{"k" * 100_000}": 1\n"\\e[2J": 1\n')
    assert len(told) < 1000
    assert "\x1b" not in told


def test_a_number_that_python_does_not_write_out(tmp_path: Path) -> None:
    told = sentence(tmp_path / "r.yaml", BASE + f"optim: {{name: 0x{'f' * 5000}}}\n")
    assert told == " line 5: optim.name is a number of thousands of digits; it should be 'adamw' or 'adamw_8bit'."


OVERRIDES = [
    "rewards.\u00b2.name=env",  # a digit to str.isdigit, and none to int
    f"rewards.{'9' * 5000}.name=env",
    ".".join(["a"] * 3000) + "=1",
    "optim.eps=" + "[" * 5000,
    "optim.eps=&a [*a]",
    "optim.eps=!!int x",
    "optim.eps=" + "9" * 5000,
]


@pytest.mark.parametrize("text", OVERRIDES, ids=[text[:25] for text in OVERRIDES])
def test_hostile_overrides_are_one_short_sentence(tmp_path: Path, text: str) -> None:
    told = sentence(tmp_path / "r.yaml", BASE, text)
    assert told.startswith(f"override '{text[:40]}")
    assert len(told) < 400


def test_an_override_may_be_longer_than_a_file_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(BASE)
    words = "word " * 100
    assert cli.main(["train", "--dry-run", str(tmp_path / "r.yaml"), f'env.system="{words}"']) == 0
    assert words.strip()[:60] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "a\0b.yaml"])
def test_names_that_no_file_can_have(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main(["train", "--dry-run", name]) == 1
    assert "can't be read" in capsys.readouterr().err
    assert cli.main(["train", "--resume", name]) == 1
    assert "is no run folder" in capsys.readouterr().err


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")  # in a folder nobody writes to it, and reading it would never end
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a file that can be read"):
            load_recipe(path)


def test_a_shell_may_hand_a_recipe_over_by_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(BASE))
    writer.start()
    assert load_recipe(pipe).run.steps == 10
    writer.join()


def test_values_of_overrides_are_plain_data() -> None:
    assert parse_value("1e-4") == 1e-4
    assert parse_value("") is None
    assert parse_value("[a, {b: 2}]") == ["a", {"b": 2}]


def test_printable() -> None:
    assert printable("a\x1b[2J\u202eb\n") == "a\\x1b[2J\\u202eb\\n"
    assert printable("x" * 300) == "x" * 197 + "..."
