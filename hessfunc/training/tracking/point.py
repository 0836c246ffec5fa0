"""A point of a training."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.training.tracking.measuring import Measurement

__all__ = ["Point"]


@dataclass(frozen=True, kw_only=True)
class Point(Measurement):
    """A measurement, and when it was made.

    Attributes:
        step: steps of the optimiser before it.
        epoch: passes over the data before it; None where nobody told.
        lr: the learning rate of the step to come; None where nobody told.
        seconds: that it took.
    """

    step: int
    epoch: float | None = None
    lr: float | None = None
    seconds: float = 0.0
