"""Curves, contours and surfaces."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hessfunc import plot
from hessfunc.algorithms.results.landscape import Landscape
from tests.plot.conftest import bowl

plt = pytest.importorskip("matplotlib.pyplot")

PLANES = [plot.contours, plot.surface]


def test_labels_say_the_unit(line: Landscape, plane: Landscape) -> None:
    long = replace(line, lengths=torch.tensor([3.0]).double())
    assert plot.curves(long).get_xlabel() == "along the direction (times its length, 3)"
    assert plot.curves({"a": line, "b": long}).get_xlabel() == "along the direction"
    ax = plot.contours(replace(plane, normalise="filter"))
    assert ax.get_xlabel() == "first direction (filter norms)"
    assert ax.get_ylabel() == "second direction (filter norms)"


def test_equal_distances_look_equal(plane: Landscape) -> None:
    long = replace(plane, lengths=torch.tensor([1.0, 3.0]).double())
    assert plot.contours(long).get_aspect() == pytest.approx(3)
    assert plot.contours(replace(long, normalise="filter")).get_aspect() == 1
    # The plane is 4 x 2 units of the axes.
    for found, right in ((plane, 0.5), (long, 1.5)):
        across, along, _ = plot.surface(found)._box_aspect
        assert along / across == pytest.approx(right)


def test_a_wide_range_is_on_a_log_scale(plane: Landscape, steep: Landscape) -> None:
    assert plot.curves(bowl(100.0, along=1)).get_yscale() == "log"
    levels = plot.contours(steep).collections[0].levels
    assert np.allclose(levels[1:] / levels[:-1], levels[1] / levels[0])
    ticks = {text.get_text() for text in plot.surface(steep).get_zticklabels()}
    assert ticks == {"1", "10", "100"}
    linear = {text.get_text() for text in plot.surface(plane).get_zticklabels()}
    assert linear == {"1", "2", "3", "4", "5", "6"}
    assert np.allclose(
        np.diff(plot.contours(steep, scale="linear").collections[0].levels), 500 / 14
    )


@pytest.mark.parametrize("picture", PLANES)
def test_points_without_a_loss_are_left_out(picture: Callable[..., Any], plane: Landscape) -> None:
    values = plane.values.clone()
    values[0, 0], values[4, 2] = torch.inf, torch.nan
    ax = picture(replace(plane, values=values))
    ax.figure.draw_without_rendering()


@pytest.mark.parametrize("picture", PLANES)
@pytest.mark.parametrize("height", [0.0, 3.0])
def test_a_plateau_is_drawn(picture: Callable[..., Any], plane: Landscape, height: float) -> None:
    flat = replace(plane, values=torch.full_like(plane.values, height))
    picture(flat).figure.draw_without_rendering()


def test_the_other_dimension_is_refused(line: Landscape, plane: Landscape) -> None:
    with pytest.raises(ValueError, match="use `contours` or `surface`"):
        plot.curves(plane)
    for picture in PLANES:
        with pytest.raises(ValueError, match="use `curves`"):
            picture(line)
    with pytest.raises(ValueError, match=r"add_subplot\(projection='3d'\)"):
        plot.surface(plane, ax=plt.figure().add_subplot())
    with pytest.raises(ValueError, match="no landscape"):
        plot.curves({})


def test_what_cannot_be_drawn_is_refused(line: Landscape, plane: Landscape) -> None:
    thin = replace(plane, values=plane.values[:1], x=plane.x[:1])
    with pytest.raises(ValueError, match=r"\(1, 3\) points"):
        plot.contours(thin)
    with pytest.raises(ValueError, match="not finite at any point"):
        plot.curves(replace(line, values=line.values * torch.nan))
    with pytest.raises(ValueError, match="a log scale needs positive losses"):
        plot.curves(replace(line, values=line.values - 1), scale="log")
    with pytest.raises(ValueError, match="scale='cubic'"):
        plot.curves(line, scale="cubic")  # type: ignore[arg-type]
