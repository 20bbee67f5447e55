"""Whether the number in the last reply is the task's answer, within a tolerance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

from pydantic import Field, field_validator

from sapwood.rewards import Reward
from sapwood.rewards.exact_match import check_answers, checked_pattern
from sapwood.types import Group, Trajectory

# Longer numbers, or exponents, are no answers, and exact arithmetic with them would take for ever.
_MAX_DIGITS = 400
_MAX_EXPONENT = 400

_WHOLE = r"[0-9]{1,3}(?:[,_\u00a0\u202f'][0-9]{3})+(?![0-9])|[0-9]+"
_DECIMAL = rf"(?:(?:{_WHOLE})(?:\.[0-9]+)?|\.[0-9]+)"
_EXPONENT = r"(?:[eE][-+]?[0-9]+|\s*(?:[x×*]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?\s*[-+]?[0-9]+\}?)"
_LATEX = r"\\[dt]?frac\s*(?:\{\s*[-+]?[0-9]+\s*\}|[0-9])\s*(?:\{\s*[-+]?[0-9]+\s*\}|[0-9])"
# A sign belongs to a number unless it stands between two terms, as in 10-3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])[-+−–])?(?:[$€£¥]\s?)?"
    rf"(?:(?P<latex>{_LATEX})"
    rf"|(?P<whole>[0-9]+)\s+(?P<mixed>[0-9]+/[0-9]+)(?![0-9]*[./])"
    rf"|(?P<over>{_DECIMAL})\s?/\s?(?P<under>{_DECIMAL})(?![0-9]|\s?/)"
    rf"|(?P<decimal>{_DECIMAL})(?P<exponent>{_EXPONENT})?)"
    rf"\s?(?P<percent>\\?%|percent\b)?"
)
_SEPARATORS = re.compile("[,_\u00a0\u202f']")


class Numeric(Reward):
    """1 where the number taken from the last reply is within the tolerance of the task's answer, otherwise 0.

    take: the "last_number" of the reply, or the number in its last "boxed" (\\boxed{...} of LaTeX). pattern: a regular
    expression whose first group (or whole match), at its last occurrence, holds the number instead. A number may have
    thousands separators (1,234), be a fraction (3/4, 1 1/2, \\frac{3}{4}), a percentage or in scientific notation.

    absolute, relative: |number - answer| <= max(absolute, relative * |answer|), in exact arithmetic. percent: "either"
    lets 50% equal both 50 and 0.5, "fraction" only 0.5. An answer is a number, a text whose last number counts, or a
    list, any of which is accepted.
    """

    take: Literal["last_number", "boxed"] = "last_number"
    pattern: str | None = None
    absolute: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    relative: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    percent: Literal["either", "fraction"] = "either"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        return checked_pattern(pattern)

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, float]]]:
        """parts[g][i] = {"numeric": 0.0 or 1.0}; 0 where reply or answer holds no number.

        Raises DataError where no task has an answer.
        """
        check_answers("numeric", groups)
        return [[{"numeric": float(self._right(t))} for t in group.trajectories] for group in groups]

    def _right(self, trajectory: Trajectory) -> bool:
        answer = trajectory.task.answer
        taken = self._taken(trajectory.turns[-1].text) if trajectory.turns else None
        given = self._readings(taken) if taken is not None else ()
        answers = answer if isinstance(answer, list | tuple) else [answer]
        wanted = [
            value for a in answers if a is not None and not isinstance(a, bool) for value in self._readings(str(a))
        ]
        return any(self._near(x, y) for x in given for y in wanted)

    def _taken(self, text: str) -> str | None:
        """The part of a reply that holds the number."""
        if self.pattern is not None:
            found = list(re.finditer(self.pattern, text, re.DOTALL))
            return None if not found else (found[-1].group(1) if found[-1].re.groups else found[-1].group())
        return text if self.take == "last_number" else _boxed(text)

    def _readings(self, text: str) -> tuple[Fraction, ...]:
        """What the last number of a text may stand for."""
        found = list(_NUMBER.finditer(text.replace("{,}", ",")))
        last = found[-1] if found else None
        value = _value(last) if last is not None else None
        if last is None or value is None:
            return ()
        if not last["percent"]:
            return (value,)
        return (value / 100,) if self.percent == "fraction" else (value / 100, value)

    def _near(self, number: Fraction, answer: Fraction) -> bool:
        return abs(number - answer) <= max(Fraction(self.absolute), Fraction(self.relative) * abs(answer))


def _boxed(text: str) -> str | None:
    """What is inside the last \\boxed{...}, whose braces may nest."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : at]
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    """The number that was matched, sign included; None for a division by zero or one too large to compute with."""
    if found["latex"]:
        digits = re.sub(r"\\[dt]?frac", "", found["latex"])
        over, under = re.findall(r"\{\s*([-+]?[0-9]+)\s*\}|([0-9])", digits)
        parts = [_exact(a or b) for a, b in (over, under)]
        value = _divided(*parts)
    elif found["mixed"]:
        over, under = found["mixed"].split("/")
        fraction, whole = _divided(_exact(over), _exact(under)), _exact(found["whole"])
        value = None if fraction is None or whole is None else whole + fraction
    elif found["over"]:
        value = _divided(_exact(found["over"]), _exact(found["under"]))
    else:
        exponent = re.search(r"[-+]?[0-9]+\}?$", found["exponent"]) if found["exponent"] else None
        value = _exact(found["decimal"], int(exponent.group().rstrip("}")[:_MAX_DIGITS]) if exponent else 0)
    return -value if value is not None and (found["sign"] or "").strip() in ("-", "−", "–") else value


def _divided(over: Fraction | None, under: Fraction | None) -> Fraction | None:
    return None if over is None or not under else over / under


def _exact(text: str, exponent: int = 0) -> Fraction | None:
    digits = _SEPARATORS.sub("", text)
    if len(digits) > _MAX_DIGITS or abs(exponent) > _MAX_EXPONENT:
        return None
    try:
        return Fraction(Decimal(digits)) * Fraction(10) ** exponent
    except InvalidOperation:
        return None


PLUGIN = Numeric
