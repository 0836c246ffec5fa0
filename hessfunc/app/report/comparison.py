"""Page and table of two runs beside each other: two analyses, trainings or tracked trainings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hessfunc.algorithms.overlap import overlap
from hessfunc.algorithms.results import Density, Eigenpairs, load
from hessfunc.app import terminal
from hessfunc.app.report import lines, tracked
from hessfunc.app.report.html import command, document, marked, said, scrolled, section, table
from hessfunc.app.report.meanings import RESIDUAL
from hessfunc.app.report.rows import Number, Words, plain, rows
from hessfunc.app.report.training import COLUMNS
from hessfunc.app.report.training import figures as training_figures
from hessfunc.tracking import Points
from hessfunc.tracking import read as points_of
from hessfunc.training import history

# File of each kind of run.
_FILES = {"analysis": "results.json", "training": "history.json", "tracking": tracked.RUN}
_KINDS = {"analysis": "an analysis", "training": "a training", "tracking": "a tracked training"}
_SEVERAL = {"analysis": "analyses", "training": "trainings", "tracking": "tracked trainings"}
# Number of points of a density, and its smallest value relative to the largest.
_POINTS, _FLOOR = 600, 1e-7


@dataclass(frozen=True)
class Compared:
    """Run that is compared with another.

    Attributes:
        name: Name of the run, which is that of its folder.
        folder: Folder of the run.
        kind: ``"analysis"``, ``"training"`` or ``"tracking"``.
        content: Plain data of the run.
    """

    name: str
    folder: Path
    kind: str
    content: Mapping[str, Any]

    def result(self, part: str, /) -> Any:
        """Return the full result of a part, or None if the folder does not have it."""
        path = self.folder / f"{part}.npz"
        return load(path) if part in self.content.get("results", {}) and path.exists() else None

    @property
    def points(self) -> Points:
        """Points of a tracked training."""
        return points_of(self.folder / tracked.POINTS)


def read(folders: Sequence[Path], /) -> list[Compared]:
    """Read the runs of folders that `hessfunc analyze`, `train` or `track` has written.

    Raises:
        ValueError: If a folder contains no run, or if the runs are of different kinds.
    """
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if len({run.kind for run in runs}) > 1:
        kinds = " and ".join(f"{run.folder} has {_KINDS[run.kind]}" for run in runs)
        raise ValueError(f"{kinds}: pass two folders of one command")
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {folder}" for i, folder in enumerate(folders, 1)]


# Finished parts of a run, by its kind.
_KNOWN: dict[str, Callable[[Any], Any]] = {
    "analysis": lambda content: content["results"],
    "training": lambda content: content["runs"][0]["records"],
    "tracking": lambda content: content["points"],
}


def _read(folder: Path, name: str) -> Compared:
    for kind, file in _FILES.items():
        if (folder / file).exists():
            try:
                content = json.loads((folder / file).read_bytes())
                if kind == "tracking":
                    points = points_of(folder / tracked.POINTS)
                    content["points"] = [point.to_dict() for point in points]
                known = _KNOWN[kind](content)
            except (ValueError, KeyError, IndexError, TypeError, FileNotFoundError):
                raise ValueError(f"{folder / file} is damaged, or of another program") from None
            if not known:
                raise ValueError(f"{folder} contains no finished part of a run")
            return Compared(name, folder, kind, content)
    raise ValueError(
        f"{folder} contains neither {' nor '.join(_FILES.values())}: pass a folder that "
        "`hessfunc analyze`, `train` or `track` has written"
    )


def compared_rows(runs: Sequence[Compared], /) -> Iterator[tuple[str, list[Words]]]:
    """Yield the name of each quantity with its value and uncertainty in each run."""
    if runs[0].kind != "analysis":
        yield from (_of_trainings if runs[0].kind == "training" else _of_tracked)(runs)
        yield from _other_settings(runs)
        return
    subjects = [run.content["subject"] for run in runs]
    for name, key, style in (("loss", "loss", ".4g"), ("parameters", "parameters", ",")):
        yield name, [(Number(subject[key], style),) for subject in subjects]
    yield "matrix", [(subject.get("matrix", "Hessian"),) for subject in subjects]
    for part in ("eigenvalues", "smallest", "trace"):
        known = [
            list(rows(part, run.content["results"][part])) if part in run.content["results"] else []
            for run in runs
        ]
        for i in range(max(map(len, known))):
            label = next(row[i].label for row in known if i < len(row))
            yield label, [_with_doubt(part, row[i]) if i < len(row) else () for row in known]


def _with_doubt(part: str, row: Any) -> Words:
    """Return a value with its residual or its interval."""
    if part == "trace":
        return (*row.value, " (", *row.sureness, ")")
    return (*row.value, " ± ", *row.sureness)


# Numbers of the last record of a training, with their labels and formats.
_OF_TRAINING = (
    *(column for column in COLUMNS if column[0] not in ("epoch", "ratio", "lr")),
    ("seconds", "time in steps, s", ",.1f"),
)


def _of_trainings(runs: Sequence[Compared]) -> Iterator[tuple[str, list[Words]]]:
    ends = [run.content["runs"][0]["records"][-1] for run in runs]
    for key, label, style in _OF_TRAINING:
        values = [end.get(key) for end in ends]
        if any(value is not None for value in values):
            yield label, [() if value is None else (Number(value, style),) for value in values]


def _of_tracked(runs: Sequence[Compared]) -> Iterator[tuple[str, list[Words]]]:
    """Yield the quantities of the last point of each run."""
    known = [
        {row.label: (*row.value, " ", *row.sureness) for row in tracked.rows(run.points)}
        for run in runs
    ]
    for label in dict.fromkeys(name for each in known for name in each):
        yield label, [each.get(label, ()) for each in known]


def _other_settings(runs: Sequence[Compared]) -> Iterator[tuple[str, list[Words]]]:
    """Yield the settings in which the runs differ."""
    settings = [run.content["settings"] for run in runs]
    for key in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(key) for each in settings]
        if values[0] != values[1]:
            yield key.replace("_", " "), [("" if v is None else str(v),) for v in values]


def as_table(runs: Sequence[Compared], /) -> Table:
    """Return the table of two runs for the terminal."""
    rows = ((label, *map(plain, cells)) for label, cells in compared_rows(runs))
    return terminal.table(("", *(run.name for run in runs)), rows)


def comparison(runs: Sequence[Compared], /) -> str:
    """Return the page of two runs, with all assets inline, which needs no network."""
    drawn = figures(runs)
    columns = [("", ""), *((run.name, "number") for run in runs)]
    cells = [[escape(label), *map(marked, each)] for label, each in compared_rows(runs)]
    is_analysis = runs[0].kind == "analysis"
    notes = said((RESIDUAL,)) + said(_angles(runs)) if is_analysis else ""
    beside = scrolled("Side by side", table(columns, cells))
    return document(
        content(runs),
        title=" and ".join(run.name for run in runs),
        kind="Comparison of",
        status=_status(runs),
        headline=(f"two {_SEVERAL[runs[0].kind]}",),
        parts=(
            lines.elements(drawn, {}),
            section("values", "Side by side", notes, beside),
            _commands(runs),
        ),
        scripts=lines.SCRIPTS,
    )


def content(runs: Sequence[Compared], /) -> dict[str, Any]:
    """Return the plain data of two runs and of their figures."""
    return {
        "runs": {run.name: run.content for run in runs},
        "figures": lines.plain(figures(runs)),
    }


def _status(runs: Sequence[Compared]) -> str:
    """Return whether both runs are complete."""
    ends = [
        run.content["runs"][0]["ended"] if run.kind == "training" else run.content["status"]
        for run in runs
    ]
    return "both complete" if set(ends) == {"complete"} else "not both complete"


def figures(runs: Sequence[Compared], /) -> list[lines.Figure]:
    """Return the figures in which the runs are drawn over each other."""
    if runs[0].kind == "training":
        trained = [(history.run_of(run.content["runs"][0]), run.name) for run in runs]
        return training_figures(trained)
    if runs[0].kind == "tracking":
        return tracked.figures([(run.points, run.name) for run in runs])
    return [figure for figure in (_density(runs), _line(runs)) if figure.known]


def _density(runs: Sequence[Compared]) -> lines.Figure:
    known = [(i, run.name, run.result("density")) for i, run in enumerate(runs)]
    densities = [(i, name, d) for i, name, d in known if isinstance(d, Density)]
    drawn = []
    if densities:
        width = max(density.width for _, _, density in densities)
        ends = torch.cat([d.nodes[d.weights > 0] for _, _, d in densities])
        low, high = float(ends.min()) - 5 * width, float(ends.max()) + 5 * width
        grid = torch.linspace(low, high, _POINTS, dtype=torch.float64, device="cpu")
        values = [density.pdf(grid, width) for _, _, density in densities]
        floor = _FLOOR * max(float(value.max()) for value in values)
        drawn = [
            lines.Line(
                name=name,
                run=i,
                points=[
                    (x, y if y > floor else None)
                    for x, y in zip(grid.tolist(), value.tolist(), strict=True)
                ],
            )
            for (i, name, _), value in zip(densities, values, strict=True)
        ]
    return lines.Figure(
        name="density",
        title="Spectral densities",
        x="eigenvalue",
        y="density",
        is_log=True,
        lines=drawn,
        meaning=("Both densities are smoothed by Gaussians of the same width.",),
    )


def _line(runs: Sequence[Compared]) -> lines.Figure:
    known = [(i, run.name, run.content["results"].get("line")) for i, run in enumerate(runs)]
    return lines.Figure(
        name="line",
        title="Loss along the top eigenvector of each run",
        x="distance",
        y="loss",
        lines=[
            lines.Line(name=name, run=i, points=list(zip(data["x"], data["values"], strict=True)))
            for i, name, data in known
            if data is not None
        ],
        meaning=("At 0 are the parameters of each run.",),
    )


def _angles(runs: Sequence[Compared]) -> Words:
    """Return the sentence about the angles between the spaces of the eigenvectors."""
    pairs = [run.result("eigenvalues") for run in runs]
    if not all(isinstance(each, Eigenpairs) for each in pairs):
        return ()
    try:
        angles = [math.degrees(angle) for angle in overlap(*pairs).angles.tolist()]
    except (ValueError, TypeError):
        # The runs have different parameters.
        return ()
    first, last = f"{angles[0]:.3g}°", f"{angles[-1]:.3g}°"
    reach = first if first == last else f"{first} to {last}"
    return (f"The principal angles between the spaces of their top eigenvectors are {reach}.",)


def _commands(runs: Sequence[Compared]) -> str:
    lines_of = [
        [escape(run.name), command(run.content["run"]["command"])]
        for run in runs
        if "run" in run.content
    ]
    columns = (("run", ""), ("command", "name"))
    return section("run", "What was run", table(columns, lines_of)) if lines_of else ""
