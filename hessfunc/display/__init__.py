"""Results as text, as HTML, as plain data and as tables."""

from hessfunc.display.displayed import VECTORS, Displayed, shown
from hessfunc.display.plain import plain
from hessfunc.display.sparkline import curve, pins

__all__ = ["VECTORS", "Displayed", "curve", "pins", "plain", "shown"]
