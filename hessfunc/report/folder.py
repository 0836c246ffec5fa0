"""The folder of an analysis."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hessfunc.files import write_whole
from hessfunc.report.content import NAMES, Part, Run, Subject, as_text, content
from hessfunc.report.page import page
from hessfunc.report.pictures import picture

__all__ = ["Folder"]


@dataclass
class Folder:
    """The folder of one analysis. Each part is there, whole, as soon as it is finished.

    Attributes:
        path: where it is.
        run: how the analysis was started.
        subject: what is analysed, once that is known.
        parts: those that are finished.
        pictures: of parts, by name, as PNG.
        status: running, complete, interrupted or failed.
    """

    path: Path
    run: Run
    subject: Subject | None = None
    parts: list[Part] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    status: str = "running"

    @property
    def content(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        return content(self.run, self.subject, self.parts, status=self.status)

    def clear(self) -> None:
        """Make the folder, and remove what an earlier analysis has left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        of_parts = (f"{name}.{kind}" for name in NAMES for kind in ("npz", "png"))
        for name in ("results.json", "report.html", *of_parts):
            (self.path / name).unlink(missing_ok=True)

    def add(self, part: Part, /) -> None:
        """Write a finished part."""
        part.result.save(self.path / f"{part.name}.npz")
        if drawn := picture(part, self.parts):
            self.pictures[part.name] = drawn
            self._put(f"{part.name}.png", drawn)
        self.parts.append(part)
        self._write()

    def close(self, status: str, /) -> None:
        """Write how the analysis has ended, if it has begun: complete, interrupted or failed."""
        self.status = status
        if self.subject is not None:
            self._write()

    def _write(self) -> None:
        found = self.content
        self._put("results.json", as_text(found).encode())
        self._put("report.html", page(found, self.pictures).encode())

    def _put(self, name: str, data: bytes) -> None:
        write_whole(self.path / name, lambda file: file.write(data))
