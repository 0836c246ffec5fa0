"""Folder with the results of an analysis."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.app.report.content import NAMES, Invocation, Part, Subject, as_text, content
from hessfunc.app.report.html import png
from hessfunc.app.report.sections import page
from hessfunc.files import write_bytes, write_text

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
    """Folder of one analysis, to which each part is written completely when it is finished.

    Attributes:
        path: Path of the folder.
        run: Invocation of the analysis.
        subject: Network and data, or None until they are known.
        parts: Finished parts.
        earlier: Names of the files of an earlier analysis, replaced with the first part.
        pictures: PNG pictures of parts, by name.
        status: Status of the analysis: running, complete, interrupted or failed.
    """

    path: Path
    run: Invocation
    subject: Subject | None = None
    parts: list[Part] = field(default_factory=list)
    earlier: tuple[str, ...] = ()
    pictures: dict[str, bytes] = field(default_factory=dict)
    status: str = "running"

    @property
    def content(self) -> dict[str, Any]:
        """Content of ``results.json``."""
        known = content(self.run, self.subject, self.parts, status=self.status)
        pictures = [f"{name}.png" for name in self.pictures]
        results = [f"{part.name}.npz" for part in self.parts]
        return known | {"files": [_RESULTS, _REPORT, *results, *pictures]}

    def begin(self) -> None:
        """Create the folder, and refuse to overwrite files that no analysis has written.

        Raises:
            ValueError: If a file would be overwritten that no earlier analysis has written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        existing = {name for name in _NAMES_OF_FILES if (self.path / name).exists()}
        self.earlier = _written_by_analysis(self.path / _RESULTS) if _RESULTS in existing else ()
        if others := sorted(existing.difference(self.earlier)):
            raise ValueError(
                f"--out {self.path} contains a {others[0]} that no analysis has written: choose "
                "another folder, or move that file"
            )

    def add(self, part: Part, /) -> None:
        """Write a finished part; the first part replaces an earlier analysis."""
        for name in self.earlier:
            (self.path / name).unlink(missing_ok=True)
        self.earlier = ()
        part.result.save(self.path / f"{part.name}.npz")
        if drawn := picture(part, self.parts):
            self.pictures[part.name] = drawn
            write_bytes(self.path / f"{part.name}.png", drawn)
        self.parts.append(part)
        self._write()

    def close(self, status: str, /) -> None:
        """Write the final status of an analysis that has begun: complete, interrupted or failed.

        An earlier analysis is kept if no part of this one is finished.
        """
        self.status = status
        if self.subject is not None and not self.earlier:
            self._write()

    def _write(self) -> None:
        data = self.content
        write_text(self.path / _RESULTS, as_text(data))
        write_text(self.path / _REPORT, page(data, self.pictures))


def _written_by_analysis(results: Path) -> tuple[str, ...]:
    """Return the files that ``results.json`` lists, or none if no analysis has written it."""
    try:
        listed = json.loads(results.read_bytes())["files"]
        return tuple(name for name in _NAMES_OF_FILES if name in listed)
    except (ValueError, TypeError, KeyError):
        return ()


def picture(part: Part, before: Iterable[Part], /) -> bytes | None:
    """Return the picture of a part as PNG, or None if it has no picture.

    Args:
        part: Part to draw.
        before: Earlier parts, whose eigenvalues are marked in the density.
    """
    # Labels are legible on a phone; a plane of equal axes is higher than a curve.
    height = 4.2 if part.name == "plane" else 3.5
    figure = Figure(figsize=(5.4, height), layout="compressed")
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
    return png(figure)
