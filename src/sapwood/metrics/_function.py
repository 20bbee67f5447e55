"""Any Python function as a metric: "metrics.py:refusals" under `eval.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from pydantic import Field

from sapwood import plugins
from sapwood.errors import DataError
from sapwood.metrics import Metric, finished
from sapwood.rewards._function import OFFERED, arguments, is_number, make_model, plain, signature_of, title
from sapwood.types import Group


class FunctionMetric(Metric):
    """A metric that a function computes. n: rollouts of every held-out task."""

    function: ClassVar[Callable[..., Any]]
    given: ClassVar[tuple[str, ...]]

    n: int = Field(default=1, ge=1)

    @property
    def attempts(self) -> int:
        """n."""
        return self.n

    def compute(self, groups: Sequence[Group]) -> dict[str, float]:
        """{the function's name: number}, or "name/key" of the dict that it returned. Episodes that failed are left out.

        Raises DataError where the function raises, or returns anything but finite numbers.
        """
        function = type(self).function
        options = {name: getattr(self, name) for name in type(self).model_fields if name != "n"}
        given = arguments(type(self).given, finished(groups))
        returned = plain(plugins.call(title("metric", function), function, **given, **options))
        name = function.__name__
        if isinstance(returned, Mapping):
            numbers = {f"{name}/{key}": plain(value) for key, value in returned.items()}
        else:
            numbers = {name: returned}
        for key, value in numbers.items():
            if not is_number(value):
                raise DataError(
                    f"{title('metric', function)} returned {value!r} for {key!r}; return a finite number or a dict of "
                    "them, without the keys that couldn't be measured."
                )
        return {key: float(value) for key, value in numbers.items()}


@cache
def metric_class(function: Callable[..., Any]) -> type[FunctionMetric]:
    """The metric class of a function; parameters that aren't in `OFFERED` become the options of the entry.

    Raises ConfigError for a signature that can't be called so.
    """
    given, fields = signature_of("metric", function, tuple(OFFERED), FunctionMetric)
    model = make_model("metric", function, FunctionMetric, fields)
    model.function, model.given = staticmethod(function), given
    return model
