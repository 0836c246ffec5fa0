from collections.abc import Callable
from typing import Any

import pytest

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs


@pytest.mark.parametrize(
    ("picture", "takes"),
    [
        (plot.layers, "takes a trace, such as xtrace"),
        (plot.eigenvalues, "takes the result of lanczos"),
        (plot.history, r"takes \{step: eigenvalues\}"),
        (plot.blocks, "takes results by block, as returned by block_spectra"),
        (plot.curves, "takes a landscape"),
        (plot.contours, "takes a landscape"),
        (plot.surface, "takes a landscape"),
        (plot.tracked, "takes points, as in tracker.points"),
    ],
)
def test_a_density_in_place_of_another_result_is_refused(
    picture: Callable[[Any], object], takes: str, density: Density
) -> None:
    with pytest.raises(TypeError, match=f"`{picture.__name__}` {takes}.*but got a Density"):
        picture(density)


@pytest.mark.parametrize(
    ("picture", "takes"),
    [
        (plot.density, "takes a density, as returned by slq"),
        (lambda pairs: plot.layers([pairs, pairs]), "takes a trace"),
        (lambda pairs: plot.layers({"a": pairs}), "takes a trace"),
        (lambda pairs: plot.curves({"a": pairs}), "takes a landscape"),
        (lambda pairs: plot.tracked([pairs]), "takes points"),
    ],
)
def test_eigenpairs_in_place_of_another_result_are_refused(
    picture: Callable[[Any], object], takes: str, pairs: Eigenpairs
) -> None:
    with pytest.raises(TypeError, match=f"{takes}.*but got a Eigenpairs"):
        picture(pairs)
