"""Run of a user's training whose curvature is tracked, in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hessfunc.algorithms.results.result import versions
from hessfunc.app.report.content import Invocation
from hessfunc.app.report.tracked import POINTS, RUN, picture, tracking
from hessfunc.files import write_bytes, write_text
from hessfunc.tracking import Points, Tracker, read, tracked
from hessfunc.training.history import refuse_other_settings


@dataclass
class Track:
    """Function that a training calls once, before its loop, to be tracked.

    Attributes:
        folder: Folder of the run, which is also a place for checkpoints of the training.
    """

    folder: Path
    _options: Mapping[str, Any]
    _stack: ExitStack
    _tracker: Tracker | None = None

    def __call__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        /,
        **options: Any,
    ) -> Tracker:
        """Return the tracker, whose ``step()`` the training calls after each step.

        Args:
            model: Module that is trained.
            criterion: Function ``(outputs, targets) -> scalar``.
            batches: Batches on which the curvature is measured.
            options: Options of `tracked`, such as ``optimizer``, ``compose`` or ``steps``, which
                override those of the command.

        Raises:
            ValueError: If the function is called twice, or an option is out of range.
        """
        if self._tracker is not None:
            raise ValueError("`track` tracks one model: call it once, before the loop")
        context = tracked(
            model, criterion, batches, out=self.folder / POINTS, **{**self._options, **options}
        )
        self._tracker = self._stack.enter_context(context)
        return self._tracker

    @property
    def is_used(self) -> bool:
        """Whether a training has called the function."""
        return self._tracker is not None


@dataclass
class TrackedRun:
    """Folder of a tracked training.

    Attributes:
        folder: Path of the folder, which must exist.
        invocation: Invocation of the run.
        settings: Settings of the run as plain data.
        status: Status of the run: running, complete, interrupted or failed.
    """

    folder: Path
    invocation: Invocation
    settings: Mapping[str, Any]
    status: str = "running"
    points: Points = field(default_factory=Points)

    def begin(self) -> None:
        """Write the run as running.

        Raises:
            ValueError: If the folder has a run with other settings.
        """
        path = self.folder / RUN
        if path.exists():
            try:
                stored = json.loads(path.read_bytes())["settings"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is damaged: remove it, or pass another --out") from None
            refuse_other_settings(path, stored, self.settings)
        self._write()

    def close(self, status: str, /) -> None:
        """Write the points, the figure and the report, if at least one point was measured."""
        self.status = status
        if (self.folder / POINTS).exists():
            self.points = read(self.folder / POINTS)
        self._write()
        if self.points:
            drawn = picture(self.points)
            write_bytes(self.folder / "tracked.png", drawn)
            page = tracking(self.points, self.content, drawn)
            write_text(self.folder / "report.html", page)

    @property
    def content(self) -> dict[str, Any]:
        """Plain data of the run, without its points."""
        return {
            "status": self.status,
            "run": asdict(self.invocation),
            "settings": dict(self.settings),
            "versions": versions(),
        }

    def _write(self) -> None:
        text = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        write_text(self.folder / RUN, text)
