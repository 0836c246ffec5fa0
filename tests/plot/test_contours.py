"""Losses on a plane, as contours."""

import numpy as np

from hessfunc import plot
from hessfunc.algorithms.results.landscape import Landscape


def test_contours_cover_the_range_of_the_loss(plane: Landscape) -> None:
    ax = plot.contours(plane)
    levels = ax.collections[0].levels
    assert (levels[0], levels[-1]) == (1, 6)
    assert np.allclose(np.diff(levels), levels[1] - levels[0])
    assert ax.get_aspect() == 1
    assert ax.get_xlim() == (-2, 2)
    assert ax.get_ylim() == (-1, 1)
