"""Figure of trainings, against epochs and against gradient-equivalents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hessfunc.files import write_whole
from hessfunc.options import anything, validated
from hessfunc.plot.style import PALETTE, QUIET, clean, legend
from hessfunc.training.history import Run, is_tracked
from hessfunc.training.loop import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity: TypeAlias = Callable[[Record], float | None]

_SOLID: Any = "-"
_DASHED: Any = (0, (4, 3))
_AGAINST = {"epoch": "epochs", "gradients": "gradient-equivalents"}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Content of a row of Axes.

    Attributes:
        label: Label of the vertical axis.
        lines: Mapping from a line style to the quantity that is drawn in this style.
        scale: Scale of the vertical axis.
        of_epochs: Whether the quantity is constant within each epoch and has few values.
        height: Height of the row, in inches.
    """

    label: str
    lines: Mapping[Any, Quantity]
    scale: Literal["linear", "log"] = "linear"
    of_epochs: bool = False
    height: float = 2.4


def _rows(runs: Sequence[Run], batch_size: int | None) -> list[_Row]:
    loss = {_SOLID: lambda r: r.loss, _DASHED: lambda r: r.test_loss}
    accuracy = {_SOLID: lambda r: r.accuracy, _DASHED: lambda r: r.test_accuracy}
    rows = [_Row(label="loss", lines=loss), _Row(label="accuracy", lines=accuracy)]
    if not any(map(is_tracked, runs)):
        return rows
    step: Any = {"scale": "log", "of_epochs": True, "height": 1.6}
    return [
        *rows,
        _Row(
            label="|dominant eigenvalue|",
            lines={_SOLID: lambda r: abs(r.eigenvalue) if r.eigenvalue else None},
            scale="log",
        ),
        _Row(
            label="base batches a step" if batch_size is None else "batch size",
            lines={_SOLID: lambda r: r.ratio * (batch_size or 1)},
            **step,
        ),
        _Row(label="learning rate", lines={_SOLID: lambda r: r.lr}, **step),
    ]


@validated(runs=anything)
def trainings(runs: Sequence[Run], /, *, batch_size: int | None = None) -> Figure:
    """Draw trainings with one colour for each method and one line for each seed.

    Lines of test examples are dashed. If eigenvalues were measured, they are drawn too, with the
    batch size and the learning rate of each epoch.

    Args:
        runs: Trainings to draw.
        batch_size: Number of examples in a base batch. Without it, batch sizes are in base batches.

    Returns:
        A new Figure, which is not registered with pyplot.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is no run.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "figures need matplotlib: `pip install 'hessfunc[plot]'`"
        ) from None
    if not runs:
        raise ValueError("there is no training to draw: pass at least one run")
    rows = _rows(runs, batch_size)
    heights = [row.height for row in rows]
    # Commands write the figure to a file and never show it: keep it out of pyplot.
    figure = Figure(figsize=(6.4, sum(heights)), layout="constrained")
    panels = figure.subplots(len(rows), 2, sharex="col", sharey="row", height_ratios=heights)
    for row, panel in zip(rows, panels, strict=True):
        panel[0].set_ylabel(row.label)
        for ax, against in zip(panel, _AGAINST, strict=True):
            _draw_on(ax, runs, row, against)
    for ax, name in zip(panels[-1], _AGAINST.values(), strict=True):
        ax.set_xlabel(name)
    # The cost of a step differs by orders of magnitude between methods.
    panels[-1, 1].set_xscale("symlog", linthresh=1)
    panels[-1, 1].set_xlim(left=0)
    if any(record.test_loss is not None for run in runs for record in run.records):
        dashed: Any = {"color": QUIET, "linestyle": _DASHED, "linewidth": 1.2}
        panels[0, 0].plot([], [], label="test examples", **dashed)
    legend(panels[0, 0])
    return figure


def _draw_on(ax: Axes, runs: Sequence[Run], row: _Row, against: str) -> None:
    clean(ax)
    ax.set_yscale(row.scale)
    colours = dict(zip(dict.fromkeys(run.method for run in runs), cycle(PALETTE), strict=False))
    labelled: set[str] = set()
    shown: set[float] = set()
    for run in runs:
        for linestyle, quantity in row.lines.items():
            points = [(getattr(r, against), quantity(r)) for r in run.records]
            known = [(x, y) for x, y in points if y is not None]
            if not known:
                continue
            style: Any = {"color": colours[run.method], "linewidth": 1.2, "linestyle": linestyle}
            if run.method not in labelled:
                labelled.add(run.method)
                style["label"] = run.method
            if row.of_epochs:
                # A record belongs to the epoch that ends at its position.
                style["drawstyle"] = "steps-pre"
                shown |= {y for _, y in known}
            ax.plot(*zip(*known, strict=True), **style)
    if row.of_epochs:
        ax.set_yticks(sorted(shown), labels=[f"{value:.4g}" for value in sorted(shown)])
        ax.minorticks_off()


def draw(path: Path, runs: Sequence[Run], /, *, batch_size: int | None = None) -> None:
    """Write the figure of trainings to a PNG file."""
    figure = trainings(runs, batch_size=batch_size)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=160))
