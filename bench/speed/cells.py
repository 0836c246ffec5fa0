"""What was measured: a file for each cell, from which a run goes on and the tables are drawn."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.environment import environment
from bench.interleaved import Ratio
from bench.speed import machine
from bench.speed.asked import Kind


@dataclass(frozen=True)
class Row:
    """One alternative.

    Attributes:
        kind: ours, another library, or plain autograd.
        gradients: what a product, or the answer, costs in gradients; nothing where memory alone
            was measured.
        ours: by our alternative: its time / that of this one.
        error: of the answer, as the question says; nothing where it has none.
        products: how many a call makes.
        bytes: the peak of memory, above the net and the batch.
        alike: those that go about it in the same way.
        note: for the table.
    """

    kind: Kind
    gradients: Ratio | None = None
    ours: Mapping[str, Ratio] = field(default_factory=dict)
    error: float | None = None
    products: float = 1
    bytes: int | None = None
    alike: str = ""
    note: str = ""


@dataclass(frozen=True)
class Line:
    """What grows, at each place: costs of one alternative against a size.

    Attributes:
        title: of the alternative.
        sizes: the places.
        costs: at the places.
    """

    title: str
    sizes: list[float]
    costs: list[float]


@dataclass(frozen=True)
class Cell:
    """One question about one net.

    Attributes:
        title: of the net, or of what grows.
        about: where, when, and with which versions.
        seconds: that it took to measure.
        rounds: how often each alternative was timed.
        gradient: the seconds of a gradient, the median over rounds; noise on a shared machine.
        floor: the gradients that the matrix products of one product take at the least.
        tolerance: errors beyond it are no answers.
        rows: by alternative.
        lines: of what grows.
        units: of the sizes and costs of the lines.
        gaps: why an alternative has no row, by its title.
        absent: why there is nothing at all.
    """

    title: str
    about: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    rounds: int = 0
    gradient: float = 0.0
    floor: float | None = None
    tolerance: float | None = None
    rows: Mapping[str, Row] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    units: tuple[str, str] = ("", "")
    gaps: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""


def about(packages: Iterable[str]) -> dict[str, Any]:
    """Where, when, with which versions and of which commit."""
    versions = {
        name: found for name in sorted({*packages} - {"", "hessfunc"}) if (found := _version(name))
    }
    return {**environment(), **machine.described(), "commit": _commit(), **versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        described = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        return subprocess.run(
            described, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read(folder: Path) -> dict[str, Cell]:
    """The cells that are there, by name: ``question/net``."""
    return {
        str(path.relative_to(folder).with_suffix("")): _cell(json.loads(path.read_text()))
        for path in sorted(folder.rglob("*.json"))
    }


def _cell(stored: dict[str, Any]) -> Cell:
    rows = {title: _row(row) for title, row in stored["rows"].items()}
    lines = [Line(**line) for line in stored["lines"]]
    return Cell(**{**stored, "rows": rows, "lines": lines, "units": tuple(stored["units"])})


def _row(stored: dict[str, Any]) -> Row:
    gradients = stored["gradients"] and Ratio(**stored["gradients"])
    ours = {title: Ratio(**found) for title, found in stored["ours"].items()}
    return Row(**{**stored, "gradients": gradients, "ours": ours})


def write(folder: Path, name: str, cell: Cell) -> None:
    """The cell's file, which is there as a whole or not at all."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(cell), indent=1))
    part.replace(path)
