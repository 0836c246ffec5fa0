"""Progress bars in terminals and notebooks, and lines where neither shows them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any, Protocol

# Time between two lines where no bar can be drawn, in seconds.
EVERY = 30.0


class Bar(Protocol):
    """Display of the progress of one run."""

    def show(self, done: int, detail: str, line: str, /) -> None:
        """Show the amount of work done, a detail beside the bar, or all of it as one line."""

    def close(self) -> None:
        """End the display."""


def bar_for(task: str, total: int | None, /) -> Bar:
    """Return the display that suits the place in which the program runs.

    A terminal gets the bar of rich, a notebook the bar of tqdm or of rich, and everything else a
    line on standard error every 30 seconds. Ranks other than rank 0 are silent.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return Silent()
    with contextlib.suppress(ImportError):
        if in_notebook():
            with contextlib.suppress(ImportError):
                return NotebookBar(task, total)
            return TerminalBar(task, total)
        if sys.stderr.isatty():
            return TerminalBar(task, total)
    return Lines()


def in_notebook() -> bool:
    """Return whether the program runs in a Jupyter kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class Silent:
    """No display."""

    def show(self, done: int, detail: str, line: str, /) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """Lines on standard error, every 30 seconds, and a last one if there was any."""

    def __init__(self) -> None:
        self._written = time.monotonic()
        self._pending: str | None = None
        self._any = False

    def show(self, done: int, detail: str, line: str, /) -> None:
        self._pending = line
        if time.monotonic() - self._written >= EVERY:
            self._write()

    def _write(self) -> None:
        if self._pending is not None:
            print(self._pending, file=sys.stderr, flush=True)
        self._written, self._pending, self._any = time.monotonic(), None, True

    def close(self) -> None:
        if self._any:
            self._write()


class TerminalBar:
    """Bar of rich, which stays after the end of the run."""

    def __init__(self, task: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._bars.add_task(task, total=total, detail="")
        self._bars.start()

    def show(self, done: int, detail: str, line: str, /) -> None:
        self._bars.update(self._task, completed=done, detail=detail)

    def close(self) -> None:
        self._bars.stop()


class NotebookBar:
    """Bar of tqdm for notebooks, which needs ipywidgets."""

    def __init__(self, task: str, total: int | None) -> None:
        import ipywidgets  # noqa: F401
        from tqdm.notebook import tqdm

        self._bar: Any = tqdm(total=total, desc=task)

    def show(self, done: int, detail: str, line: str, /) -> None:
        self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()
