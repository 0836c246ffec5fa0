"""Points for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from hessfunc.training.tracking.point import Point

__all__ = ["ScalarWriter", "scalars", "summary_writer", "writing"]


class ScalarWriter(Protocol):
    """What is needed of torch's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...

    def flush(self) -> object: ...


def summary_writer(folder: str | os.PathLike[str], /) -> Any:
    """The SummaryWriter of torch.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "torch's SummaryWriter needs tensorboard: pip install tensorboard"
        ) from None
    return SummaryWriter(os.fspath(folder))


def writing(writer: ScalarWriter, /) -> Callable[[Point], None]:
    """A function that gives the scalars of a point to a writer."""

    def write(point: Point) -> None:
        for tag, value in scalars(point).items():
            writer.add_scalar(tag, value, point.step)
        writer.flush()

    return write


def scalars(point: Point, /) -> dict[str, float]:
    """The numbers of a point that are drawn, by tag."""
    found: dict[str, float | None] = {
        **{f"curvature/top {i}": value for i, value in enumerate(point.top, start=1)},
        **{f"curvature/bottom {i}": value for i, value in enumerate(point.bottom, start=1)},
        "curvature/trace": point.trace,
        "curvature/preconditioned": point.preconditioned,
        "curvature/critical": point.critical,
        "curvature/loss": point.loss,
        "curvature/matvecs": point.matvecs,
        "curvature/edge": point.edge,
        "curvature/preconditioned edge": point.preconditioned_edge,
    }
    if point.lr and point.edge is None and point.preconditioned_edge is None:
        # The optimiser is not known.
        found["curvature/2 over lr"] = 2 / point.lr
    return {tag: value for tag, value in found.items() if value is not None}
