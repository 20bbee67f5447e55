"""Mutations that the kinds of malformed input share: of bytes, of plain data, and values that no option means."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Place = tuple[str | int, ...]

#: Stands for the raw text of a value while the rest is written by a library.
MARK = "@@VALUE@@"
_DIGITS = "9" * 5000

#: Of either notation, as text within quotes.
TEXTS = (
    "",
    " ",
    "x" * 300,
    "x" * 100_000,
    "../../../../etc/passwd",
    "/dev/zero",
    "/dev/full",
    "/",
    ".",
    "~",
    "~nobodyhere/x",
    "os:system",
    "os.path:join",
    ".:x",
    "..:..",
    ":",
    "a.py:b",
    "no.such.module:Class",
    "owner/name",
    "%s%n%x",
    "{x}",
    "${HOME}",
    "\U0001f4a5",
    "\u0661\u0662\u0663",
    "nan",
    "a,b;c\td",
    "*",
    "[",
    "--help",
    "name=value",
)

#: As YAML writes them, in flow style.
YAML_VALUES = (
    *("null", "true", "no", "[]", "{}", "[null]", "[[]]", "[{}]", "{a: 1}", "{1: 2}", "{null: 1}", "{[a]: 1}"),
    *("{? {a: b} : c}", "{a: 1, a: 2}", "{name: x}", "{name: [x]}", "[name]", "x", "'1'"),
    *("-1", "0", "-0.0", "0.5", "1e-320", "1e309", "-1e309", ".inf", "-.inf", ".nan", "2147483648"),
    *("9223372036854775808", "-9223372036854775809", "1" + "0" * 400, _DIGITS, f"-{_DIGITS}", "0x" + "f" * 5000),
    *("0b" + "1" * 20_000, "1:30:45", "0o17", "08", "1_000", "2024-01-01", "=", "<<"),
    *('!!timestamp "x"', '!!int "abc"', '!!int ""', '!!float "x"', '!!bool "maybe"', '!!null "x"'),
    *('!!binary "/w=="', '!!binary "@"', "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str [a]"),
    *("!!map [a]", "!!seq {a: 1}", "!unknown x", "!!merge x", "!<tag:yaml.org,2002:int> x"),
    *('!!python/object/apply:os.system ["touch canary"]', '!!python/object/new:os.system ["touch canary"]'),
    *("!!python/name:os.system", "!!python/module:os", "!!python/tuple [1]"),
    *("&a [*a]", "&a {b: *a}", "*nowhere", "[&a x, *a, *a]"),
    *('"\\0"', '"a\\0b"', '"\\ud800"', '"\\udcff.jsonl"', '"\\e[2J\\a"', '"\\u202e"', '"\\x80"'),
    *("[" * 60 + "]" * 60, "[" * 3000 + "]" * 3000, "{a: " * 60 + "1" + "}" * 60, "[" + "1," * 5000 + "]"),
    *("[", "}", "'", '"', "@", "`", "%", "|", ">", "- ", "?", ": :", "#"),
    *(json.dumps(text) for text in TEXTS),
)

#: As JSON writes them, those included that only some readers take.
JSON_VALUES = (
    *("null", "true", "[]", "{}", "[[]]", "[null]", "0", "-1", "1.5", "1e400", "-1e400", "NaN", "Infinity"),
    *("-Infinity", "1" + "0" * 400, _DIGITS, "01", "+1", ".5", "0x10", "1_000", "'x'", "undefined", ""),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"\\u202e"', '"\\ufeff"', '"\\x"', '"\n"', '"\t"'),
    *("[" * 600 + "]" * 600, "[" * 100_000 + "]" * 100_000, '{"a":' * 400 + "1" + "}" * 400, "[" * 500),
    *('{"a":' * 940 + "1" + "}" * 940, "[" * 960 + "]" * 960),
    *('{"role": "user"}', '[{"role": "user"}]', '[{"role": "wizard", "content": "x"}]', '[["user", "x"]]'),
    *('[{"role": "user", "content": null}]', '[{"role": ["user"], "content": "x"}]', '[{"role": {}, "content": "x"}]'),
    *('[{"role": "assistant", "content": "x"}]', '[{"content": "x"}]', '[{"role": "user", "content": {"a": 1}}]'),
    *('[{"role": "user", "content": [{"type": "image"}]}]', '[{"role": "user", "content": ["a", 1]}]'),
    *('{"a": 1, "a": 2}', '{"__class__": "os.system"}', '{"text": "x"}', '[1, "2", null]', '{"": ""}'),
    *(json.dumps(text) for text in TEXTS),
)


def damage(content: bytes, rng: random.Random) -> bytes:
    """One to four of: bytes flipped, cut out, repeated, put in, or cut off at the end."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        size = rng.choice((1, 1, 2, 7, 60, 500))
        match rng.randrange(7):
            case 0:
                for place in range(at, min(at + rng.choice((1, 1, 4, 32)), len(made))):
                    made[place] ^= 1 << rng.randrange(8)
            case 1:
                del made[at : at + size]
            case 2:
                made[at:at] = made[at : at + size] * rng.choice((1, 2, 20))
            case 3:
                made[at:at] = bytes(rng.randrange(256) for _ in range(size))
            case 4:
                made[at:at] = rng.choice((b"\0", b"\0" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\t", b"\x1b[2J"))
            case 5:
                made[at:at] = rng.choice(
                    (b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"\n", b"- ", b"#", b"&a ", b"*a")
                )
            case _:
                del made[at:]
    return bytes(made)


def encodings(text: str) -> dict[str, bytes]:
    """The text as other programs save it, and files that are something else."""
    accented = text.replace("e", "é")
    return {
        "utf-16": text.encode("utf-16"),
        "utf-16-be": text.encode("utf-16-be"),
        "utf-32": text.encode("utf-32"),
        "utf-8-sig": text.encode("utf-8-sig"),
        "two marks": b"\xef\xbb\xbf\xef\xbb\xbf" + text.encode(),
        "latin-1": accented.encode("latin-1", "replace"),
        "cp037": text.encode("cp037", "replace"),
        "surrogates": ("\ud83d" + text).encode("utf-8", "surrogatepass"),
        "gzip": gzip.compress(text.encode()),
        "old mac": text.replace("\n", "\r").encode(),
        "windows": text.replace("\n", "\r\n").encode(),
        "line separators": text.replace("\n", "\u2028").encode(),
        "nul": text.replace(" ", "\0").encode(),
        "tabs": text.replace("  ", "\t").encode(),
        "empty": b"",
        "blank": b" \n\t\n  \n",
        "mark alone": b"\xef\xbb\xbf",
        "mark and line": b"\xef\xbb\xbf\n",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "zip": b"PK\x03\x04" + bytes(64),
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "zeros": bytes(4096),
        "high": b"\xff" * 4096,
        "long line": b"a" * 3_000_000,
        "brackets": b"[" * 200_000,
        "braces": b'{"a":' * 100_000,
    }


def places(data: Any, above: Place = ()) -> Iterator[Place]:
    """Every place in plain data but the top."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def at(data: Any, place: Place) -> Any:
    """The value there."""
    for key in place:
        data = data[key]
    return data


def put(data: Any, place: Place, value: Any) -> None:
    """Set the value there."""
    at(data, place[:-1])[place[-1]] = value


def remove(data: Any, place: Place) -> None:
    """Remove the value there."""
    del at(data, place[:-1])[place[-1]]


def misspelt(word: str, rng: random.Random) -> str:
    """The word with a letter lost, doubled, swapped or changed."""
    if not word:
        return "x"
    index = rng.randrange(len(word))
    match rng.randrange(5):
        case 0:
            return word[:index] + word[index + 1 :] or "x"
        case 1:
            return word[:index] + word[index] + word[index:]
        case 2:
            return word[:index] + rng.choice("aeioux-_ .") + word[index + 1 :]
        case 3:
            return word.upper() if word.upper() != word else word.lower()
        case _:
            return word + rng.choice(("s", "_", "?", " ", "\u200b", ".x"))


def no_file(path: Path, rng: random.Random, *, pipe: bool = True) -> None:
    """Put something else than a file at `path`, in place of what is there.

    pipe: it may be a named pipe. A user may name one, as a shell's <(...) does, and then it is waited for.
    """
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match rng.randrange(7 if pipe else 6):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path.name)  # to itself
        case 2:
            path.symlink_to("/nowhere/at/all")
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.write_bytes(b"")
        case 5:
            path.symlink_to("/dev/null")
        case _:
            os.mkfifo(path)
