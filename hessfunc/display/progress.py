"""Progress of a run: a record after each round, for a function of the user's or for a bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from hessfunc.display.bars import bar_for


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """Numbers of a running result that show how far it is.

    Attributes:
        value: Current estimate, or first eigenvalue; None if the run has no such number yet.
        half_width: Half-width of the 95 % interval of the value; None if it is unknown.
        converged: Number of eigenpairs, columns or runs that have converged; None if not counted.
        wanted: Number of eigenpairs, columns or runs that must converge; None if not counted.
    """

    value: float | None = None
    half_width: float | None = None
    converged: int | None = None
    wanted: int | None = None


@dataclass(frozen=True, kw_only=True)
class Progress(Achieved):
    """State of a run after a round; ``str`` gives it as one line.

    Attributes:
        task: Name of the method or of the function.
        done: Number of matvecs so far, or of the units below.
        total: Budget, in the same unit; None if it is unknown. A run with a tolerance may stop
            earlier.
        unit: Unit of ``done`` and ``total``: ``"matvecs"``, ``"evaluations"``, ``"batches"``,
            ``"blocks"``, ``"columns"`` or ``"steps"``.
        seconds: Time since the run started or resumed, in seconds. It decides nothing.
    """

    task: str
    done: int
    total: int | None
    unit: str = "matvecs"
    seconds: float = 0.0

    @property
    def matvecs(self) -> int | None:
        """Number of matvecs so far; None for a run that counts another unit."""
        return self.done if self.unit == "matvecs" else None

    @property
    def budget(self) -> int | None:
        """Budget of matvecs; None for a run that counts another unit."""
        return self.total if self.unit == "matvecs" else None

    @property
    def detail(self) -> str:
        """Current estimate or number of converged pairs as text; empty if neither is known."""
        parts = []
        if self.value is not None and math.isfinite(self.value):
            known = self.half_width is not None and math.isfinite(self.half_width)
            parts.append(f"{self.value:.6g}" + (f" ± {self.half_width:.2g}" if known else ""))
        if self.converged is not None and self.wanted is not None:
            parts.append(f"{self.converged} of {self.wanted} converged")
        return ", ".join(parts)

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} {self.unit}", self.detail, f"{self.seconds:.0f} s"]
        return f"{self.task}: {', '.join(part for part in parts if part)}"


# Value of the option `progress`.
Reported: TypeAlias = bool | Callable[[Progress], object] | None


class Report(Protocol):
    """Function that reports the amount of work done so far, and what it has achieved."""

    def __call__(self, done: int, achieved: Achieved = ..., /) -> None: ...


@contextmanager
def reporting(
    progress: Reported, task: str, /, *, total: int | None, unit: str = "matvecs"
) -> Iterator[Report | None]:
    """Yield the function that reports the progress of a run, or None without progress.

    Args:
        progress: Function called with a `Progress`; True for a bar or lines on standard error.
        task: Name of the method or of the function.
        total: Budget, in units.
        unit: Unit of the work, in the plural.
    """
    if progress is None or progress is False:
        yield None
        return
    started = time.monotonic()
    bar = bar_for(task, total) if progress is True else None

    def report(done: int, achieved: Achieved = NOTHING, /) -> None:
        seconds = time.monotonic() - started
        record = Progress(
            task=task, done=done, total=total, unit=unit, seconds=seconds, **vars(achieved)
        )
        if bar is not None:
            bar.show(done, record.detail, str(record))
        elif callable(progress):
            progress(record)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


NOTHING = Achieved()
