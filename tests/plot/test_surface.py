"""Losses on a plane, as a surface."""

from typing import Any

import numpy as np
import pytest

from hessfunc import plot
from hessfunc.algorithms.results.landscape import Landscape

plt = pytest.importorskip("matplotlib.pyplot")


def test_the_surface_is_the_loss(plane: Landscape, monkeypatch: pytest.MonkeyPatch) -> None:
    ax = plt.figure().add_subplot(projection="3d")
    drawn: list[Any] = []
    monkeypatch.setattr(ax, "plot_surface", lambda *grid, **_: drawn.extend(grid))
    plot.surface(plane, ax=ax)
    x, y, z = drawn
    np.testing.assert_allclose(z, 1 + x**2 + y**2)
    low, high = ax.get_zlim()
    assert low < 1
    assert high == pytest.approx(6)
