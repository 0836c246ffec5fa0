import math

import pytest
import torch

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("agg")


@pytest.fixture(autouse=True)
def _close() -> None:
    plt.close("all")


@pytest.fixture
def density() -> Density:
    """A bulk around 0 and one outlier at 5, from two probes; the second ended early."""
    bulk = torch.linspace(-0.5, 0.5, 20, dtype=torch.float64)
    nodes = torch.cat([bulk, torch.tensor([5.0, 5.0])])
    weights = torch.cat([torch.full((20,), 0.0495), torch.tensor([0.01, 0.0])]).double()
    return Density(
        nodes=torch.stack([nodes, nodes]),
        weights=torch.stack([weights, weights]),
        n=100,
        matvecs=44,
        passes=22,
        reason="complete",
        seed=0,
    )


@pytest.fixture
def pairs() -> Eigenpairs:
    return Eigenpairs(
        values=torch.tensor([5.0, -0.5], dtype=torch.float64),
        vectors={"x": torch.eye(2, 100)},
        residuals=torch.tensor([1e-3, 0.2], dtype=torch.float64),
        converged=torch.tensor([True, False]),
        largest=5.0,
        matvecs=10,
        passes=10,
        reason="the budget is spent",
        seed=0,
    )


def sticks(ax: "plt.Axes") -> list[float]:
    return [float(segment[0][0]) for segment in ax.collections[-1].get_segments()]


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


def test_given_eigenvalues_are_the_sticks(density: Density, pairs: Eigenpairs) -> None:
    ax = plt.figure().add_subplot()
    assert plot.density(density, ax=ax, eigenvalues=pairs) is ax
    assert sticks(ax) == [5.0, -0.5]
    ax.figure.draw_without_rendering()


def test_one_point_mass_is_drawn(density: Density) -> None:
    point = Density(
        nodes=torch.zeros(1, 1, dtype=torch.float64),
        weights=torch.ones(1, 1, dtype=torch.float64),
        n=10,
        matvecs=1,
        passes=1,
        reason="complete",
        seed=0,
    )
    plot.density(point).figure.draw_without_rendering()


def test_eigenvalues_tell_converged_from_not(pairs: Eigenpairs) -> None:
    ax = plot.eigenvalues(pairs)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"converged", "not yet"} <= set(labels)
    ax.figure.draw_without_rendering()
