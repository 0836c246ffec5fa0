"""The pictures of an analysis."""

from __future__ import annotations

import io
from collections.abc import Iterable

from matplotlib.figure import Figure

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.app.report.content import Part
from hessfunc.recipes.landscape import Landscape


def picture(part: Part, before: Iterable[Part], /) -> bytes | None:
    """The picture of a part as a PNG, if it has one.

    Args:
        part: what is drawn.
        before: the parts that were finished before; eigenvalues are marked in the density.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    match part.result:
        case Density() as density:
            pairs = [p.result for p in before if isinstance(p.result, Eigenpairs)]
            plot.density(density, ax=figure.add_subplot(), eigenvalues=pairs)
        case Landscape(y=None) as line:
            plot.curves(line, ax=figure.add_subplot())
        case Landscape() as plane:
            plot.contours(plane, ax=figure.add_subplot())
        case _:
            return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return file.getvalue()
