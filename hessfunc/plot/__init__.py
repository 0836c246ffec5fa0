"""Figures of results, with matplotlib.

Each function takes a result, draws it on the Axes ``ax`` and returns them; without ``ax`` it makes
a new figure of pyplot, which is otherwise left alone. `blocks` takes and returns an array of Axes,
one a block. `trainings` takes no Axes: it returns a Figure of several, which pyplot does not know.
"""

from hessfunc.plot.blocks import blocks
from hessfunc.plot.contours import contours
from hessfunc.plot.curves import curves
from hessfunc.plot.density import density
from hessfunc.plot.eigenvalues import eigenvalues
from hessfunc.plot.history import history
from hessfunc.plot.layers import layers
from hessfunc.plot.surface import surface
from hessfunc.plot.tracked import tracked
from hessfunc.plot.trainings import trainings

__all__ = [
    "density",
    "eigenvalues",
    "history",
    "layers",
    "blocks",
    "curves",
    "contours",
    "surface",
    "tracked",
    "trainings",
]
