"""Words of messages about data."""

from __future__ import annotations

from typing import Any

_KINDS = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "text",
    bytes: "bytes",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def described(value: Any) -> str:
    """What a value is, as JSON calls it: "a list", "text", "null"; its class for what JSON doesn't know."""
    return _KINDS.get(type(value)) or f"a {type(value).__name__!r} object"


def counted(count: int, one: str, several: str | None = None) -> str:
    """ "1 record", "2,000 records"."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
