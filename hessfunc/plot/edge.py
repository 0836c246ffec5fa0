"""The line above which training is not stable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hessfunc.plot.style import DASHED, SECOND

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_edge(ax: Axes, edges: Mapping[float, float], /, *, end: float, label: str) -> None:
    """The edge of stability, on Axes of curvature against steps.

    Args:
        ax: where to draw.
        edges: step -> the edge from there on; where it is not finite the line has a gap, and where
            none is finite there is no line.
        end: the step to which the line reaches at least.
        label: Name of the line.
    """
    if not any(map(math.isfinite, edges.values())):
        return
    drawn, last = dict(sorted(edges.items())), max(edges)
    drawn.setdefault(max(last, end), edges[last])
    ax.plot(
        list(drawn),
        [edge if math.isfinite(edge) else math.nan for edge in drawn.values()],
        color=SECOND,
        linewidth=1.2,
        linestyle=DASHED,
        drawstyle="steps-post",
        label=label,
    )
