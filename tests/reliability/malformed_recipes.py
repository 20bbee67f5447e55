"""Recipes that can't be right: as files, as overlays, as overrides, and such whose numbers only a run would refuse."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tests.reliability.fuzz import Case, Way
from tests.reliability.mutate import MARK, YAML_VALUES, at, damage, encodings, misspelt, no_file, places, put, remove

ROOT = Path(__file__).resolve().parents[2]
FILE = "recipe.yaml"
_folder = Path()


def prepare(folder: Path) -> None:
    """Import what a dry run needs, and make the tiny model of the recipes that are run."""
    global _folder
    _folder = folder
    import_plugins()


def import_plugins() -> None:
    """All that a recipe can name, once and not in every child."""
    import sapwood.algorithms
    import sapwood.cli
    import sapwood.progress  # noqa: F401
    from sapwood import plugins

    for kind in plugins.KINDS:
        for name in plugins.known(kind):
            plugins.load(kind, name)


def cli(*arguments: str) -> Callable[[], int]:
    """`sapwood` with these arguments."""

    def run() -> int:
        from sapwood.cli import main

        return main(list(arguments))

    return run


def _read(text: str) -> Any:
    """As a recipe is read: 1e-4 is a number."""
    from sapwood.configfile import parse_value

    return parse_value(text)


@lru_cache(1)
def texts() -> tuple[str, ...]:
    """Every shipped recipe as it is, and one of every algorithm and kind of run."""
    from tests.reliability.runs import RUNS, recipe

    files = [path.read_text("utf-8") for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
    files = [text.replace("examples/", f"{ROOT}/examples/") for text in files]
    whole = [
        text for text in files if {"run", "algorithm"} <= _read(text).keys() and {"env", "data"} & _read(text).keys()
    ]
    data = {name: Path(f"{name}.jsonl") for name in ("sft", "pairs", "kto", "recordings")}
    made = [recipe(name, Path("tiny"), data, Path("run")) for name in RUNS]
    return (*whole, *(yaml.safe_dump(found, sort_keys=False) for found in made))


@lru_cache(1)
def resolved() -> tuple[str, ...]:
    """The same with every default written out, as a run folder holds them."""
    from sapwood.config import dump_recipe, parse_recipe

    return tuple(dump_recipe(parse_recipe(_read(text))) for text in texts())


def _any(rng: random.Random) -> str:
    return rng.choice(rng.choice((texts(), resolved())))


def _dry(*files: str) -> Callable[[], int]:
    return cli("train", "--dry-run", *files)


def _spliced(data: Any, raw: str) -> str:
    """YAML with `raw` where the mark is."""
    return yaml.safe_dump(data, sort_keys=False, width=10**6).replace(f"'{MARK}'", raw, 1)


def _key(place: tuple[str | int, ...]) -> str:
    return next((str(key) for key in reversed(place) if isinstance(key, str)), "")


def wrong_value(rng: random.Random, folder: Path) -> Case:
    """A value that no option means, anywhere."""
    data = _read(_any(rng))
    place = rng.choice(list(places(data)))
    put(data, place, MARK)
    (folder / FILE).write_bytes(_spliced(data, rng.choice(YAML_VALUES)).encode("utf-8", "surrogatepass"))
    return Case(_dry(FILE), (FILE, _key(place)))


def lost_key(rng: random.Random, folder: Path) -> Case:
    """A key or an entry that isn't there."""
    data = _read(_any(rng))
    place = rng.choice(list(places(data)))
    remove(data, place)
    (folder / FILE).write_text(yaml.safe_dump(data, sort_keys=False))
    return Case(_dry(FILE), (FILE, _key(place)))


def misspelt_key(rng: random.Random, folder: Path) -> Case:
    """A key with a letter that is wrong."""
    data = _read(_any(rng))
    place = rng.choice([place for place in places(data) if isinstance(place[-1], str)])
    value = at(data, place)
    remove(data, place)
    put(data, (*place[:-1], misspelt(str(place[-1]), rng)), value)
    (folder / FILE).write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    return Case(_dry(FILE), (FILE, str(place[-1])))


_KEYS = (
    *('""', '" "', "1", "1.5", "null", "true", "[a]", "{a: b}", "? [a, b]", "<<", "=", '"\\0"', '"\\ud800"', "x"),
    *("name", "self", "model_config", "__class__", '"?"', '"??"', '"run?"', '"x.y"', '"steps?"', "!!binary aGk="),
    *('"' + "k" * 100_000 + '"', "!!int x", "2024-01-01", "&a b", "*a", '"\\e[2J"', '"\\u202e"', ".nan"),
)


def strange_key(rng: random.Random, folder: Path) -> Case:
    """A key that is none, in any mapping."""
    data = _read(_any(rng))
    mappings = [(), *(place for place in places(data) if isinstance(at(data, place), dict))]
    where = rng.choice(mappings)
    (at(data, where) if where else data)[MARK] = rng.choice((1, None, "x", [], {}, {"a": 1}))
    key = rng.choice(_KEYS)
    (folder / FILE).write_text(_spliced(data, key))
    return Case(_dry(FILE), (FILE,))


def twice(rng: random.Random, folder: Path) -> Case:
    """A line, or a stretch of lines, that is there twice or at another place."""
    lines = _any(rng).splitlines(keepends=True)
    first = rng.randrange(len(lines))
    piece = lines[first : first + rng.choice((1, 1, 2, 8))]
    if rng.random() < 0.3:
        del lines[first : first + len(piece)]
    to = rng.randrange(len(lines) + 1)
    (folder / FILE).write_text("".join([*lines[:to], *piece, *lines[to:]]))
    return Case(_dry(FILE), (FILE,))


def damaged(rng: random.Random, folder: Path) -> Case:
    """Bytes flipped, lost, repeated or put in."""
    (folder / FILE).write_bytes(damage(_any(rng).encode(), rng))
    return Case(_dry(FILE), (FILE,))


def encoded(rng: random.Random, folder: Path) -> Case:
    """In another encoding, or another kind of file."""
    found = encodings(_any(rng))
    (folder / FILE).write_bytes(found[rng.choice(list(found))])
    return Case(_dry(FILE), (FILE,))


def _bomb(width: int, depth: int, mapping: bool) -> str:
    """Aliases of aliases: width ** depth values when written out."""
    rows = ["a0: &a0 x"]
    for level in range(1, depth):
        items = [f"k{i}: *a{level - 1}" if mapping else f"*a{level - 1}" for i in range(width)]
        inner = ", ".join(items)
        rows.append(f"a{level}: &a{level} " + (f"{{{inner}}}" if mapping else f"[{inner}]"))
    return "\n".join(rows) + "\n"


def tricks(rng: random.Random, folder: Path) -> Case:
    """What YAML can do beyond data: bombs of aliases, deep nesting, tags, directives, documents, merges."""
    text = _any(rng)
    depth = rng.choice((30, 300, 3000, 50_000))
    chosen = rng.choice(
        (
            text + _bomb(9, rng.choice((3, 6, 9, 12)), mapping=False),
            text + _bomb(9, rng.choice((3, 6, 9, 12)), mapping=True),
            _bomb(2, 40, mapping=False) + text,
            text + "x: " + "[" * depth + "]" * depth + "\n",
            text + "".join("  " * level + f"k{level}:\n" for level in range(min(depth, 1500))),
            "- " * depth + "x\n",
            "? " * min(depth, 3000) + "x\n",
            text + "x: &a\n  <<: *a\n",
            "base: &b {run: {steps: 3}}\n<<: *b\n" + text,
            text + "\n<<: [1, 2]\n",
            text + "\n<<: 3\n",
            "--- \n" + text + "\n---\n" + text,
            "%YAML 9.9\n---\n" + text,
            "%TAG ! tag:example.com,2000:\n---\n!x\n" + text,
            '!!python/object/apply:os.system ["touch canary"]\n',
            'a: !!python/object/apply:subprocess.check_output [["touch", "canary"]]\n' + text,
            "!!python/object/new:type {args: [z, !!python/tuple [], {extend: !!python/name:exec }]}\n",
            "!!set {run, model}\n",
            "[run, model]\n",
            "just words\n",
            "3\n",
            "run: &x {dir: r, steps: *x}\n" + text,
            text + "# " + "c" * 2_000_000 + "\n",
            text + "".join(f"k{i}: {i}\n" for i in range(20_000)),
            text + "system: |\n" + "  line\n" * 50_000,
            text.replace(": ", ":"),
            text.replace("\n", "\n ", 3),
            text.replace("  ", " ", 5),
        )
    )
    (folder / FILE).write_text(chosen)
    return Case(_dry(FILE), (FILE,))


def soft_keys(rng: random.Random, folder: Path) -> Case:
    """An overlay of keys that are to be set only where the recipe has them, and that may be set nowhere."""
    text = _any(rng)
    (folder / FILE).write_text(text)
    data = _read(_any(rng))
    lines = []
    for _ in range(rng.randint(1, 4)):
        place = [str(key) for key in rng.choice(list(places(data)))]
        index = rng.randrange(len(place))
        place[index] = (misspelt(place[index], rng) if rng.random() < 0.3 else place[index]) + "?"
        value = rng.choice(YAML_VALUES) if rng.random() < 0.6 else "3"
        lines.append(" ".join(f'{{"{key}":' for key in place[1:]) + f" {value}" + "}" * len(place[1:]))
        lines[-1] = f'"{place[0]}": {lines[-1]}'
    (folder / "overlay.yaml").write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    return Case(_dry(FILE, "overlay.yaml"), (FILE, "overlay.yaml"))


def overlays(rng: random.Random, folder: Path) -> Case:
    """Recipes on top of each other that weren't made for it, one of them damaged."""
    names = []
    for number in range(rng.randint(2, 4)):
        text = _any(rng)
        names.append(f"recipe{number}.yaml")
        (folder / names[-1]).write_bytes(damage(text.encode(), rng) if rng.random() < 0.3 else text.encode())
    return Case(_dry(*names), ("recipe",))


_FORMS = (
    *("={v}", "=", "{k}", "{k}=", ".{k}={v}", "{k}.={v}", "{k}..x={v}", " {k} = {v} ", "{k}=={v}", "{k}.x={v}"),
    *("{k}.0={v}", "{k}.-1={v}", "{k}.\u00b2={v}", "{k}.\u0661={v}", "{k}." + "9" * 5000 + "={v}", "{k}?={v}"),
    *("rewards.0.name={v}", "rewards.1.weight={v}", "rewards.7.name={v}", "rewards.x={v}", "rewards={v}"),
    *("rewards.\u00b2.name={v}", "rewards." + "9" * 5000 + ".name={v}", "trackers.0={v}", "trackers.5.name={v}"),
    *("trackers.\u0663.name={v}", "a." * 3000 + "b={v}", "run.dir.x={v}", "data.0={v}", "data.sources.0.path={v}"),
    *("data.sources.9.path={v}", "eval.metrics.0.name={v}", "eval.metrics.0={v}", "guards.limits.x={v}", "name={v}"),
)


def override(rng: random.Random, folder: Path) -> Case:
    """Overrides of every form, with any value."""
    text = _any(rng)
    (folder / FILE).write_text(text)
    data = _read(rng.choice(resolved()))
    given = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = ".".join(map(str, rng.choice(list(places(data)))))
        form = "{k}={v}" if rng.random() < 0.6 else rng.choice(_FORMS)
        value = rng.choice(YAML_VALUES).replace("\n", " ")
        given.append(form.replace("{k}", place).replace("{v}", value))
    return Case(_dry(FILE, *given), ("override", FILE, "usage:", *(item[:20] for item in given)))


def not_files(rng: random.Random, folder: Path) -> Case:
    """Names that lead to no file, or to something else than one."""
    path = folder / FILE
    path.write_text(rng.choice(texts()))
    name = FILE
    match rng.randrange(9):
        case 0:
            with socket.socket(socket.AF_UNIX) as server:
                path.unlink()
                where = os.getcwd()
                os.chdir(folder)  # a socket's name is short
                server.bind(FILE)
                os.chdir(where)
        case 1:
            name = "x" * 300 + ".yaml"
        case 2:
            name = "recipe.yaml/../recipe.yaml/x"
        case 3:
            name = rng.choice(
                ("", ".", "/", "/dev/null", "/dev/stdin", "~nobodyhere/x.yaml", "a\nb.yaml", "-", "\u202e")
            )
        case 4:
            (folder / "run").mkdir()
            no_file(folder / "run" / FILE, rng)
            name = "run"
        case _:
            no_file(path, rng, pipe=False)
    arguments = ["train", "--dry-run", "--", name] if name.startswith("-") else ["train", "--dry-run", name]
    return Case(cli(*arguments), (FILE, name, "recipe"))


_OPTIONS = (
    ("--device", "{v}"),
    ("--algorithm", "{v}"),
    ("--resume", "{v}"),
    ("--resume",),
    ("--steps", "3"),
    ("--json", "--json"),
    ("--dry-run=1",),
    ("--plan", "--dry-run"),
    ("--", "--device"),
    ("x" * 300 + "=1",),
    ('env.system="' + "word " * 100 + '"',),
    ("engine.stop=" + "[x, " * 200,),
)
_WORDS = (
    *("", " ", "x", "-1", "cuda:99", "cuda:\u0661", "grpo", "Grpo", "gpro", "os:system", "9" * 5000, "x" * 300, "."),
    *("recipe.yaml", "a=b", "/", "~nobodyhere", "{", "!!int x", "\ud800", "\x1b[2J", "*", "nan", "null", "[]"),
)


def options(rng: random.Random, folder: Path) -> Case:
    """Options of commands that take a recipe, with words that mean nothing."""
    (folder / FILE).write_text(rng.choice(texts()))
    given = [part.replace("{v}", rng.choice(_WORDS)) for part in rng.choice(_OPTIONS)]
    names = (FILE, "recipe", "usage:", "run", "--", "override", *(part[:20] for part in given))
    choice = rng.randrange(6)
    if choice == 0:
        count = rng.choice(_WORDS)
        arguments = ["data", "tasks", "--count", count, "--out", "tasks.jsonl", FILE]
        return Case(cli(*arguments), (*names, "env", "count", "tasks"))
    if choice == 1:
        kinds = (("list", rng.choice(_WORDS)), (rng.choice(_WORDS),), ("data", rng.choice(_WORDS)), ("train",))
        return Case(cli(*rng.choice(kinds)), ())
    return Case(cli("train", "--dry-run", *given, FILE), names)


# --- recipes that are run ----------------------------------------------------------------------------------------

_NUMBERS = (
    *("1e308", "1e300", "1e-300", "5e-324", "1e12", "1e-12", "2147483647", "2147483648", "4294967296"),
    *(
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
        "1" + "0" * 30,
        "1" + "0" * 400,
        ".inf",
        "0",
    ),
)
_PATHS = ('"\\0"', '"a\\0b"', "x", '""', '"' + "x" * 300 + '"', "/dev/zero", "/dev/null", "~nobodyhere/x", ".", "/")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def model_numbers(rng: random.Random, folder: Path) -> Case:
    """One step of a tiny model, with a number that is too large or too small, which only the run would find out."""
    return _run(rng, folder, _is_number, _NUMBERS)


def model_texts(rng: random.Random, folder: Path) -> Case:
    """One step of a tiny model, with a path or a name that leads nowhere."""
    names = ("path", "name", "init_from", "cache_dir", "chat_template", "metric", "plateau_metric", "best", "system")
    return _run(rng, folder, lambda value: value is None or isinstance(value, str), _PATHS, names)


def _run(
    rng: random.Random,
    folder: Path,
    suits: Callable[[Any], bool],
    values: tuple[str, ...],
    names: tuple[str, ...] | None = None,
) -> Case:
    from tests.reliability.runs import RUNS, recipe

    model, data = tiny()
    made = recipe(rng.choice(list(RUNS)), model, data, Path("run"), steps=2)
    from sapwood.config import dump_recipe, parse_recipe

    found = _read(dump_recipe(parse_recipe({**made, "trackers": []})))
    wanted = [place for place in places(found) if suits(at(found, place)) and (names is None or place[-1] in names)]
    place = rng.choice([place for place in wanted if place not in (("run", "steps"), ("run", "dir"))])
    put(found, place, MARK)
    (folder / FILE).write_text(_spliced(found, rng.choice(values)))
    return Case(cli("train", FILE), (_key(place), FILE, ".".join(map(str, place)), "run"))


@lru_cache(1)
def tiny() -> tuple[Path, dict[str, Path]]:
    """A model and data, and the modules that a run imports."""
    import sapwood.train  # noqa: F401
    from tests.learning import save_tiny_model
    from tests.reliability.runs import write_data

    model = save_tiny_model(_folder / "tiny")
    return model, write_data(_folder, model)


WAYS: dict[str, Way] = {
    "wrong value": wrong_value,
    "override": override,
    "damaged": damaged,
    "strange key": strange_key,
    "tricks": tricks,
    "misspelt key": misspelt_key,
    "lost key": lost_key,
    "soft keys": soft_keys,
    "encoded": encoded,
    "lines twice": twice,
    "overlays": overlays,
    "options": options,
    "not files": not_files,
    "model numbers": model_numbers,
    "model texts": model_texts,
}
