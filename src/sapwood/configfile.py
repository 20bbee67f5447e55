"""Recipe files: YAML read with the line of every key, merged left to right, and errors turned into sentences.

Merging: mappings merge key by key, anything else (lists too) replaces. Naming another plugin in `env`,
`algorithm`, `engine` or an entry of `rewards` or `trackers` drops the options of the earlier one, because they belong
to it; the sampling options of `engine` and the weight of a reward mean the same for all and stay.

Soft keys: an overlay that ends a key of a section, or a section, with "?" sets it only where the recipe has it
(`group_size?: 4`, `engine?: {max_new_tokens: 64}`), so that one overlay fits recipes of every algorithm. They are
carried along beside the data and applied by `settle`, once it is known what the recipe names.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sapwood.engines import Sampling
from sapwood.errors import ConfigError, printable

KeyPath = tuple[str | int, ...]
SOFT = "?"

#: A recipe beyond these is none: bytes of the file, values below each other, values that aliases repeat.
_LARGEST, _DEEPEST, _MOST_ALIASED = 16 << 20, 60, 10_000
_TOO_DEEP = f"values are nested more than {_DEEPEST} deep"
#: Sentences about one recipe; further ones are counted. Characters of a key that are looked at.
_SHOWN, _LONGEST_KEY = 10, 100

#: Sections that are the options of a named plugin, with the keys that outlive a change of the name.
PLUGIN_SECTIONS: dict[str, frozenset[str]] = {
    "env": frozenset(),
    "algorithm": frozenset(),
    "engine": frozenset(Sampling.model_fields),
    "rewards": frozenset({"weight"}),
    "trackers": frozenset(),
}
#: Those of them that are a list of entries, each the options of a plugin.
PLUGIN_LISTS = ("rewards", "trackers")
DEFAULT_NAMES = {"engine": "local"}
#: Lists that an override may index before any file has set them.
DEFAULT_LISTS: dict[str, list[Any]] = {"rewards": [{"name": "env"}], "trackers": [{"name": "tensorboard"}]}


@dataclass(frozen=True)
class Soft:
    """A value that is set only where the recipe has every key in `gates`: those that were written with a "?"."""

    path: KeyPath
    value: Any
    gates: tuple[KeyPath, ...]
    place: str


@dataclass(frozen=True)
class Source:
    """A recipe as plain data. places: where each key was last set, e.g. "recipes/x.yaml line 12"."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    label: str = "recipe"
    soft: tuple[Soft, ...] = ()

    def place(self, path: KeyPath) -> str:
        """Where `path`, or else the nearest key above it, was set; or a key below, as an override sets one alone."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return next((place for key, place in self.places.items() if key[: len(path)] == path), self.label)


_SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants a dot) and dates as text, and builds plain data only."""

    def construct_scalar(self, node: Any) -> Any:
        """As the base class, which leaves a pair of surrogates (an emoji in JSON) as two halves."""
        text = super().construct_scalar(node)
        if not isinstance(text, str) or _SURROGATE.search(text) is None:
            return text
        return text.encode("utf-16", "surrogatepass").decode("utf-16")

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """As the base class; what a tag can't make of a text is an error with a line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            kind = str(node.tag).rpartition(":")[2]
            said = f"{_show(node.value)} can't be read as {'text' if kind == 'str' else kind}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from error


def _refuse_tag(loader: Any, node: Any) -> Any:
    said = f"a recipe is plain data, and the tag {printable(str(node.tag))!r} asks for something else"
    raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)


#: Sets, bytes and the like fit no option.
_PLAIN = {None, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))}
_Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN}
_Loader.yaml_constructors[None] = _refuse_tag
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """The YAML value of an override. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _locate(node, (), "", {}, frozenset(), _Aliases())
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError(_TOO_DEEP) from error
    finally:
        loader.dispose()


def read(path: Path) -> Source:
    """Read one recipe file; a run folder stands for its recipe.yaml. Raises ConfigError."""
    try:
        named = path
        path = path / "recipe.yaml" if path.is_dir() else path
        if path.exists() and not path.is_file() and not (path == named and path.is_fifo()):  # a shell's <(...) is one
            raise ConfigError(f"{path}: not a file that can be read; a recipe is a YAML file.")
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path}: too large for a recipe; put data in a file of its own and name that.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such recipe{_nearest_file(path)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (UTF-8); a recipe is YAML.") from error
    except (OSError, ValueError) as error:  # the latter where the name holds a NUL
        said = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{printable(str(path))}: can't be read: {said}.") from error
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[KeyPath, str] = {}
        _locate(node, (), str(path), places, frozenset(), _Aliases())
        data = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = error.problem or error.context
        hint = '; within braces a soft key wants quotes: {"key?": 1}' if "got '?'" in str(problem) else ""
        raise ConfigError(f"{path} line {line}: not valid YAML: {problem}{hint}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path} line {line}: not valid YAML: the character U+{int(error.character):04X} can't stand here."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a recipe: {_TOO_DEEP}.") from error
    finally:
        if loader is not None:
            loader.dispose()
    if data is None:
        raise ConfigError(f"{path}: the recipe is empty; it needs at least run, algorithm, and env or data.")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (run:, model: ...), not {_show(data)}.")
    return source_of(data, places, str(path))


def source_of(data: Mapping[str, Any], places: Mapping[KeyPath, str] | None = None, label: str = "recipe") -> Source:
    """A recipe's plain data with shorthands written out and soft keys set aside."""
    found = Source({}, dict(places or {}), label)
    hard: dict[str, Any] = {}
    soft: list[Soft] = []

    def set_aside(written: KeyPath, value: Any) -> None:
        path = tuple(str(part).removesuffix(SOFT) for part in written)
        gates = tuple(path[: index + 1] for index, part in enumerate(written) if _is_soft(part))
        tree = normalise(nest(path, value))
        soft.extend(Soft(leaf, value, gates, found.place(written)) for leaf, value in _leaves(tree, ()))

    for key, value in data.items():
        if isinstance(value, Mapping) and any(map(_is_soft, value)):
            for name in filter(_is_soft, value):
                set_aside((key, name), value[name])
            value = {name: below for name, below in value.items() if not _is_soft(name)}
            if not value:
                continue
        if _is_soft(key):
            set_aside((key,), value)
        else:
            hard[key] = value
    kept = {path: place for path, place in found.places.items() if not any(map(_is_soft, path[:2]))}
    return Source(normalise(hard), kept, label, tuple(soft))


def _is_soft(key: Any) -> bool:
    return isinstance(key, str) and key.endswith(SOFT)


def _leaves(data: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Values with their paths; a name comes first, as the other keys beside it are that plugin's."""
    if not (isinstance(data, Mapping) and data):
        yield path, data
        return
    for key in sorted(data, key=lambda key: key != "name"):
        yield from _leaves(data[key], (*path, key))


def nest(path: KeyPath, value: Any) -> Any:
    """Mappings in which `value` sits at `path`."""
    for part in reversed(path):
        value = {part: value}
    return value


def settle(source: Source, has: Callable[[KeyPath], bool | None]) -> Source:
    """`source` with its soft keys set where `has` is true of all their gates, and dropped where it is false of one.

    has: whether the recipe has the section or key; None where that isn't known yet, which leaves the soft key as it is.
    """
    data, places, waiting = source.data, dict(source.places), []
    for soft in source.soft:
        answers = [has(gate) for gate in soft.gates]
        if False in answers:
            continue
        if None in answers:
            waiting.append(soft)
            continue
        data = _merge(data, nest(soft.path, soft.value), ())
        places[soft.path] = soft.place
    return Source(data, places, source.label, tuple(waiting))


def _decides(data: Any, path: KeyPath) -> bool:
    """Whether `data` sets `path`, or something other than a mapping above it."""
    for part in path:
        if not isinstance(data, Mapping):
            return True
        if part not in data:
            return False
        data = data[part]
    return True


@dataclass
class _Aliases:
    """Nodes that were seen, and how often one came again."""

    seen: set[int] = field(default_factory=set)
    again: int = 0


def _locate(
    node: yaml.Node | None,
    path: KeyPath,
    file: str,
    places: dict[KeyPath, str],
    above: frozenset[int],
    aliases: _Aliases,
) -> None:
    """Record the line of every key and list entry; refuse a key given twice, as YAML would keep the last.

    A value within itself, and aliases that unfold to more than a recipe holds, are refused too.
    """
    if node is None:
        return
    aliases.again += id(node) in aliases.seen
    aliases.seen.add(id(node))
    if id(node) in above or aliases.again > _MOST_ALIASED or len(path) > _DEEPEST:
        problem = "a value holds itself" if id(node) in above else "its aliases unfold to far too many values"
        problem = _TOO_DEEP if len(path) > _DEEPEST else problem
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            line, bare = key.start_mark.line + 1, key.value.removesuffix(SOFT) if len(path) < 2 else key.value
            if bare in seen and bare != "<<":
                name, earlier = dotted((*path, bare)), seen[bare]
                raise ConfigError(f"{file} line {line}: {name} was already set on line {earlier}; keep one.")
            seen[bare] = line
            places[(*path, key.value)] = f"{file} line {line}"
            _locate(value, (*path, key.value), file, places, above, aliases)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, index)] = f"{file} line {item.start_mark.line + 1}"
            _locate(item, (*path, index), file, places, above, aliases)


def normalise(data: Mapping[str, Any]) -> dict[str, Any]:
    """Write out shorthands: `algorithm: grpo` is `algorithm: {name: grpo}`, and so for the other plugins."""
    result = {str(key): value for key, value in data.items()}
    for section in PLUGIN_SECTIONS:
        value = result.get(section)
        if section in PLUGIN_LISTS and isinstance(value, list | tuple):
            result[section] = [{"name": item} if isinstance(item, str) else item for item in value]
        elif section not in PLUGIN_LISTS and isinstance(value, str):
            result[section] = {"name": value}
    if isinstance(result.get("data"), str | list | tuple):  # a mapping, so that overlays can add to it
        files = [result["data"]] if isinstance(result["data"], str) else result["data"]
        result["data"] = {"sources": [{"path": item} if isinstance(item, str) else item for item in files]}
    evaluation = result.get("eval")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("metrics"), list | tuple):
        named = [{"name": item} if isinstance(item, str) else item for item in evaluation["metrics"]]
        result["eval"] = {**evaluation, "metrics": named}
    return result


def merge(base: Source, overlay: Source) -> Source:
    """`overlay` on top of `base`."""
    data = _merge(base.data, overlay.data, ())
    soft = [entry for entry in base.soft if not _decides(overlay.data, entry.path)]
    places = {**base.places, **overlay.places}
    return Source(data, places, f"{base.label} + {overlay.label}", (*soft, *overlay.soft))


def _merge(base: Any, overlay: Any, path: KeyPath) -> Any:
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if path and len(path) == (2 if path[0] in PLUGIN_LISTS else 1) and path[0] in PLUGIN_SECTIONS:
        section = str(path[0])
        name = base.get("name", DEFAULT_NAMES.get(section))
        if overlay.get("name", name) != name:
            base = {key: value for key, value in base.items() if key in PLUGIN_SECTIONS[section]}
    merged = dict(base)
    for key, value in overlay.items():
        merged[key] = _merge(base.get(key), value, (*path, key))
    return merged


def override(source: Source, texts: Sequence[str]) -> Source:
    """Apply dotted overrides `key=value`; plugin names first, so that their order doesn't matter."""
    parsed = [_parse_override(text) for text in texts]
    parsed.sort(key=lambda item: not _names_plugin(item[0]))
    for keys, value, text in parsed:
        data = _overlay({**DEFAULT_LISTS, **source.data}, keys, value, text)
        path = tuple(int(key) if _is_index(key) and keys[0] in DEFAULT_LISTS else key for key in keys)
        overlay = source_of(data, {path: f"override {printable(text)}"}, source.label)
        source = replace(merge(source, overlay), label=source.label)
    return source


def _parse_override(text: str) -> tuple[list[str], Any, str]:
    key, equals, value = text.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys) or len(keys) > _DEEPEST:
        raise ConfigError(f"override {_show(text)}: write it as section.key=value, e.g. optim.learning_rate=3e-5.")
    try:
        return keys, parse_value(value), text
    except yaml.YAMLError as error:
        example = """'engine.stop=["x"]'"""
        raise ConfigError(f"override {_show(text)}: the value is not valid YAML; quote it: {example}.") from error


def _is_index(key: str) -> bool:
    """Whether a part of an override's key may be the index of a list's entry."""
    return key.isascii() and key.isdigit() and len(key) < 10


def _names_plugin(keys: Sequence[str]) -> bool:
    return keys[0] in PLUGIN_SECTIONS and (len(keys) == 1 or keys[-1] == "name")


def _overlay(base: Any, keys: Sequence[str], value: Any, text: str) -> Any:
    """The overlay that sets `keys` to `value`; lists on the way are copied from `base`, one entry replaced."""
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if not isinstance(base, list):
        return {head: _overlay(base.get(head) if isinstance(base, dict) else None, rest, value, text)}
    if not _is_index(head) or int(head) > len(base):
        entries = f"its entries are 0 to {len(base) - 1}" if base else "it is empty"
        raise ConfigError(f"override {_show(text)}: {_show(head)} is no entry of the list; {entries}.")
    items = [*base, {}] if int(head) == len(base) else list(base)
    old = items[int(head)]
    # Entries with a name are plugins, so a change of it is the change of a plugin; a reward keeps its weight.
    items[int(head)] = _merge(old, _overlay(old, rest, value, text), ("rewards", int(head)))
    return items


def explain(error: ValidationError, source: Source, prefix: KeyPath, model: type[BaseModel]) -> str:
    """One sentence an error: file and line, dotted field, what was given, what is allowed.

    model: what was validated; prefix: where it sits in the recipe.
    """
    sentences: dict[str, str] = {}
    for item in error.errors(include_url=False):
        location = _data_path(_at(source.data, prefix), item["loc"], item["type"])
        path = (*prefix, *location)
        sentence = _sentence(item, path, location, model)
        place = source.place(_named_first(sentence, prefix, source) or path)
        given, middle, expected = f"{place}: {sentence}".partition("; it should be ")
        if middle and given in sentences:  # the branches of a union, one error each
            expected = f"{sentences[given].removesuffix('.')} or {expected}"
        sentences[given] = expected
    told = [f"{given}; it should be {rest}" if rest else given for given, rest in sentences.items()]
    more = [f"... and {len(told) - _SHOWN:,} more of this kind."] if len(told) > _SHOWN else []
    return "\n".join([*told[:_SHOWN], *more])


def _named_first(sentence: str, prefix: KeyPath, source: Source) -> KeyPath:
    """The key that a check over several keys names first, as in "optim.warmup_steps (50) is more than ..."."""
    word = re.match(r"[\w.]+", sentence)
    path: KeyPath = tuple(word.group().split(".")) if word else ()
    known = (candidate for candidate in (path, (*prefix, *path)) if candidate in source.places)
    return next(known, ())


def unknown_key(path: KeyPath, allowed: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """Sentence for a key that isn't one; `elsewhere`: dotted places of keys in other sections."""
    key = str(path[-1])
    where = f" in {dotted(path[:-1])}" if path[:-1] else ""
    near = difflib.get_close_matches(key[:_LONGEST_KEY], allowed, n=1, cutoff=0.6)
    if near:
        return f"unknown key {_show(key)}{where}; did you mean {near[0]!r}?"
    if elsewhere and key in elsewhere:
        return f"unknown key {_show(key)}{where}; did you mean {elsewhere[key]!r}?"
    return f"unknown key {_show(key)}{where}; known are {', '.join(allowed) or 'none'}."


def dotted(path: KeyPath) -> str:
    """("optim", "betas", 0) as "optim.betas.0"; what a terminal would obey is escaped, and what is long is cut."""
    return printable(".".join(str(part) for part in path))


def _sentence(item: Any, path: KeyPath, location: KeyPath, model: type[BaseModel]) -> str:
    kind, message, name = item["type"], str(item["msg"]), dotted(path)
    if kind == "extra_forbidden":
        return unknown_key(path, _names(model, location[:-1]), _elsewhere(model))
    if kind == "missing":
        return f"{name} is missing."
    if kind in ("value_error", "assertion_error"):
        message = message.split(", ", 1)[1] if ", " in message else message
        of_one_key = bool(location) and not isinstance(item["input"], Mapping | BaseModel)
        if of_one_key and not re.search(rf"\b{re.escape(str(path[-1]))}\b", message):
            message = f"{name}: {message}"
        return message if message.endswith((".", "?")) else f"{message}."
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{name} is {_show(item['input'])}; it should be a mapping of keys and values."
    expected = re.sub(r"^Input should be ", "", message)
    expected = re.sub(r",? unable to (parse|interpret).*", "", expected)
    expected = re.sub(r".*is not a valid path.*", "a path", expected)
    expected = expected.replace("valid tuple", "list").replace("valid dictionary", "mapping")
    near = _nearest_choice(item)
    return f"{name} is {_show(item['input'])}; it should be {expected}{near}."


def _nearest_choice(item: Any) -> str:
    if item["type"] not in ("literal_error", "enum") or not isinstance(item["input"], str):
        return ""
    choices = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
    near = difflib.get_close_matches(item["input"], choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part] if _has(data, part) else {}
    return data


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, Mapping):
        return part in data
    return isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)


def _data_path(data: Any, loc: Sequence[str | int], kind: str) -> KeyPath:
    """A pydantic location without the tags it adds for unions, which are no keys of the data."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if _has(data, part):
            data = data[part]
        elif not (last and kind == "missing"):
            continue
        path.append(part)
    return tuple(path)


def _names(model: type[BaseModel], location: KeyPath) -> list[str]:
    """Names of the keys at `location` below `model`."""
    found: type[BaseModel] | None = model
    for part in location:
        info = found.model_fields.get(str(part)) if found else None
        found = _model_in(info.annotation) if info else None
    return sorted(found.model_fields) if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    models = (item for item in options if isinstance(item, type) and issubclass(item, BaseModel))
    return next(models, None)


def _elsewhere(model: type[BaseModel]) -> dict[str, str]:
    """Keys of the sections below `model`, with their dotted names; those that only one section has."""
    found: dict[str, str] = {}
    for section, info in model.model_fields.items():
        below = _model_in(info.annotation)
        for name in below.model_fields if below else ():
            found[name] = "" if name in found else f"{section}.{name}"
    return {name: path for name, path in found.items() if path}


def _show(value: Any) -> str:
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python writes out no number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, [name for name in names if name.endswith((".yaml", ".yml"))], n=1)
    return f"; did you mean {str(folder / near[0])!r}?" if near else "."
