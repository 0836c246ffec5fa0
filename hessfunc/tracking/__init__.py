"""Curvature that is watched while a model trains."""

from hessfunc.tracking.measure import (
    Measurement,
    Point,
    Tracking,
    TrackingState,
    stability,
    tracking,
)
from hessfunc.tracking.tracker import Tracker, tracked
from hessfunc.tracking.writers import read

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
