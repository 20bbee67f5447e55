"""evaluation.json as the page shows it, in both of its shapes: returns in a world, and metrics of held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.report.reading import Problems, finite, shorter

_LIMIT = 200


def evaluation(found: Any, problems: Problems) -> dict[str, Any]:
    """{"returns": {...} | None, "held_out": {...} | None}; what doesn't fit the shapes is left out and told."""
    if found is None:
        return {"returns": None, "held_out": None}
    if not isinstance(found, Mapping):
        problems.add("evaluation.json: not an object; left out.")
        return {"returns": None, "held_out": None}
    returns = _returns(found) if "results" in found else None
    held_out = _held_out(found["held_out"]) if isinstance(found.get("held_out"), Mapping) else None
    if returns is None and held_out is None:
        problems.add("evaluation.json: neither results nor held_out are there; left out.")
    return {"returns": returns, "held_out": held_out}


def _returns(found: Mapping[str, Any]) -> dict[str, Any] | None:
    results = [item for item in _list(found["results"]) if isinstance(item, Mapping)]
    if not results:
        return None
    by_name = {_text(item.get("name")): _mapping(item.get("returns")) for item in results}
    differences = [_difference(item) for item in _differences(found)]
    for item in differences:
        item["tally"] = _tally(by_name.get(item["of"][0], {}), by_name.get(item["of"][1], {}))
    return {
        "heading": _text(found.get("heading")),
        "results": [_result(item) for item in results],
        "differences": differences,
    }


def _result(item: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ("mean", "lo", "hi", "tasks", "failed", "turns", "parsed", "fallback", "reply_tokens")
    metrics = list(_mapping(item.get("metrics")).items())[:_LIMIT]
    return {
        "name": _text(item.get("name")),
        **{name: shorter(finite(item.get(name))) for name in numbers},
        "metrics": [[str(name), shorter(finite(value))] for name, value in metrics],
    }


def _differences(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All paired differences; of an older file the only one."""
    several = _list(found.get("differences"))
    return [item for item in several or [found.get("difference")] if isinstance(item, Mapping)]


def _difference(item: Mapping[str, Any]) -> dict[str, Any]:
    names = [_text(name) for name in _list(item.get("of"))[:2]]
    return {
        "of": [*names, "", ""][:2],
        **{name: shorter(finite(item.get(name))) for name in ("mean", "lo", "hi", "tasks")},
    }


def _tally(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[int] | None:
    """[better, equal, worse] tasks of ours against theirs; None where they share none."""
    pairs = [(finite(ours[task]), finite(theirs[task])) for task in ours if task in theirs]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        return None
    return [sum(a > b for a, b in known), sum(a == b for a, b in known), sum(a < b for a, b in known)]


def _held_out(found: Mapping[str, Any]) -> dict[str, Any] | None:
    by_model = {str(name): _mapping(values) for name, values in list(_mapping(found.get("metrics")).items())[:_LIMIT]}
    if not by_model:
        return None
    names = list(dict.fromkeys(str(metric) for values in by_model.values() for metric in values))[:_LIMIT]
    differences = [item for item in _list(found.get("differences")) if isinstance(item, Mapping)][:_LIMIT]
    return {
        "heading": _text(found.get("heading")),
        "models": list(by_model),
        "metrics": [[name, [shorter(finite(values.get(name))) for values in by_model.values()]] for name in names],
        "differences": [{"metric": _text(item.get("metric")), **_difference(item)} for item in differences],
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:2000]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
