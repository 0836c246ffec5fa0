"""Results as text, as HTML, as plain data and as tables."""

from hessfunc.display.displayed import VECTORS, Displayed, shown
from hessfunc.display.plain import plain
from hessfunc.display.progress import NOTHING, Achieved, Progress, Report, Reported, reporting
from hessfunc.display.sparkline import curve, pins

__all__ = [
    "NOTHING",
    "VECTORS",
    "Achieved",
    "Displayed",
    "Progress",
    "Report",
    "Reported",
    "curve",
    "pins",
    "plain",
    "reporting",
    "shown",
]
