"""The folder of an analysis."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.app.report.content import NAMES, Part, Run, Subject, as_text, content
from hessfunc.app.report.sections import page
from hessfunc.files import write_whole

_RESULTS = "results.json"


_REPORT = "report.html"


_NAMES_OF_FILES = (
    _RESULTS,
    _REPORT,
    *(f"{name}.npz" for name in NAMES),
    *(f"{name}.png" for name in ("density", "line", "plane")),
)


@dataclass
class Folder:
    """The folder of one analysis. Each part is there, whole, as soon as it is finished.

    Attributes:
        path: where it is.
        run: how the analysis was started.
        subject: what is analysed, once that is known.
        parts: those that are finished.
        earlier: Names of the files of an earlier analysis, replaced with the first part.
        pictures: of parts, by name, as PNG.
        status: running, complete, interrupted or failed.
    """

    path: Path
    run: Run
    subject: Subject | None = None
    parts: list[Part] = field(default_factory=list)
    earlier: tuple[str, ...] = ()
    pictures: dict[str, bytes] = field(default_factory=dict)
    status: str = "running"

    @property
    def content(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        known = content(self.run, self.subject, self.parts, status=self.status)
        pictures = [f"{name}.png" for name in self.pictures]
        results = [f"{part.name}.npz" for part in self.parts]
        return known | {"files": [_RESULTS, _REPORT, *results, *pictures]}

    def begin(self) -> None:
        """Make the folder, in which only an earlier analysis may have files of the same names.

        Raises:
            ValueError: The folder has a file that would be overwritten, and is not of an analysis.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        there = {name for name in _NAMES_OF_FILES if (self.path / name).exists()}
        self.earlier = _written_by_analysis(self.path / _RESULTS) if _RESULTS in there else ()
        if others := sorted(there.difference(self.earlier)):
            raise ValueError(
                f"--out {self.path} has a {others[0]} that no analysis has written: choose another "
                "folder, or move that file"
            )

    def add(self, part: Part, /) -> None:
        """Write a finished part; the first one takes the place of an earlier analysis."""
        for name in self.earlier:
            (self.path / name).unlink(missing_ok=True)
        self.earlier = ()
        part.result.save(self.path / f"{part.name}.npz")
        if drawn := picture(part, self.parts):
            self.pictures[part.name] = drawn
            self._put(f"{part.name}.png", drawn)
        self.parts.append(part)
        self._write()

    def close(self, status: str, /) -> None:
        """Write how the analysis has ended, complete, interrupted or failed, if it has begun.

        An earlier analysis stays where no part of this one is finished.
        """
        self.status = status
        if self.subject is not None and not self.earlier:
            self._write()

    def _write(self) -> None:
        found = self.content
        self._put(_RESULTS, as_text(found).encode())
        self._put(_REPORT, page(found, self.pictures).encode())

    def _put(self, name: str, data: bytes) -> None:
        write_whole(self.path / name, lambda file: file.write(data))


def _written_by_analysis(results: Path) -> tuple[str, ...]:
    """The files of an analysis, as its results list them; none where they are something else."""
    try:
        found = json.loads(results.read_bytes())["files"]
        return tuple(name for name in _NAMES_OF_FILES if name in found)
    except (ValueError, TypeError, KeyError):
        return ()


def picture(part: Part, before: Iterable[Part], /) -> bytes | None:
    """The picture of a part as a PNG, if it has one.

    Args:
        part: what is drawn.
        before: the parts that were finished before; eigenvalues are marked in the density.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    match part.result:
        case Density() as density:
            pairs = [p.result for p in before if isinstance(p.result, Eigenpairs)]
            plot.density(density, ax=figure.add_subplot(), eigenvalues=pairs)
        case Landscape(y=None) as line:
            plot.curves(line, ax=figure.add_subplot())
        case Landscape() as plane:
            plot.contours(plane, ax=figure.add_subplot())
        case _:
            return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return file.getvalue()
