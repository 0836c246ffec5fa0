"""Figure of eigenvalues during a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.algorithms.results import Eigenpairs
from hessfunc.options import anything, rates, validated
from hessfunc.plot.style import (
    PALETTE,
    QUIET,
    clean,
    draw_edge,
    legend,
    marker,
    new_axes,
    palette,
    refuse_other,
    series_colour,
    shades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values: TypeAlias = Eigenpairs | Tensor | Sequence[float] | float


@validated(eigenvalues=anything, lr=rates)
def history(
    eigenvalues: Mapping[float, Values],
    /,
    *,
    lr: Mapping[float, float] | float | None = None,
    against: str = "step",
    ax: Axes | None = None,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw eigenvalues against steps or epochs, one line for each index, and the line 2 / lr.

    Gradient descent with step size lr is stable on a quadratic whose eigenvalues are below 2 / lr.
    Intervals of `Eigenpairs` are drawn as a band.

    Args:
        eigenvalues: Mapping from a step or epoch to the eigenvalues at this point. NaN marks an
            eigenvalue that was not measured.
        lr: Step size of plain gradient descent, or a mapping from a step or epoch to the step size
            from there on. The line has a gap where it is 0. None draws no line.
        against: Label of the horizontal axis, ``"step"`` or ``"epoch"``.
        ax: Axes to draw on; by default a new figure.
        label: Name of the run in the legend. Draw several runs on the same ``ax`` to compare them.
        color: Colour of the run. By default, several eigenvalues on new Axes have shades of blue,
            and everything else the next colour of the Axes.

    Raises:
        TypeError: If ``eigenvalues`` is not a mapping from steps to eigenvalues.
        ValueError: If there is nothing to draw, if the number of eigenvalues changes, or if the
            colour is unknown.
    """
    refuse_other(
        eigenvalues, Mapping, "`history` takes {step: eigenvalues}, such as {0: lanczos(...)}"
    )
    steps = sorted(eigenvalues)
    values = _stacked([_values(eigenvalues[step]) for step in steps])
    intervals = _stacked([_intervals(eigenvalues[step]) for step in steps])
    ax = clean(new_axes() if ax is None else ax)
    count, own = values.shape[1], ax.has_data() or label is not None or color is not None
    colours = _colours(ax, count, color, shaded=not own)
    for i, colour in enumerate(colours):
        name = label or "eigenvalue"
        if count > 1:
            name = f"{label}, {i + 1}" if label else f"eigenvalue {i + 1}"
        low, high = intervals[:, 2 * i], intervals[:, 2 * i + 1]
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        style: Any = {"color": colour, "linewidth": max(0.8, 1.6 - 0.3 * i), "markersize": 3}
        ax.plot(steps, values[:, i], marker=marker(len(steps)), label=name, **style)
    if lr is not None:
        rates = dict.fromkeys(steps, lr) if isinstance(lr, float | int) else lr
        edges = {step: 2 / rate if rate else math.nan for step, rate in rates.items()}
        draw_edge(ax, edges, end=steps[-1], label="2 / lr", color=colours[0] if own else None)
    if bool((values < 0).any()):
        ax.axhline(0, color=QUIET, linewidth=0.8)
    ax.set(xlabel=against, ylabel="eigenvalue")
    legend(ax)
    return ax


def _colours(ax: Axes, count: int, color: Any, *, shaded: bool) -> list[Any]:
    """Return the colours of the lines of a run: shades, or lighter and lighter tints of one."""
    if shaded and count > 1 and palette(ax) is PALETTE:
        return [shades()(0.2 + 0.55 * i / count) for i in range(count)]
    from matplotlib.colors import to_rgba

    colour = to_rgba(series_colour(ax, color))
    return [(*colour[:3], colour[3] * (1 - 0.6 * i / count)) for i in range(count)]


def _values(eigenvalues: Values) -> Tensor:
    values = eigenvalues.values if isinstance(eigenvalues, Eigenpairs) else eigenvalues
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(-1)


def _intervals(eigenvalues: Values) -> Tensor:
    if isinstance(eigenvalues, Eigenpairs):
        return eigenvalues.intervals.cpu().reshape(-1)
    return _values(eigenvalues).repeat_interleave(2)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    if len({len(row) for row in rows}) != 1:
        raise ValueError(
            "a history needs at least one step and the same number of eigenvalues at each: mark "
            "missing ones with NaN"
        )
    return torch.stack(list(rows))
