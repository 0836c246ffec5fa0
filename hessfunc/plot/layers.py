"""Figure of traces by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from hessfunc.algorithms.results import Estimate, LeafEstimate
from hessfunc.algorithms.statistics import student_quantile
from hessfunc.options import anything, validated
from hessfunc.plot.style import (
    QUIET,
    clean,
    legend,
    new_axes,
    note,
    palette,
    refuse_other,
    series_colour,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Height of a bar, height of the margins, and width of the figure, in inches.
_BAR, _MARGIN, _WIDTH = 0.22, 1.0, 5.4
# Mark of the intervals of one run, and the distance of the next run below it.
_RUN, _BESIDE = "hessfunc layers", 0.22
_TAKES = "`layers` takes a trace, such as xtrace(matvec, params), or several"


@dataclass(frozen=True)
class _Bar:
    value: float
    low: float
    high: float


@validated(estimates=anything)
def layers(
    estimates: Estimate | Sequence[Estimate] | Mapping[str, Estimate],
    /,
    *,
    level: float = 0.95,
    quantity: str = "trace",
    ax: Axes | None = None,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw a trace by layer as bars with error bars, from the first layer to the last.

    Further runs on the same Axes are drawn as dots with error bars on the same rows.

    Args:
        estimates: Estimate whose ``by_leaf`` is drawn with the interval of each layer; or several
            estimates of one matrix with different seeds, whose ``by_leaf`` give the intervals; or a
            mapping with an estimate for each layer, which has its own interval.
        level: Confidence level of the intervals.
        quantity: Name of the estimated quantity, for the horizontal axis.
        ax: Axes to draw on; by default a new figure whose height fits the number of layers.
        label: Name of the run in the legend. Draw several runs on the same ``ax`` to compare them.
        color: Colour of the run; by default the next one of the Axes.

    Raises:
        TypeError: If ``estimates`` contains anything but estimates.
        ValueError: If there is no layer, if two estimates share a seed, if their layers
            or those of an earlier run on the Axes differ, or if the colour is unknown.
    """
    refuse_other(estimates, (Estimate, Sequence, Mapping), _TAKES)
    bars = _bars(estimates, level)
    if not bars:
        raise ValueError("the estimate has no parts by layer: its `by_leaf` is empty")
    ax = clean(new_axes((_WIDTH, _MARGIN + _BAR * len(bars))) if ax is None else ax)
    runs = sum(line.get_gid() == _RUN for line in ax.collections)
    if runs and [tick.get_text() for tick in ax.get_yticklabels()] != list(bars):
        raise ValueError("the Axes show other layers: draw runs with the same layers on one `ax`")
    colour = series_colour(ax, color)
    if runs:
        _draw_dots(ax, bars, colour, label, runs)
    else:
        _draw_bars(ax, bars, colour, label)
    ax.set(xlabel=quantity, ylim=(len(bars) - 0.4, -0.6))
    ax.margins(x=0.1)
    legend(ax)
    note(ax, _notes(estimates, level))
    return ax


def _draw_bars(ax: Axes, bars: Mapping[str, _Bar], colour: Any, label: str | None) -> None:
    """Draw the first run as bars, with their values beside them."""
    places = range(len(bars))
    ax.axvline(0, color=QUIET, linewidth=0.8)
    lengths = [bar.value for bar in bars.values()]
    ax.barh(places, lengths, height=0.72, color=colour, alpha=0.85, label=label)
    _draw_intervals(ax, places, bars, palette(ax)[1])
    for place, bar in zip(places, bars.values(), strict=True):
        ax.annotate(
            f"{bar.value:.3g}",
            (max(bar.value, bar.high, 0.0), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize="x-small",
            color=QUIET,
        )
    ax.set_yticks(places, list(bars))
    ax.tick_params(axis="y", length=0, labelsize="small")
    ax.spines["left"].set_visible(False)


def _draw_dots(
    ax: Axes, bars: Mapping[str, _Bar], colour: Any, label: str | None, before: int
) -> None:
    """Draw a further run as dots, below those of earlier runs on the same rows."""
    places = [place + _BESIDE * before for place in range(len(bars))]
    _draw_intervals(ax, places, bars, colour)
    style: Any = {"color": colour, "markersize": 5, "label": label}
    ax.plot([bar.value for bar in bars.values()], places, "o", **style)
    # The values of the first run would lie below the dots.
    for text in list(ax.texts):
        text.remove()


def _draw_intervals(
    ax: Axes, places: Sequence[float], bars: Mapping[str, _Bar], colour: Any
) -> None:
    ends = [bar.low for bar in bars.values()], [bar.high for bar in bars.values()]
    ax.hlines(places, *ends, color=colour, linewidth=1.6).set_gid(_RUN)


def _bars(
    estimates: Estimate | Sequence[Estimate] | Mapping[str, Estimate], level: float
) -> dict[str, _Bar]:
    if isinstance(estimates, Estimate):
        return {name: _part(value, level) for name, value in estimates.by_leaf.items()}
    several = list(estimates.values() if isinstance(estimates, Mapping) else estimates)
    for one in several:
        refuse_other(one, Estimate, _TAKES)
    if isinstance(estimates, Mapping):
        return {name: _Bar(one.value, *one.interval(level)) for name, one in estimates.items()}
    return _spread(several, level)


def _part(value: float, level: float) -> _Bar:
    """Return the bar of one layer, with its interval where its standard error is known."""
    if isinstance(value, LeafEstimate) and math.isfinite(value.stderr):
        return _Bar(value.value, *value.interval(level))
    return _Bar(value, value, value)


def _spread(estimates: Sequence[Estimate], level: float) -> dict[str, _Bar]:
    """Return the means over estimates, with Student's intervals."""
    if len(estimates) < 2 or len({one.seed for one in estimates}) < len(estimates):
        raise ValueError("intervals by layer need at least two estimates with different seeds")
    names = list(estimates[0].by_leaf)
    if any(list(one.by_leaf) != names for one in estimates):
        raise ValueError("the estimates have different layers: pass estimates of one matrix")
    # Half-width of the interval of the mean of m values: t_{m - 1} stdev / sqrt(m).
    quantile = student_quantile((1 + level) / 2, len(estimates) - 1) / math.sqrt(len(estimates))
    bars = {}
    for name in names:
        values = [one.by_leaf[name] for one in estimates]
        value, half = fmean(values), quantile * stdev(values)
        bars[name] = _Bar(value, value - half, value + half)
    return bars


def _notes(
    estimates: Estimate | Sequence[Estimate] | Mapping[str, Estimate], level: float
) -> list[str]:
    if isinstance(estimates, Estimate):
        low, high = estimates.interval(level)
        return [f"sum {estimates.value:.4g}", f"{level:.0%} interval {low:.4g} to {high:.4g}"]
    if isinstance(estimates, Mapping):
        return [f"{level:.0%} intervals"]
    return [f"mean of {len(estimates)} estimates", f"{level:.0%} intervals"]
