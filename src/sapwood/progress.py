"""Progress on the terminal: a live display on a TTY, a compact line a step otherwise, or JSON lines on request.

Whatever is shown also goes to the log "sapwood.progress", and so to logs/training_*.log of an open run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import IO, Any, NamedTuple

logger = logging.getLogger("sapwood.progress")


class Short(NamedTuple):
    """How a metric stands in the compact line. unless: another metric that stands for it where a step has both."""

    metric: str
    name: str
    meaning: str
    form: str
    unless: str = ""


#: The compact line, in this order, where a step has them.
COMPACT: tuple[Short, ...] = (
    Short("policy_loss", "PL", "policy loss", "{:.4f}"),
    Short("value_loss", "VL", "value loss", "{:.4f}"),
    Short("loss", "L", "loss", "{:.4f}", unless="policy_loss"),
    Short("perplexity", "PPL", "perplexity", "{:.3f}"),
    Short("accuracy", "ACC", "accuracy of preferences", "{:.3f}"),
    Short("margin", "M", "margin of rewards", "{:.3f}"),
    Short("reward", "R", "reward", "{:.3f}"),
    Short("advantages", "A", "advantage", "{:.3f}"),
    Short("entropy", "E", "entropy", "{:.3f}"),
    Short("learning_rate", "LR", "learning rate", "{:.2e}"),
    Short("kl", "KL", "KL divergence from the reference", "{:.2e}"),
    Short("grad_norm", "G", "gradient norm", "{:.2f}"),
)

#: Held-out results, told in words: (metric, name, format).
HELD_OUT: tuple[tuple[str, str, str], ...] = (
    ("eval/return", "return", "{:.3f}"),
    ("eval/loss", "loss", "{:.4f}"),
    ("eval/perplexity", "perplexity", "{:.3f}"),
    ("eval/accuracy", "accuracy", "{:.3f}"),
)

#: The live display: (metric, label, format, what replaces it where a step has both).
DISPLAYED: tuple[tuple[str, str, str, str], ...] = (
    ("reward", "reward", "{:.3f}", ""),
    ("eval/return", "held-out return", "{:.3f}", ""),
    ("loss", "loss", "{:.4f}", ""),
    ("policy_loss", "policy loss", "{:.4f}", ""),
    ("value_loss", "value loss", "{:.4f}", ""),
    ("eval/loss", "held-out loss", "{:.4f}", ""),
    ("perplexity", "perplexity", "{:.3f}", ""),
    ("accuracy", "accuracy", "{:.3f}", ""),
    ("margin", "margin", "{:.3f}", ""),
    ("entropy", "entropy", "{:.3f}", ""),
    ("kl", "KL", "{:.2e}", ""),
    ("approx_kl", "policy change", "{:.2e}", "kl"),
    ("gap_k3", "sampler gap", "{:.1e}", ""),
    ("explained_variance", "explained var.", "{:.2f}", ""),
    ("grad_norm", "gradient norm", "{:.2f}", ""),
    ("learning_rate", "learning rate", "{:.2e}", ""),
    ("reply_tokens", "reply tokens", "{:.1f}", ""),
    ("tokens_per_second", "tokens/s", "{:,.0f}", ""),
)

#: Steps whose values the live display draws, and warnings that it keeps in sight.
TREND, WARNINGS = 16, 3
_BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """Reports a run. Use with `with`; `start`, then `phase` and `step` as the run goes on.

    json_lines: print one JSON object a step on stdout; stream: where to write otherwise (stderr).
    """

    def __init__(self, *, json_lines: bool = False, stream: IO[str] | None = None) -> None:
        self._json = json_lines
        self._stream = stream or sys.stderr
        self._live: Any = None
        self._console: Any = None
        self._bar: Any = None
        self._total = 0
        self._done = 0
        self._began = time.monotonic()
        self._phase = ""
        self._values: dict[str, Any] = {}
        self._trends: dict[str, deque[float]] = {}
        self._warnings: deque[str] = deque(maxlen=WARNINGS)
        self._explained: set[str] = set()
        self._first = 0
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, total: int, title: str = "training", done: int = 0) -> None:
        """Begin a run of `total` steps, `done` of them finished already."""
        self._total, self._done, self._began = total, done, time.monotonic()
        self._first = done
        self._ensure_live()
        if self._live is not None:
            self._bar.update(self._task, description=title, total=total, completed=done)

    def phase(self, name: str) -> None:
        """What is going on: "sampling", "learning", "evaluating" ..."""
        if name and name != self._phase:
            logger.info("phase: %s", name)
        self._phase = name
        self._ensure_live()
        self._refresh()

    def work(self, name: str, done: int, total: int) -> None:
        """`done` of `total` parts of a piece of work: held-out episodes, replies. Fits evaluate's `progress`."""
        self._ensure_live()
        self._phase = f"{name} {done}/{total}"
        if done == total:
            logger.info("%s", self._phase)
            if self._live is None and not self._json:
                print(self._phase, file=self._stream, flush=True)
        if self._total == 0 and self._live is not None:
            self._bar.update(self._task, completed=done, total=total, phase=name)
        else:
            self._refresh()

    def step(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Step number `step` (from 1) is done."""
        self._done = step
        found = {**metrics, **(timing or {})}
        self._values.update(found)
        for name, *_ in DISPLAYED:
            if _is_finite(found.get(name)):
                self._trends.setdefault(name, deque(maxlen=TREND)).append(float(found[name]))
        if self._json:
            self._print_json({"step": step, **found})
        legend, line = self._legend(found), self._line(step, found)
        for text in (legend, line):
            if text:
                logger.info("%s", text)
                if self._live is None and not self._json:
                    print(text, file=self._stream, flush=True)
        self._refresh()

    def note(self, text: str) -> None:
        """A line for the user that stays on the screen."""
        text = printable(text)
        logger.info("%s", text)
        if self._json:
            self._print_json({"note": text})
        else:
            self._say(text)

    def warn(self, text: str) -> None:
        """A warning: a line that stays on the screen, the last ones in sight of the live display."""
        text = printable(text)
        logger.warning("%s", text)
        self._warnings.append(text)
        if self._json:
            self._print_json({"warning": text})
        else:
            self._say(f"warning: {text}", style="yellow")
        self._refresh()

    def stop(self) -> None:
        """End the live display; what it showed last stays."""
        if self._live is not None:
            self._phase = ""
            self._refresh()
            self._live.stop()
            self._live = None

    # ---- the compact line ------------------------------------------------------------------------------------

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        """step 12/40: PL:0.0027 R:0.469 E:0.352 LR:7.69e-06 | held-out return 0.583 | 96 tok/s | 4:10 left"""
        numbers = " ".join(f"{s.name}:{s.form.format(float(values[s.metric]))}" for s in _compact(values))
        speed = values.get("tokens_per_second")
        parts = [
            f"step {step}/{self._total}:" + (f" {numbers}" if numbers else ""),
            _held_out(values),
            f"{float(speed):,.0f} tok/s" if speed is not None else "",
            self._left(),
        ]
        return " | ".join(part for part in parts if part)

    def _legend(self, values: Mapping[str, Any]) -> str:
        """What the abbreviations of a line mean: those that haven't been explained yet."""
        fresh = [short for short in _compact(values) if short.name not in self._explained]
        self._explained.update(short.name for short in fresh)
        return ", ".join(f"{short.name} {short.meaning}" for short in fresh)

    # ---- the live display ------------------------------------------------------------------------------------

    def _ensure_live(self) -> None:
        """Begin the live display where there is a terminal to show it on."""
        if self._live is not None or self._json or not self._stream.isatty():
            return
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[phase]}"),
        )
        self._task = self._bar.add_task("", total=None, left="", phase="")
        self._console = Console(file=self._stream)
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
        self._live.start()

    def _render(self) -> Any:
        """The bar, a grid of the newest values with their trends, and the last warnings."""
        from rich.console import Group
        from rich.text import Text

        lines = [Text(f"! {text}", style="yellow", overflow="ellipsis", no_wrap=True) for text in self._warnings]
        return Group(self._bar, self._grid(), *lines)

    def _grid(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        values = dict(self._values)
        cells = [
            (Text(label, style="dim"), Text(_told(name, form, values), style="bold"), Text(self._trend(name), "green"))
            for name, label, form, replaced in DISPLAYED
            if values.get(name) is not None and values.get(replaced) is None
        ]
        columns = max(1, min(3, self._console.width // 44))
        grid = Table.grid(padding=(0, 1))
        for _ in range(columns):
            grid.add_column(no_wrap=True)
            grid.add_column(justify="right", no_wrap=True)
            grid.add_column(width=TREND, no_wrap=True)
        for first in range(0, len(cells), columns):
            grid.add_row(*(part for cell in cells[first : first + columns] for part in cell))
        return grid

    def _trend(self, name: str) -> str:
        """The last values as bars, scaled to their own range; nothing where the terminal can't write them."""
        values = list(self._trends.get(name, ()))
        if len(values) < 2 or "utf" not in (self._console.encoding or "").lower():
            return ""
        low, high = min(values), max(values)
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BARS[round((value - low) * scale)] for value in values)

    def _refresh(self) -> None:
        if self._live is not None:
            self._bar.update(self._task, completed=self._done, left=self._left(), phase=self._phase)

    def _say(self, text: str, style: str | None = None) -> None:
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False, style=style)
        else:
            print(text, file=self._stream, flush=True)

    def _left(self) -> str:
        finished = self._done - self._first
        if finished <= 0 or self._done >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / finished * (self._total - self._done)
        return f"{duration(seconds)} left"

    def _print_json(self, record: Mapping[str, Any]) -> None:
        plain = {name: _json_value(value) for name, value in record.items()}
        print(json.dumps(plain, sort_keys=True), flush=True)


def _compact(values: Mapping[str, Any]) -> Iterator[Short]:
    """The entries of COMPACT that a step has."""
    for short in COMPACT:
        if values.get(short.metric) is not None and values.get(short.unless) is None:
            yield short


def _held_out(values: Mapping[str, Any]) -> str:
    """ "held-out return 0.583 [0.534, 0.633]"; "" where nothing was evaluated."""
    found = [
        f"{name} {_told(metric, form, values)}" for metric, name, form in HELD_OUT if values.get(metric) is not None
    ]
    return f"held-out {', '.join(found)}" if found else ""


def _told(name: str, form: str, values: Mapping[str, Any]) -> str:
    """A value, with its interval where it is the held-out return's."""
    text = form.format(float(values[name]))
    if name == "eval/return" and _is_finite(values.get("eval/low")) and _is_finite(values.get("eval/high")):
        text += f" [{form.format(float(values['eval/low']))}, {form.format(float(values['eval/high']))}]"
    return text


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor or change its colours; it may come from a model."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.replace("\t", " "))


def duration(seconds: float) -> str:
    """75 as "1:15", 3,700 as "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def quiet() -> None:
    """Silence third-party chatter at its source; call it before torch and transformers are imported.

    Only what a user of Sapwood can't act on: progress bars and advice of libraries whose options they don't see.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for module in ("transformers", "peft", "torch", "bitsandbytes", "huggingface_hub", "gymnasium"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")
    # Its advice on kernels that a CPU could fetch from the hub; Sapwood multiplies without them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        logs = sys.modules["transformers"].logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(float(value))
