import math
from dataclasses import replace

import pytest
import torch

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs

plt = pytest.importorskip("matplotlib.pyplot")


def sticks(ax: "plt.Axes") -> list[float]:
    return [float(segment[0][0]) for segment in ax.collections[-1].get_segments()]


def band(ax: "plt.Axes") -> "plt.Collection":
    return next(one for one in ax.collections if "range of" in one.get_label())


def test_density_is_on_a_log_axis_with_its_outliers_as_sticks(density: Density) -> None:
    ax = plot.density(density)
    assert ax.get_yscale() == "log"
    assert sticks(ax) == [5.0, 5.0]
    assert f"width {density.width:.2g}" in ax.get_title(loc="left")
    low, high = ax.get_xlim()
    assert low < -0.5
    assert high > 5


def test_the_dashed_line_is_the_height_of_one_eigenvalue(density: Density) -> None:
    ax = plot.density(density, width=0.1)
    line = next(line for line in ax.lines if line.get_label() == "one eigenvalue")
    one = 1 / (density.n * 0.1 * math.sqrt(2 * math.pi))
    assert line.get_ydata()[0] == pytest.approx(one)
    # The outlier has weight 1 / n, and no neighbour.
    curve = next(line for line in ax.lines if line.get_label() == "density")
    right = curve.get_xdata() > 4
    assert curve.get_ydata()[right].max() == pytest.approx(one, rel=1e-2)


def test_the_band_reaches_from_the_lowest_probe_to_the_highest(density: Density) -> None:
    nodes = density.nodes + torch.tensor([[0.0], [0.3]])
    apart = Density(**{**vars(density), "nodes": nodes})
    ax = plot.density(apart, width=0.5)
    assert band(ax).get_label() == "range of 2 probes"
    x, y = band(ax).get_paths()[0].vertices.T
    singles = [
        Density(**{**vars(density), "nodes": n[None], "weights": w[None]})
        for n, w in zip(nodes, density.weights, strict=True)
    ]
    at = torch.tensor([0.0, 0.3, 1.0]).double()
    curves = torch.stack([one.pdf(at, 0.5) for one in singles])
    for place, low, high in zip(at, curves.amin(0), curves.amax(0), strict=True):
        near = abs(x - float(place)) < 0.01
        assert y[near].min() == pytest.approx(float(low), rel=0.05)
        assert y[near].max() == pytest.approx(float(high), rel=0.05)


def test_one_probe_has_no_band(density: Density) -> None:
    one = Density(**{**vars(density), "nodes": density.nodes[:1], "weights": density.weights[:1]})
    ax = plot.density(one)
    assert not any("range" in text.get_text() for text in ax.get_legend().get_texts())


def test_given_eigenvalues_are_the_sticks(density: Density, pairs: Eigenpairs) -> None:
    ax = plt.figure().add_subplot()
    assert plot.density(density, ax=ax, eigenvalues=pairs) is ax
    assert sticks(ax) == [5.0, -0.5]
    ax.figure.draw_without_rendering()


def test_eigenvalues_of_several_results_are_sticks(density: Density, pairs: Eigenpairs) -> None:
    smallest = replace(pairs, values=pairs.values[1:] - 1)
    ax = plot.density(density, eigenvalues=[pairs, smallest])
    assert sticks(ax) == [5.0, -0.5, -1.5]
    assert ax.get_xlim()[0] < -1.5
    assert sticks(plot.density(density, eigenvalues=[])) == [5.0, 5.0]


def test_one_point_mass_is_drawn(density: Density) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    point = Density(**{**vars(density), "nodes": 0 * one, "weights": one, "n": 10})
    plot.density(point).figure.draw_without_rendering()


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_a_width_that_is_not_positive_is_refused(density: Density, width: float) -> None:
    with pytest.raises(ValueError, match=f"width={width}: the width must be positive and finite"):
        plot.density(density, width=width)
    assert not plt.get_fignums()


def test_peaks_of_a_tiny_width_are_drawn_with_few_points(density: Density) -> None:
    width = 1e-9
    ax = plot.density(density, width=width)
    curve = next(line for line in ax.lines if line.get_label() == "density")
    x, y = map(torch.as_tensor, curve.get_data())
    assert len(x) < 2000
    assert bool((x.diff() > 0).all())
    nodes = density.nodes[density.weights > 0].unique()
    peaks = [float(y[(x - node).abs() < 0.01].max()) for node in nodes]
    assert peaks == pytest.approx(density.pdf(nodes, width).tolist())
    # A peak is as narrow as it should be.
    assert float(y[(x - 5 - width).abs().argmin()]) == pytest.approx(
        peaks[-1] * math.exp(-0.5), rel=1e-5
    )


def test_a_density_that_is_not_finite_is_refused(density: Density) -> None:
    with pytest.raises(ValueError, match="density is NaN or infinite"):
        plot.density(replace(density, nodes=density.nodes * math.nan))
