"""Common parts of the figures of a landscape: values, scales and labels."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hessfunc.algorithms.results.landscape import Landscape

Heights: TypeAlias = NDArray[np.float64]
Scale: TypeAlias = Literal["linear", "log"]

# Number of levels of the contours.
LEVELS = 15
# Ratio of the largest to the smallest loss above which the scale is logarithmic.
_WIDE = 50


def only_axis(landscape: Landscape, /) -> Tensor:
    """Return the coordinates of a landscape along one direction."""
    if landscape.y is not None:
        raise ValueError("the landscape is along two directions: use `contours` or `surface`")
    return landscape.x


def second_axis(landscape: Landscape, /) -> Tensor:
    """Return the coordinates on the second axis of a landscape along two directions."""
    if landscape.y is None:
        raise ValueError("the landscape is along one direction: use `curves`")
    if min(landscape.values.shape) < 2:
        raise ValueError(
            f"the landscape has {tuple(landscape.values.shape)} points: a surface needs at least "
            "2 x 2"
        )
    return landscape.y


def losses(landscape: Landscape, /) -> Heights:
    """Return the values, with NaN for each value that is not finite."""
    values = landscape.values.numpy()
    if not np.isfinite(values).any():
        raise ValueError(
            "the loss is not finite at any point of the landscape: pass a smaller `radius`"
        )
    return np.where(np.isfinite(values), values, np.nan)


def scaled(scale: Scale | None, values: Heights, /) -> Scale:
    """Return the given scale, or the scale that suits the range of the values."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if scale is None:
        return "log" if low > 0 and high > _WIDE * low else "linear"
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r}: choose 'linear' or 'log'")
    if scale == "log" and not low > 0:
        raise ValueError(f"the smallest loss is {low:.3g}: a log scale needs positive losses")
    return scale


def coordinate(landscape: Landscape, axis: int, /) -> str:
    """Return the label of an axis of coordinates, with its unit."""
    which = "along the" if landscape.y is None else ("first", "second")[axis]
    return f"{which} direction ({_unit(landscape, axis)})"


def aspect(landscape: Landscape, /) -> float:
    """Return the length of a unit of the second axis, in units of the first axis."""
    if landscape.normalise is not None:
        return 1.0
    first, second = landscape.lengths.tolist()
    return second / first if first > 0 and second > 0 else 1.0


def _unit(landscape: Landscape, axis: int) -> str:
    length = float(landscape.lengths[axis])
    if landscape.normalise == "filter":
        return "filter norms"
    return "distance" if abs(length - 1) < 1e-3 else f"times its length, {length:.3g}"
