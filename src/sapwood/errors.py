"""The exception tree.

    SapwoodError                   anything a user can act on; the command line prints its sentence, never a traceback
    ├── ConfigError                a recipe, an override or an option that can't be honoured
    │   └── UnknownPlugin          a name that no plugin answers to
    ├── DataError                  a file, line or field that can't be read
    ├── ModelError                 weights, tokenizer or architecture
    ├── EnvError                   an environment that broke its contract or its time limit
    ├── EngineError                sampling that can't be done as asked
    ├── MissingExtra               an optional package that is not installed; names the extra
    ├── BudgetError                a unit that doesn't fit a token, memory or context budget
    ├── TrainingStopped            a guard stopped the run (non-finite loss, sampler gap ...)
    ├── Stopped                    a signal stopped the run, which was saved; carries the exit code
    └── StorageError               a run folder that can't be written (disk full, permissions, would overwrite)

Every message is one sentence or two that names the place (file, line, field) and the fix.
"""

from __future__ import annotations


class SapwoodError(Exception):
    """Base of all errors that a user can act on."""


class ConfigError(SapwoodError):
    """A recipe, an override or an option that can't be honoured."""


class UnknownPlugin(ConfigError):
    """A name that no plugin of its kind answers to."""


class DataError(SapwoodError):
    """A file, line or field that can't be read."""


class ModelError(SapwoodError):
    """Weights, tokenizer or architecture that can't be used."""


class EnvError(SapwoodError):
    """An environment that broke its contract or its time limit."""


class EngineError(SapwoodError):
    """Sampling that can't be done as asked."""


class MissingExtra(SapwoodError):
    """An optional package that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'sapwood[{extra}]'")


class BudgetError(SapwoodError):
    """A unit that doesn't fit a token, memory or context budget."""


class TrainingStopped(SapwoodError):
    """A guard stopped the run; what was written stays."""


class Stopped(SapwoodError):
    """A signal stopped the run; it was saved and can be resumed. exit_code: 128 and the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StorageError(SapwoodError):
    """A run folder that can't be written."""


def printable(text: str, longest: int = 200) -> str:
    """What a message may hold of a text of unknown origin: cut, and what a terminal would obey is escaped."""
    shown = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
