"""The exponent of a power law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Power(NamedTuple):
    """cost = factor size^exponent, and the standard error of the exponent."""

    factor: float
    exponent: float
    stderr: float


def power(sizes: Sequence[float], costs: Sequence[float]) -> Power:
    """The line of least squares through the logarithms of two or more points.

    Two points leave no error to be seen: the standard error is infinite then.
    """
    x, y = np.log(sizes), np.log(costs)
    moved = x - x.mean()
    spread = float(moved @ moved)
    exponent = float(moved @ y) / spread
    left = y - y.mean() - exponent * moved
    freedom = len(x) - 2
    stderr = float(np.sqrt(left @ left / freedom / spread)) if freedom else float("inf")
    return Power(float(np.exp(y.mean() - exponent * x.mean())), exponent, stderr)
