"""Figure of the spectra of the diagonal blocks of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.options import anything, panels, validated
from hessfunc.plot.density import draw as draw_density
from hessfunc.plot.eigenvalues import draw as draw_eigenvalues
from hessfunc.plot.style import clean, grid, legend, note, refuse_other

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Width and height of one panel, in inches.
_PANEL = (2.7, 2.1)
_MOST_COLUMNS = 2


@validated(spectra=anything, ax=panels)
def blocks(
    spectra: Mapping[str, Density | Eigenpairs],
    /,
    *,
    ax: Iterable[Axes] | None = None,
    label: str | None = None,
    color: Any = None,
) -> NDArray[np.object_]:
    """Draw the spectrum of each diagonal block in its own panel, as `density` or `eigenvalues`.

    Each panel has its own scales, because the spectra differ by orders of magnitude.

    Args:
        spectra: Results by block, as `block_spectra` returns them.
        ax: Array of Axes, at least one for each block; by default a new figure.
        label: Name of the run in the legend of the first panel. Draw several runs on the same
            ``ax`` to compare them.
        color: Colour of the run; by default the next one of the Axes.

    Returns:
        The Axes of the blocks, ``(blocks,)``.

    Raises:
        TypeError: If ``spectra`` is not a mapping of results, or if a result is neither a `Density`
            nor `Eigenpairs`.
        ValueError: If there is no block, or if there are fewer Axes than blocks.
    """
    import numpy as np

    refuse_other(spectra, Mapping, "`blocks` takes results by block, as returned by block_spectra")
    if not spectra:
        raise ValueError("there is no block to draw: the mapping is empty")
    panels = _panels(len(spectra)) if ax is None else np.asarray(ax, dtype=object).ravel()
    if len(panels) < len(spectra):
        raise ValueError(
            f"{len(panels)} Axes are too few for {len(spectra)} blocks: pass one for each block"
        )
    for panel, (name, result) in zip(panels, spectra.items(), strict=False):
        _draw(clean(panel), name, result, label, color)
        panel.tick_params(labelsize="small")
        panel.locator_params(axis="x", nbins=4)
    if label is not None:
        legend(panels[0])
    return panels[: len(spectra)]


def _panels(count: int) -> NDArray[np.object_]:
    columns = min(count, _MOST_COLUMNS)
    rows = math.ceil(count / columns)
    panels = grid(rows, columns, (columns * _PANEL[0], rows * _PANEL[1] + 0.3))
    for unused in panels[count:]:
        unused.remove()
    return panels[:count]


def _draw(
    panel: Axes, name: str, result: Density | Eigenpairs, label: str | None, color: Any
) -> None:
    match result:
        case Density():
            run: Any = {"label": label, "color": color}
            draw_density(result, panel, width=result.width, eigenvalues=None, **run)
            labels = "eigenvalue", "density"
            note(panel, (name, f"n = {result.n:,}"))
        case Eigenpairs():
            draw_eigenvalues(result, panel, label=label, color=color)
            labels = "index", "eigenvalue"
            note(panel, (name,))
        case _:
            raise TypeError(
                f"the result of block {name!r} is a {type(result).__name__}: only a Density or "
                "Eigenpairs can be drawn"
            )
    panel.set_xlabel(labels[0], fontsize="small")
    panel.set_ylabel(labels[1], fontsize="small")
