"""Output of commands: results on standard output, and progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hessfunc.app.cli.ranks import speaks
from hessfunc.app.terminal import Output, print_parts

if TYPE_CHECKING:
    from hessfunc.training.loop import Record


class Bars(Progress):
    """Progress bars of one command, which disappear when it ends.

    Attributes:
        lines: Lines that replace the bars where standard error is no terminal; None for silence.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # The package of results imports torch, for which --help does not wait.
        from hessfunc.display.bars import Lines

        console = Console(stderr=True)
        speaking = speaks() and not quiet
        self.lines = Lines() if speaking and not console.is_terminal else None
        self._speaking = speaking
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
            disable=not (speaking and console.is_terminal),
        )

    def say(self, text: str, /) -> None:
        """Print a line that stays, above the bars."""
        if self._speaking:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def bar(progress: Bars, name: str, /) -> Callable[[float, str], None]:
    """Add a bar, and return the function ``(fraction, detail)`` that updates it.

    The fraction is in [0, 1]. Without a terminal, the state is one line every 30 seconds.
    """
    task = progress.add_task(name, total=1.0, detail="")

    def tick(fraction: float, detail: str) -> None:
        progress.update(task, completed=fraction, detail=detail)
        if progress.lines is not None:
            seconds = progress.tasks[task].elapsed or 0.0
            parts = [f"{fraction:.0%}", detail, f"{seconds:.0f} s"]
            progress.lines.show(0, "", f"{name}: {', '.join(filter(None, parts))}")

    return tick


_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextmanager
def results_alone() -> Iterator[None]:
    """Keep standard output for the results; all else that is printed goes to standard error."""
    token = _results.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


def show(output: Output, /, *, as_json: bool, quiet: bool) -> None:
    """Print the results of a command, or their plain data as JSON."""
    if not speaks():
        return
    if as_json:
        typer.echo(json.dumps(output.content, indent=2, allow_nan=False), file=_results.get())
    elif not quiet:
        print_parts(output.parts)


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
