"""Track the curvature of a model during training."""

from hessfunc.tracking.frozen import frozen
from hessfunc.tracking.measure import (
    Measurement,
    Point,
    Tracking,
    TrackingState,
    functional_tracker,
)
from hessfunc.tracking.points import Points
from hessfunc.tracking.tracker import Tracker, tracked
from hessfunc.tracking.writers import read

__all__ = [
    "Measurement",
    "Point",
    "Points",
    "Tracker",
    "Tracking",
    "TrackingState",
    "frozen",
    "functional_tracker",
    "read",
    "tracked",
]
