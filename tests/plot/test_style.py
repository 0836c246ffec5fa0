"""What all pictures have in common."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.plot.style import DARK_PALETTE, PALETTE, QUIET, clean, palette, series_colour, shades
from hessfunc.tracking import Point
from tests.plot.test_layers import ONE

plt = pytest.importorskip("matplotlib.pyplot")

# Linear RGB as seen by people without the cones of one kind (Machado et al. 2009, severity 1).
SEEN = {
    "all": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def cielab(colour: Any, seen: str) -> np.ndarray:
    rgb = np.array(plt.matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.asarray(SEEN[seen]) @ linear, 0, 1) / XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("colours", [PALETTE, DARK_PALETTE], ids=["light", "dark"])
@pytest.mark.parametrize("seen", SEEN)
def test_colours_are_told_apart_by_everyone(seen: str, colours: tuple[str, ...]) -> None:
    found = [cielab(colour, seen) for colour in colours]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(found, 2)) > 25


@pytest.mark.parametrize("seen", SEEN)
def test_shades_become_lighter_steadily(seen: str) -> None:
    lightness = [cielab(shades()(place), seen)[0] for place in np.linspace(0, 1, 33)]
    assert min(np.diff(lightness)) > 0.5


@pytest.fixture(params=["density", "eigenvalues", "history", "layers", "curves", "contours"])
def drawn(
    request: pytest.FixtureRequest,
    density: Density,
    pairs: Eigenpairs,
    line: Landscape,
    plane: Landscape,
) -> Callable[..., Any]:
    result: Any = {
        "density": density,
        "eigenvalues": pairs,
        "history": {0: pairs, 1: pairs},
        "layers": ONE,
        "curves": line,
        "contours": plane,
    }[request.param]
    return lambda **options: getattr(plot, request.param)(result, **options)


def test_pyplot_is_left_alone_where_axes_are_given(drawn: Callable[..., Any]) -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    before = plt.rcParams.copy()
    assert drawn(ax=ax) is ax
    assert plt.get_fignums() == []
    assert plt.rcParams == before
    ax.figure.draw_without_rendering()


def test_without_axes_there_is_a_new_figure(drawn: Callable[..., Any]) -> None:
    ax = drawn()
    assert plt.get_fignums() == [1]
    assert ax.get_xlabel()
    assert not ax.spines["top"].get_visible()
    ax.figure.draw_without_rendering()


def test_a_surface_leaves_pyplot_alone_too(plane: Landscape) -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot(projection="3d")
    assert plot.surface(plane, ax=ax) is ax
    assert plt.get_fignums() == []
    ax.figure.draw_without_rendering()


def test_the_random_stream_stays(drawn: Callable[..., Any]) -> None:
    before = torch.get_rng_state()
    drawn()
    assert torch.equal(torch.get_rng_state(), before)


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
    with pytest.raises(TypeError, match=f"{takes}.*but got an Eigenpairs"):
        picture(pairs)


# Plots that take a name and a colour of the run; a surface needs Axes of three dimensions.
def runs(
    density: Density, pairs: Eigenpairs, line: Landscape, plane: Landscape
) -> dict[str, tuple[Callable[..., Any], Any]]:
    points = [
        Point(loss=1.0, step=step, top=(3.0 + step,), top_residuals=(0.1,)) for step in range(3)
    ]
    return {
        "density": (plot.density, density),
        "eigenvalues": (plot.eigenvalues, pairs),
        "history": (plot.history, {0: [1.0, 0.5], 1: [2.0, 1.0]}),
        "layers": (plot.layers, ONE),
        "curves": (plot.curves, line),
        "contours": (plot.contours, plane),
        "surface": (plot.surface, plane),
        "tracked": (plot.tracked, points),
        "blocks": (plot.blocks, {"a": density, "b": pairs}),
    }


RUNS = ["density", "eigenvalues", "history", "layers", "curves", "contours", "surface", "tracked"]


def panel(drawn: Any) -> Any:
    return drawn[0] if isinstance(drawn, np.ndarray) else drawn


def colours(ax: Any) -> list[tuple[float, ...]]:
    """The colours of the entries of the legend."""
    handles = ax.get_legend().legend_handles
    found = []
    for handle in handles:
        colour = handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()
        found.append(tuple(plt.matplotlib.colors.to_rgba(colour)[:3]))
    return found


@pytest.mark.parametrize("name", [*RUNS, "blocks"])
def test_several_runs_on_the_same_axes_have_names_and_colours(
    name: str, density: Density, pairs: Eigenpairs, line: Landscape, plane: Landscape
) -> None:
    picture, result = runs(density, pairs, line, plane)[name]
    ax = picture(result, label="first")
    picture(result, ax=ax, label="second")
    picture(result, ax=ax, label="third", color="tab:pink")
    one = panel(ax)
    named = dict(
        zip([text.get_text() for text in one.get_legend().get_texts()], colours(one), strict=True)
    )
    by_run = {
        run: next(c for text, c in named.items() if text.startswith(run))
        for run in ("first", "second", "third")
    }
    assert len(set(by_run.values())) == 3
    assert by_run["third"] == pytest.approx(plt.matplotlib.colors.to_rgb("tab:pink"))
    one.figure.draw_without_rendering()


@pytest.mark.parametrize("name", [*RUNS, "blocks"])
def test_an_unknown_colour_is_named(
    name: str, density: Density, pairs: Eigenpairs, line: Landscape, plane: Landscape
) -> None:
    picture, result = runs(density, pairs, line, plane)[name]
    with pytest.raises(ValueError, match="color='nocolour' is no colour of matplotlib"):
        picture(result, color="nocolour")


@pytest.mark.parametrize("name", [*RUNS, "blocks"])
def test_texts_are_readable_on_a_phone(
    name: str, density: Density, pairs: Eigenpairs, line: Landscape, plane: Landscape
) -> None:
    picture, result = runs(density, pairs, line, plane)[name]
    figure = panel(picture(result, label="run")).figure
    scale = 390 / (72 * figure.get_size_inches()[0])
    sizes = [
        text.get_fontsize() * scale
        for text in figure.findobj(plt.matplotlib.text.Text)
        if text.get_text().strip()
    ]
    assert min(sizes) >= 6.5


@pytest.mark.parametrize("name", [*RUNS, "blocks"])
def test_figures_suit_a_dark_style(
    name: str, density: Density, pairs: Eigenpairs, line: Landscape, plane: Landscape
) -> None:
    picture, result = runs(density, pairs, line, plane)[name]
    with plt.style.context({"figure.facecolor": "#111", "axes.facecolor": "#111"}):
        ax = panel(picture(result, label="run"))
        assert palette(ax) == DARK_PALETTE
        for line_ in ax.lines:
            if name not in ("contours", "surface") and line_.get_color() != QUIET:
                light = cielab(plt.matplotlib.colors.to_rgb(line_.get_color()), "all")[0]
                assert light > 40


def test_transparent_figures_follow_the_colour_of_the_text() -> None:
    with plt.style.context({"figure.facecolor": "none", "axes.facecolor": "none"}):
        assert palette(plt.figure().add_subplot()) == PALETTE
    with plt.style.context(
        {"figure.facecolor": "none", "axes.facecolor": "none", "text.color": "white"}
    ):
        assert palette(plt.figure().add_subplot()) == DARK_PALETTE


def test_a_cycle_of_the_user_stays() -> None:
    with plt.style.context({"axes.prop_cycle": plt.cycler(color=["#ff0000", "#00ff00"])}):
        ax = clean(plt.figure().add_subplot())
        assert [series_colour(ax) for _ in range(3)] == ["#ff0000", "#00ff00", "#ff0000"]
        assert not ax.lines
