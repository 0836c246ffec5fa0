"""The line above which training is not stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hessfunc.plot.style import DASHED, SECOND
from hessfunc.training.tracking.stability import stability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_edge"]


def draw_edge(
    ax: Axes,
    lr: Mapping[float, float],
    /,
    *,
    end: float,
    threshold: Callable[[float], float] = stability,
) -> None:
    """The threshold of the learning rate, 2 / lr, on Axes of curvature against steps.

    Args:
        ax: where to draw.
        lr: step -> the learning rate from there on; where it is 0 the line has a gap, and where
            there is no other there is no line.
        end: the step to which the line reaches at least.
        threshold: learning rate -> curvature.
    """
    if not any(lr.values()):
        return
    rates, last = dict(sorted(lr.items())), max(lr)
    rates.setdefault(max(last, end), lr[last])
    ax.plot(
        list(rates),
        [threshold(rate) if rate else math.nan for rate in rates.values()],
        color=SECOND,
        linewidth=1.2,
        linestyle=DASHED,
        drawstyle="steps-post",
        label="2 / lr" if threshold is stability else "edge of stability",
    )
