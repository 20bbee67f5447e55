"""A sheet of small plots, drawn in inches on one set of axes.

Matplotlib's own axes, ticks and titles would take ten times as long for thirty plots, and a run's pictures are drawn
whenever it is saved. A `Sheet` has panels on a grid; a `Plot` is one of them, with data coordinates of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, PAPER, ALARM, GREY = "#2c2a26", "#dcd8cf", "#ffffff", "#a63a2b", "#6b6b6b"
#: Inches: of a plot, between plots, and around the sheet.
WIDTH, HEIGHT, ACROSS, BETWEEN = 3.1, 1.9, 0.72, 0.62
LEFT, RIGHT, TOP, BOTTOM = 0.62, 0.2, 0.8, 0.4
#: What a second axis takes on the right of each plot.
SECOND = 0.42

Span = tuple[float, float]


class Sheet:
    """A figure of `count` plots in rows of `columns`. second: whether plots have an axis on the right too."""

    def __init__(self, count: int, columns: int, title: str, footer: str = "", second: bool = False) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.columns = columns
        rows = -(-count // columns)
        self._across = ACROSS + SECOND * second
        self._width = LEFT + columns * WIDTH + (columns - 1) * self._across + RIGHT + SECOND * second
        self._height = TOP + rows * HEIGHT + (rows - 1) * BETWEEN + BOTTOM + 0.28 * bool(footer)
        self.figure: Figure = Figure(figsize=(self._width, self._height), facecolor=PAPER)
        FigureCanvasAgg(self.figure)
        self._axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set(xlim=(0, self._width), ylim=(0, self._height))
        self.text(0.12, self._height - 0.14, title, size=13, weight="bold", va="top")
        if footer:
            self.text(0.12, 0.1, footer, size=8.5, colour=ALARM, va="bottom")

    def plot(self, index: int, title: str) -> Plot:
        """The plot at a place, counted row by row from 0."""
        row, column = divmod(index, self.columns)
        left = LEFT + column * (WIDTH + self._across)
        bottom = self._height - TOP - row * (HEIGHT + BETWEEN) - HEIGHT
        self.text(left, bottom + HEIGHT + 0.1, title, size=9.5, va="bottom")
        return Plot(self, left, bottom)

    def text(self, x: float, y: float, text: str, *, size: float = 8, colour: str = INK, **options: Any) -> None:
        """A text at a place in inches; options are matplotlib's."""
        # A name or a label may hold dollar signs, which are no mathematics.
        self._axes.text(x, y, text, fontsize=size, color=colour, parse_math=False, **options)

    def add_line(self, x: ArrayLike, y: ArrayLike, **options: Any) -> None:
        """A line in inches; options are matplotlib's."""
        from matplotlib.lines import Line2D

        self._axes.add_line(Line2D(x, y, **{"solid_capstyle": "round", **options}))  # pyright: ignore[reportArgumentType]

    def add_area(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], **options: Any) -> None:
        """What lies between two lines, in inches."""
        from matplotlib.patches import Polygon

        corners = [*zip(x, low, strict=True), *zip(reversed(x), reversed(high), strict=True)]
        self._axes.add_patch(Polygon(corners, linewidth=0, **options))


@dataclass
class Plot:
    """One plot. `scale` first; then what is drawn, in data coordinates. left, bottom: its corner in inches."""

    sheet: Sheet
    left: float
    bottom: float
    _x: Span = (0.0, 1.0)
    _y: Span = (0.0, 1.0)
    _second: Span = (0.0, 1.0)
    _entries: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _seen: list[tuple[float, float]] = field(default_factory=list)

    def scale(self, x: Span, y: Span, second: Span | None = None) -> None:
        """Set the ranges, and draw the grid with its labels. second: of an axis on the right."""
        self._x, self._y = x, y
        for value in ticks(x, whole=True):
            at = self._across(value)
            self.sheet.add_line([at, at], [self.bottom, self.bottom + HEIGHT], color=FAINT, lw=0.6, zorder=0)
            self.sheet.text(at, self.bottom - 0.06, told(value), ha="center", va="top")
        for value in ticks(y):
            at = self._up(value)
            self.sheet.add_line([self.left, self.left + WIDTH], [at, at], color=FAINT, lw=0.6, zorder=0)
            self.sheet.text(self.left - 0.07, at, told(value), ha="right", va="center")
        if second is not None:
            self._second = second
            for value in ticks(second):
                at = self._up(value, second)
                self.sheet.text(self.left + WIDTH + 0.07, at, told(value), colour="#9a5f10", va="center")

    def line(
        self, steps: Sequence[float], values: Sequence[float], label: str, *, second: bool = False, **style: Any
    ) -> None:
        """A curve; a label, if any, stands in the legend. style: matplotlib's, for a line."""
        x = [self._across(step) for step in steps]
        y = [self._up(value, self._second if second else self._y) for value in values]
        self.sheet.add_line(x, y, **style)
        self._see(x, y)
        if label:
            self._entries.append((label, style))

    def area(
        self, steps: Sequence[float], low: Sequence[float], high: Sequence[float], label: str, **style: Any
    ) -> None:
        """What lies between two curves."""
        x = [self._across(step) for step in steps]
        lower, upper = [self._up(value) for value in low], [self._up(value) for value in high]
        self.sheet.add_area(x, lower, upper, **style)
        self._see(x, lower)
        self._see(x, upper)
        if label:
            self._entries.append((label, {"color": style.get("color"), "alpha": style.get("alpha"), "lw": 6}))

    def mark(self, step: float) -> None:
        """A red line at a step, with a triangle on top."""
        at, top = self._across(step), self.bottom + HEIGHT
        self.sheet.add_line([at, at], [self.bottom, top], color=ALARM, lw=0.9, ls=":", zorder=1.5)
        self.sheet.add_line([at], [top], color=ALARM, marker="v", ms=5, ls="")
        self._see([at, at], [self.bottom, top])

    def note(self, text: str) -> None:
        """A text in the middle."""
        middle = (self.left + WIDTH / 2, self.bottom + HEIGHT / 2)
        self.sheet.text(*middle, text, colour=GREY, ha="center", va="center")

    def legend(self) -> None:
        """What the labels are, at the side where the fewest points are; nothing for a single one."""
        if len(self._entries) < 2:
            return
        wide, high = 0.45 + 0.068 * max(len(label) for label, _ in self._entries), 0.16 * len(self._entries) + 0.06
        x, y = min(self._places(wide, high), key=lambda corner: self._covered(*corner, wide, high))
        # Over the curves, but they show through.
        self.sheet.add_area([x, x + wide], [y, y], [y + high, y + high], color=PAPER, alpha=0.75, zorder=3)
        for row, (label, style) in enumerate(self._entries):
            at = y + high - 0.11 - 0.16 * row
            key = {**style, "solid_capstyle": "butt", "zorder": 4}
            self.sheet.add_line([x + 0.06, x + 0.18, x + 0.3], [at, at, at], **key, markevery=[1])
            self.sheet.text(x + 0.37, at, label, size=7.5, va="center", zorder=4)

    def _places(self, wide: float, high: float) -> Iterator[tuple[float, float]]:
        right, top = self.left + WIDTH - wide, self.bottom + HEIGHT - high
        for y in (top, self.bottom + 0.04, (top + self.bottom) / 2):
            for x in (right, self.left + 0.04):
                yield x, y

    def _covered(self, x: float, y: float, wide: float, high: float) -> int:
        return sum(x <= a <= x + wide and y <= b <= y + high for a, b in self._seen)

    def _see(self, x: Sequence[float], y: Sequence[float]) -> None:
        """Remember where a curve runs: fifty points of it, however many it has."""
        if len(x) > 1:
            at = np.linspace(0, len(x) - 1, 50)
            self._seen += zip(np.interp(at, range(len(x)), x), np.interp(at, range(len(y)), y), strict=True)

    def _across(self, value: float) -> float:
        low, high = self._x
        return self.left + WIDTH * (value - low) / (high - low)

    def _up(self, value: float, span: Span | None = None) -> float:
        low, high = span or self._y
        return self.bottom + HEIGHT * (value - low) / (high - low)


def room(values: Sequence[float], whole: bool = False) -> Span:
    """A range that holds the values with a little air; from 0 for one that never changes. whole: 0 to 1."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if whole and low >= 0.0 and high <= 1.0:
        return (-0.04, 1.04)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        ends = sorted((-0.05 * (high or 1.0), 1.5 * high or 1.0))
        return (ends[0], ends[1])
    air = 0.06 * (high - low)
    return (low - air, high + air)


def ticks(span: Span, whole: bool = False) -> list[float]:
    """Four to seven round values within a range; whole: integers only. The step is 1, 2, 2.5 or 5 times 10^k."""
    low, high = span
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def told(value: float) -> str:
    """0.25, 1,500, 2e-4: short, and without a factor above the axis."""
    if abs(value) < 1e-300:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.5g}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "\N{MINUS SIGN}")
