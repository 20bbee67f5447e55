"""The pictures of stage 4: rewards before and after the filter, and which states each ranking keeps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"group": "#1f6f4a", "value": "#c27a1a", "reward": "#2f5f93"}
_BEFORE = "#b9b4a8"

#: (name of the axis, value of every reply, bounds of the bins).
Panel = tuple[str, Sequence[float], NDArray[np.float64]]


def rewards(valid: Sequence[float], kept: Sequence[float], rank: str) -> bytes:
    """A PNG: the rewards of all valid replies, and of those that are kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    bins = np.histogram_bin_edges(valid, bins=40).tolist()
    axes.hist(valid, bins=bins, color=_BEFORE, label=f"valid ({len(valid):,})")
    axes.hist(kept, bins=bins, color=_COLOURS[rank], label=f"kept by {rank} ({len(kept):,})")
    axes.set(xlabel="reward of the step", ylabel="replies", title="Rewards before and after the filter")
    axes.legend(frameon=False)
    return _png(figure)


def states(panels: Sequence[Panel], valid: Sequence[int], kept: Mapping[str, Sequence[int]]) -> bytes:
    """A PNG: the share of the valid replies (indices) that each ranking keeps, over the bins of each panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for number, (label, values, edges) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        every = np.histogram([values[i] for i in valid], edges)[0]
        for rank, chosen in kept.items():
            share = np.histogram([values[i] for i in chosen], edges)[0] / np.maximum(every, 1)
            axes.stairs(share, edges.tolist(), label=rank, color=_COLOURS[rank], linewidth=1.8)
        axes.set(xlabel=label, ylabel="share that is kept", ylim=(0, 1))
    figure.axes[-1].legend(frameon=False, title="ranked by")
    figure.suptitle("Which states are kept")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
