"""Progress bars on standard error, shown only on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hessfunc.app.cli.ranks import speaks

if TYPE_CHECKING:
    from hessfunc.training.loop import Record


def bars() -> Progress:
    """Return the progress bars of one command, which disappear when it ends."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
        disable=not (console.is_terminal and speaks()),
    )


def bar(progress: Progress, name: str, /) -> Callable[[float, str], None]:
    """Add a bar, and return the function ``(fraction, detail)`` that updates it.

    The fraction is in [0, 1].
    """
    task = progress.add_task(name, total=1.0, detail="")
    return lambda fraction, detail: progress.update(task, completed=fraction, detail=detail)


def line(record: Record, /) -> str:
    """Return the state of a training run on one line."""
    tested = "" if record.test_accuracy is None else f" (test {record.test_accuracy:.1%})"
    several = "" if record.ratio == 1 else f"{record.ratio} batches a step, "
    curved = "" if record.eigenvalue is None else f"eigenvalue {record.eigenvalue:.4g}, "
    return (
        f"epoch {record.epoch:g}: loss {record.loss:.4f}, accuracy {record.accuracy:.1%}{tested}, "
        f"{several}{curved}"
        f"{record.gradients:,.0f} gradient-equivalents, {record.seconds:.1f} s"
    )


def finished_fraction(record: Record, epochs: int, minutes: float | None, /) -> float:
    """Return the finished fraction of a training run, in [0, 1]."""
    of_time = 0.0 if minutes is None else record.seconds / max(60 * minutes, 1e-9)
    return min(1.0, max(record.epoch / epochs, of_time))
