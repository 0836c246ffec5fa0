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
        edge: Largest eigenvalue at which the optimiser's next step is stable on a quadratic; None
            where it is not known, as for Adam.
        preconditioned_edge: The same of the preconditioned sharpness; None for all but Adam.
        seconds: that it took.
    """

    step: int
    epoch: float | None = None
    lr: float | None = None
    edge: float | None = None
    preconditioned_edge: float | None = None
    seconds: float = 0.0
