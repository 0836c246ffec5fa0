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
    FIRST,
    QUIET,
    clean,
    draw_edge,
    legend,
    marker,
    new_axes,
    refuse_other,
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

    Raises:
        TypeError: If ``eigenvalues`` is not a mapping from steps to eigenvalues.
        ValueError: If there is nothing to draw, or if the number of eigenvalues changes.
    """
    refuse_other(
        eigenvalues, Mapping, "`history` takes {step: eigenvalues}, such as {0: lanczos(...)}"
    )
    steps = sorted(eigenvalues)
    values = _stacked([_values(eigenvalues[step]) for step in steps])
    intervals = _stacked([_intervals(eigenvalues[step]) for step in steps])
    ax = clean(new_axes() if ax is None else ax)
    several = values.shape[1] > 1
    colours = [shades()(0.2 + 0.55 * i / values.shape[1]) for i in range(values.shape[1])]
    for i, colour in enumerate(colours if several else [FIRST]):
        name = f"eigenvalue {i + 1}" if several else "eigenvalue"
        low, high = intervals[:, 2 * i], intervals[:, 2 * i + 1]
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        style: Any = {"color": colour, "linewidth": 1.6, "markersize": 3}
        ax.plot(steps, values[:, i], marker=marker(len(steps)), label=name, **style)
    if lr is not None:
        rates = dict.fromkeys(steps, lr) if isinstance(lr, float | int) else lr
        edges = {step: 2 / rate if rate else math.nan for step, rate in rates.items()}
        draw_edge(ax, edges, end=steps[-1], label="2 / lr")
    if bool((values < 0).any()):
        ax.axhline(0, color=QUIET, linewidth=0.8)
    ax.set(xlabel=against, ylabel="eigenvalue")
    legend(ax)
    return ax


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
