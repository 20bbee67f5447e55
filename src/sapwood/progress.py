"""Progress on the terminal: a live display on a TTY, a plain line a step otherwise, or JSON lines on request."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

#: Shown in this order where a step has them: (name, label, format).
SHOWN: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("value_loss", "value loss", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("kl", "KL", "{:.2e}"),
    ("gap_k3", "gap", "{:.1e}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("learning_rate", "lr", "{:.1e}"),
    ("eval/return", "held-out", "{:.3f}"),
    ("eval/loss", "held-out loss", "{:.3f}"),
    ("tokens_per_second", "tok/s", "{:.0f}"),
)


class Progress:
    """Reports a run. Use with `with`; `start`, then `phase` and `step` as the run goes on.

    json_lines: print one JSON object a step on stdout; stream: where to write otherwise (stderr).
    """

    def __init__(self, *, json_lines: bool = False, stream: IO[str] | None = None) -> None:
        self._json = json_lines
        self._stream = stream or sys.stderr
        self._live: Any = None
        self._bar: Any = None
        self._total = 0
        self._done = 0
        self._began = time.monotonic()
        self._phase = ""
        self._values: dict[str, Any] = {}
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
        self._phase = name
        self._ensure_live()
        self._refresh()

    def work(self, name: str, done: int, total: int) -> None:
        """`done` of `total` parts of a piece of work: held-out episodes, replies. Fits evaluate's `progress`."""
        self._ensure_live()
        self._phase = f"{name} {done}/{total}"
        if self._live is None and done == total and not self._json:
            print(self._phase, file=self._stream, flush=True)
        if self._total == 0 and self._live is not None:
            self._bar.update(self._task, completed=done, total=total, phase=name)
        else:
            self._refresh()

    def step(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Step number `step` (from 1) is done."""
        self._done = step
        self._values.update({**metrics, **(timing or {})})
        if self._json:
            self._print_json({"step": step, **metrics, **(timing or {})})
        elif self._live is None:
            text = self._numbers({**metrics, **(timing or {})})
            print(f"step {step}/{self._total}  {text}  {self._left()}".rstrip(), file=self._stream, flush=True)
        self._refresh()

    def note(self, text: str) -> None:
        """A line for the user that stays on the screen."""
        if self._json:
            self._print_json({"note": text})
        elif self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def stop(self) -> None:
        """End the live display; what it showed last stays."""
        if self._live is not None:
            self._phase = ""
            self._refresh()
            self._live.stop()
            self._live = None

    def _ensure_live(self) -> None:
        """Begin the live display where there is a terminal to show it on."""
        if self._live is not None or self._json or not self._stream.isatty():
            return
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[phase]}"),
        )
        self._task = self._bar.add_task("", total=None, left="", phase="")
        self._live = Live(
            get_renderable=lambda: Group(self._bar, Text(self._numbers(self._values))),
            console=Console(file=self._stream),
            refresh_per_second=4,
        )
        self._live.start()

    def _refresh(self) -> None:
        if self._live is not None:
            self._bar.update(self._task, completed=self._done, left=self._left(), phase=self._phase)

    def _numbers(self, values: Mapping[str, Any]) -> str:
        shown = [
            f"{label} {form.format(float(values[name]))}" for name, label, form in SHOWN if values.get(name) is not None
        ]
        return "  ".join(shown)

    def _left(self) -> str:
        finished = self._done - self._first
        if finished <= 0 or self._done >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / finished * (self._total - self._done)
        return f"{duration(seconds)} left"

    def _print_json(self, record: Mapping[str, Any]) -> None:
        plain = {name: _json_value(value) for name, value in record.items()}
        print(json.dumps(plain, sort_keys=True), flush=True)


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
