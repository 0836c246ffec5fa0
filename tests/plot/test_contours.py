"""Losses on a plane, as contours."""

import numpy as np
import torch

from hessfunc import plot
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.recipes.landscape import landscape


def test_contours_cover_the_range_of_the_loss(plane: Landscape) -> None:
    ax = plot.contours(plane)
    levels = ax.collections[0].levels
    assert (levels[0], levels[-1]) == (1, 6)
    assert np.allclose(np.diff(levels), levels[1] - levels[0])
    assert ax.get_aspect() == 1
    assert ax.get_xlim() == (-2, 2)
    assert ax.get_ylim() == (-1, 1)


def test_nothing_of_a_square_plane_is_cut() -> None:
    plane = landscape(
        lambda w, _: 0.01 + w[0] ** 2 + 10 * w[1] ** 2,
        torch.zeros(2),
        [torch.ones(1)],
        torch.eye(2),
        radius=1.5,
        points=5,
        normalise="unit",
    )
    figure = plot.contours(plane).figure
    figure.canvas.draw()
    inside = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert inside.x0 >= 0
    assert inside.y0 >= 0
    assert inside.x1 <= figure.bbox.x1
    assert inside.y1 <= figure.bbox.y1
