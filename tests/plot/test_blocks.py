from typing import Any

import pytest

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs
from tests.plot.test_layers import ONE

plt = pytest.importorskip("matplotlib.pyplot")


def test_each_block_has_a_panel(density: Density, pairs: Eigenpairs) -> None:
    panels = plot.blocks({"a": density, "b": pairs, "c": density, "d": pairs, "e": density})
    assert panels.shape == (5,)
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == ["a · n = 100", "b", "c · n = 100", "d", "e · n = 100"]
    assert [panel.get_yscale() for panel in panels[:2]] == ["log", "linear"]
    figure = panels[0].figure
    assert len(figure.axes) == 5
    figure.draw_without_rendering()


def test_axes_may_be_more_than_blocks(density: Density) -> None:
    axes = plt.figure().subplots(2, 2)
    panels = plot.blocks({"a": density, "b": density, "c": density}, ax=axes)
    assert list(panels) == list(axes.ravel()[:3])
    assert not axes[1, 1].lines


@pytest.mark.parametrize(
    ("count", "axes", "error", "message"),
    [
        (0, 1, ValueError, "no block"),
        (3, 2, ValueError, "2 Axes are too few for 3 blocks"),
    ],
)
def test_too_few_are_refused(
    count: int, axes: int, error: Any, message: str, density: Density
) -> None:
    given = plt.figure().subplots(1, axes, squeeze=False)
    with pytest.raises(error, match=message):
        plot.blocks({str(i): density for i in range(count)}, ax=given)


def test_other_results_are_refused() -> None:
    with pytest.raises(TypeError, match="block 'a' is a Estimate"):
        plot.blocks({"a": ONE})  # type: ignore[dict-item]
