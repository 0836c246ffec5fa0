"""Loss and accuracy of trainings, against epochs and against their work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessfunc.files import write_whole
from hessfunc.plot.style import PALETTE, clean, legend
from hessfunc.training.history import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "trainings"]

# Of the training examples, and of the test examples.
_STYLES: dict[str, Any] = {"": "-", "test_": (0, (4, 3))}
_AGAINST = {"epoch": "epochs", "gradients": "gradient-equivalents"}


def trainings(runs: Sequence[Run], /) -> Figure:
    """One colour a method, one line a seed; of the test examples the lines are dashed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'hessfunc[plot]'") from None
    # A figure of its own, as commands write it to a file and never show it.
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, value in zip(panels, ("loss", "accuracy"), strict=True):
        row[0].set_ylabel(value)
        for ax, against in zip(row, _AGAINST, strict=True):
            _draw_on(ax, runs, value, against)
    for ax, name in zip(panels[1], _AGAINST.values(), strict=True):
        ax.set_xlabel(name)
    # Methods differ by orders of magnitude in what a step takes.
    panels[1, 1].set_xscale("symlog", linthresh=1)
    legend(panels[0, 0])
    return figure


def _draw_on(ax: Axes, runs: Sequence[Run], value: str, against: str) -> None:
    clean(ax)
    colours = dict(zip(dict.fromkeys(run.method for run in runs), cycle(PALETTE), strict=False))
    labelled: set[str] = set()
    for run in runs:
        at = [getattr(record, against) for record in run.records]
        for prefix, style in _STYLES.items():
            heights = [getattr(record, prefix + value) for record in run.records]
            if None not in heights:
                label = None if run.method in labelled else run.method
                labelled.add(run.method)
                colour = colours[run.method]
                ax.plot(at, heights, color=colour, linewidth=1.2, linestyle=style, label=label)


def draw(path: Path, runs: Sequence[Run], /) -> None:
    """Write the figure as a PNG."""
    figure = trainings(runs)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=160))
