"""Curvature that is watched while a model trains."""

from hessfunc.training.tracking.lines import read
from hessfunc.training.tracking.measuring import Measurement, Tracking, TrackingState, tracking
from hessfunc.training.tracking.point import Point
from hessfunc.training.tracking.stability import stability
from hessfunc.training.tracking.tracker import Tracker, tracked

__all__ = [
    "Measurement",
    "Point",
    "Tracker",
    "Tracking",
    "TrackingState",
    "read",
    "stability",
    "tracked",
    "tracking",
]
