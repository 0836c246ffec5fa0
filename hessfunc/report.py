"""Results as a table for people, as JSON for programs, and as a folder of files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from hessfunc import plot
from hessfunc.algorithms.results import Density, Eigenpairs, Estimate, Result, versions

__all__ = ["Folder", "Part", "Subject", "as_json", "brief", "headline", "table"]

_LABELS = {
    "eigenvalues": "eigenvalue {}",
    "smallest": "smallest",
    "trace": "trace",
    "density": "density",
}


@dataclass(frozen=True)
class Part:
    """One finished part of an analysis.

    Attributes:
        name: eigenvalues, smallest, trace or density.
        result: what was found.
        seconds: how long that took.
    """

    name: str
    result: Result
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What is analysed.

    Attributes:
        target: its name.
        parameters: how many numbers they are.
        examples: how many the loss is the mean over.
        batches: in so many batches.
        loss: its value.
        dtype: of the parameters.
        device: of the parameters.
    """

    target: str
    parameters: int
    examples: int
    batches: int
    loss: float
    dtype: str
    device: str


def headline(subject: Subject, /) -> str:
    """The subject in one line."""
    return (
        f"{subject.target}: loss {subject.loss:.4g} over {subject.examples:,} examples, "
        f"{subject.parameters:,} parameters, {subject.dtype} on {subject.device}"
    )


def table(parts: Sequence[Part], /) -> Table:
    """Each number with its residual or its interval, and what each part has cost."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("", no_wrap=True)
    for column in ("value", "residual or 95 % interval", "products", "time"):
        found.add_column(column, justify="right", no_wrap=True)
    for part in parts:
        cost = [f"{part.result.matvecs:,}", f"{part.seconds:.1f} s"]
        for row in _rows(part):
            found.add_row(*row, *cost)
            cost = []
        found.add_section()
    return found


def _rows(part: Part) -> list[list[str]]:
    match part.result:
        case Eigenpairs(values=values, residuals=residuals, converged=converged):
            return [
                [
                    _LABELS[part.name].format(i),
                    f"{value:.5g}",
                    f"{residual:.1e}" if done else f"{residual:.1e} (not converged)",
                ]
                for i, (value, residual, done) in enumerate(
                    zip(values, residuals, converged, strict=True), start=1
                )
            ]
        case Estimate(value=value) as estimate:
            low, high = estimate.interval(0.95)
            return [[_LABELS[part.name], f"{value:.5g}", f"{low:.4g} to {high:.4g}"]]
        case Density(nodes=nodes):
            probes, steps = nodes.shape
            return [[_LABELS[part.name], f"{probes} x {steps} nodes", ""]]
        case _:
            raise TypeError(f"no row for a {type(part.result).__name__}")


def brief(result: Result, /) -> str:
    """Where a running result stands, in a few words."""
    match result:
        case Eigenpairs():
            done = int(result.converged.sum())
            return f"{result.values[0]:.4g}, {done} of {len(result.values)} converged"
        case Estimate():
            return f"{result.value:.4g} ± {result.stderr:.2g}"
        case _:
            return ""


def as_json(part: Part, /) -> dict[str, Any]:
    """Plain data of a part, without vectors, samples and nodes; what is not finite is None."""
    result = part.result
    found: dict[str, Any] = {}
    match result:
        case Eigenpairs():
            for name in ("values", "residuals", "intervals", "converged"):
                found[name] = getattr(result, name).tolist()
        case Estimate():
            found["value"] = result.value
            found["stderr"] = result.stderr
            found["interval_95"] = list(result.interval(0.95))
            found["by_leaf"] = result.by_leaf
        case Density():
            found["n"] = result.n
            found["probes"], found["steps"] = result.nodes.shape
            found["width"] = result.width
    found |= {
        "matvecs": result.matvecs,
        "passes": result.passes,
        "seconds": round(part.seconds, 3),
        "reason": result.reason,
        "seed": result.seed,
    }
    return {name: _finite(value) for name, value in found.items()}


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [_finite(item) for item in value]
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case _:
            return value


@dataclass
class Folder:
    """The folder of one analysis. Each part is there, whole, as soon as it is finished.

    Attributes:
        path: where it is.
        subject: what is analysed, once that is known.
        parts: those that are finished.
    """

    path: Path
    subject: Subject | None = None
    parts: list[Part] = field(default_factory=list)

    def clear(self) -> None:
        """Make the folder, and remove what an earlier analysis has left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "density.png", *(f"{name}.npz" for name in _LABELS)):
            (self.path / name).unlink(missing_ok=True)

    def add(self, part: Part, /) -> None:
        """Write a finished part."""
        part.result.save(self.path / f"{part.name}.npz")
        self.parts.append(part)
        if isinstance(part.result, Density):
            self._draw(part.result)
        self._write("running")

    def close(self, status: str, /) -> None:
        """Write how the analysis has ended, if it has begun: complete, interrupted or failed."""
        if self.subject is not None:
            self._write(status)

    def _write(self, status: str) -> None:
        content = {
            "subject": self.subject and asdict(self.subject),
            "status": status,
            "versions": versions(),
            "results": {part.name: as_json(part) for part in self.parts},
        }
        with _whole(self.path / "results.json") as file:
            file.write_text(json.dumps(content, indent=2) + "\n")

    def _draw(self, density: Density) -> None:
        from matplotlib.figure import Figure

        pairs = next((p.result for p in self.parts if isinstance(p.result, Eigenpairs)), None)
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        plot.density(density, ax=figure.add_subplot(), eigenvalues=pairs)
        with _whole(self.path / "density.png") as file:
            figure.savefig(file, format="png", dpi=200)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write to, which takes its place once it is complete."""
    part = path.with_name(f"{path.name}.part")
    yield part
    part.replace(path)
