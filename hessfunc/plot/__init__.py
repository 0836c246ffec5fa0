"""Figures of results, with matplotlib.

Each function draws a result on the Axes ``ax`` and returns them. Without ``ax``, it creates a new
pyplot figure; no other state of pyplot changes. `blocks` takes and returns an array of Axes, one
for each block. `trainings` takes no Axes: it returns a Figure with several Axes that is not
registered with pyplot.
"""

from hessfunc.plot.blocks import blocks
from hessfunc.plot.contours import contours
from hessfunc.plot.curves import curves
from hessfunc.plot.density import density
from hessfunc.plot.eigenvalues import eigenvalues
from hessfunc.plot.history import history
from hessfunc.plot.layers import layers
from hessfunc.plot.overlap import overlap
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
    "overlap",
    "tracked",
    "trainings",
]
