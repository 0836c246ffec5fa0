"""Page, table and figures of a training whose curvature was tracked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from hessfunc import plot
from hessfunc.app import terminal
from hessfunc.app.report import lines
from hessfunc.app.report.html import (
    cards,
    document,
    facts,
    marked,
    png,
    scrolled,
    section,
    table,
    what_was_run,
)
from hessfunc.app.report.rows import Number, Row, Words, plain
from hessfunc.app.report.training import shown_settings
from hessfunc.tracking import Point

# Files of a run: its settings, and its points.
RUN, POINTS = "tracking.json", "points.jsonl"
# Largest number of points in the table of a terminal.
_SHOWN = 12

_EDGE = (
    "Steps of the optimiser are stable on a quadratic while its sharpness is below the dashed line."
)


def tracking(points: Sequence[Point], content: Mapping[str, Any], picture: bytes, /) -> str:
    """Return the page of a tracked training, with all assets inline, which needs no network.

    Args:
        points: Points of the training, at least one.
        content: Plain data of the run, with its settings.
        picture: PNG picture of the largest eigenvalue.
    """
    drawn = figures([(points, "")])
    known = {figure.name for figure in drawn}
    name = "top" if "top" in known else "loss"
    columns = [("step", "number"), *((label, "number") for label in _columns(points))]
    cells = [[marked(words) for words in row] for row in _lines(points)]
    total = sum(point.matvecs for point in points)
    seconds = sum(point.seconds for point in points)
    return document(
        {**content, "points": [point.to_dict() for point in points], "figures": lines.plain(drawn)},
        title=content["settings"]["target"],
        kind="Curvature during",
        status=content["status"],
        headline=(
            *(Number(len(points), ","), f" point{'s' * (len(points) > 1)}, step "),
            *(Number(points[0].step, ","), " to ", Number(points[-1].step, ",")),
        ),
        parts=(
            cards(rows(points)),
            lines.elements(drawn, {name: picture}),
            section("points", "Point by point", scrolled("Points", table(columns, cells))),
            what_was_run(content, shown_settings(content["settings"])),
            facts(
                "cost",
                "What it cost",
                (
                    ("products", (Number(total, ","),)),
                    ("time", (Number(seconds, ",.1f"), " s in measurements")),
                ),
            ),
        ),
        scripts=lines.SCRIPTS,
    )


def rows(points: Sequence[Point], /) -> Iterator[Row]:
    """Yield the quantities of the last point, with their uncertainties."""
    last = points[-1]
    yield Row("loss", (Number(last.loss, ".4g"),), ("at step ", Number(last.step, ",")))
    for label, value, radius in _quantities(last):
        yield Row(label, (Number(value, ".4g"),), ("± ", Number(radius, ".1e")))
    edges = {"edge of stability": edge_of(last), "threshold": last.preconditioned_edge}
    for label, edge in edges.items():
        if edge is not None:
            yield Row(label, (Number(edge, ".4g"),))


def _quantities(point: Point) -> Iterator[tuple[str, float, float | None]]:
    """Yield the measured quantities of a point, with residuals or standard errors."""
    for end in ("top", "bottom"):
        values, residuals = getattr(point, end), getattr(point, f"{end}_residuals")
        name = "largest eigenvalue" if end == "top" else "smallest eigenvalue"
        for i, (value, residual) in enumerate(zip(values, residuals, strict=True), 1):
            yield name if i == 1 else f"{name} {i}", value, residual
    if point.trace is not None:
        yield "trace", point.trace, point.trace_stderr
    if point.preconditioned is not None:
        yield "preconditioned sharpness", point.preconditioned, point.preconditioned_residual
    if point.critical is not None:
        yield "critical sharpness", point.critical, None


def edge_of(point: Point, /) -> float | None:
    """Return the largest stable eigenvalue of gradient descent, or 2 / lr if it is not known."""
    if point.edge is not None or not point.lr or point.optimizer is not None:
        return point.edge
    return 2 / point.lr


def _columns(points: Sequence[Point]) -> list[str]:
    names = dict.fromkeys(name for point in points for name, *_ in _quantities(point))
    return ["loss", *names]


def _lines(points: Sequence[Point]) -> list[list[Words]]:
    """Return the rows of the table of points."""
    names = _columns(points)[1:]
    lines_of = []
    for point in points:
        values: dict[str, Words] = {
            name: (Number(value, ".4g"),) for name, value, _ in _quantities(point)
        }
        loss = (Number(point.loss, ".4g"),)
        lines_of.append([(Number(point.step, ","),), loss, *(values.get(n, ()) for n in names)])
    return lines_of


def as_table(points: Sequence[Point], /) -> Table:
    """Return the table for the terminal, of at most 12 points from the first to the last."""
    count = min(len(points), _SHOWN)
    chosen = [points[i * (len(points) - 1) // max(1, count - 1)] for i in range(count)]
    lines = (list(map(plain, line)) for line in _lines(chosen))
    return terminal.table(("step", *_columns(points)), lines, left=0)


def figures(runs: Sequence[tuple[Sequence[Point], str]], /) -> list[lines.Figure]:
    """Return the figures of tracked trainings; quantities that were not measured have none.

    Args:
        runs: Points of each training with its name, which is empty for a single training.
    """

    def of(
        label: str, value: Callable[[Point], float | None], *, dashed: bool = False
    ) -> list[lines.Line]:
        return [
            lines.Line(
                name=", ".join(filter(None, (name, label))),
                points=[(point.step, value(point)) for point in points],
                run=i,
                dashed=dashed,
            )
            for i, (points, name) in enumerate(runs)
            if any(value(point) is not None for point in points)
        ]

    def figure(
        name: str, title: str, drawn: Sequence[lines.Line], meaning: Words = ()
    ) -> lines.Figure:
        return lines.Figure(name=name, title=title, x="step", y=name, lines=drawn, meaning=meaning)

    tops = [_eigenvalue("top", i) for i in range(_most(runs, "top"))]
    bottoms = [_eigenvalue("bottom", i) for i in range(_most(runs, "bottom"))]
    sharp = [line for i, top in enumerate(tops, 1) for line in of(f"eigenvalue {i}", top)]
    edges = of("edge of stability", edge_of, dashed=True) if _is_near(runs) else []
    felt = of("sharpness", lambda point: point.preconditioned)
    limits = of("threshold", lambda point: point.preconditioned_edge, dashed=True)
    drawn = [
        figure("loss", "Loss on the measured batches", of("loss", lambda point: point.loss)),
        figure("top", "Largest eigenvalues", [*sharp, *edges], (_EDGE,) if edges else ()),
        figure(
            "bottom",
            "Smallest eigenvalues",
            [line for i, low in enumerate(bottoms, 1) for line in of(f"eigenvalue {i}", low)],
        ),
        figure("trace", "Trace", of("trace", lambda point: point.trace)),
        figure("preconditioned", "Sharpness of the optimiser", [*felt, *limits], (_EDGE,)),
        figure("critical", "Critical sharpness", of("sharpness", lambda point: point.critical)),
    ]
    return [figure for figure in drawn if figure.known]


def _eigenvalue(end: str, index: int) -> Callable[[Point], float | None]:
    def of(point: Point) -> float | None:
        values: tuple[float, ...] = getattr(point, end)
        return values[index] if index < len(values) else None

    return of


def _most(runs: Sequence[tuple[Sequence[Point], str]], end: str) -> int:
    return max((len(getattr(point, end)) for points, _ in runs for point in points), default=0)


def _is_near(runs: Sequence[tuple[Sequence[Point], str]]) -> bool:
    """Return whether the largest eigenvalue reaches a tenth of the edge in any run."""
    points = [point for points, _ in runs for point in points if point.top]
    edges = [edge for edge in map(edge_of, points) if edge is not None]
    return bool(edges) and max(point.top[0] for point in points) > 0.1 * min(edges)


def picture(points: Sequence[Point], /) -> bytes:
    """Return the picture of the largest eigenvalue against steps as PNG, or of the loss."""
    drawn = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = drawn.add_subplot()
    if any(point.top for point in points):
        plot.tracked(points, ax=ax)
    else:
        known = [(point.step, point.loss) for point in points if point.loss is not None]
        ax.plot(*zip(*known, strict=True))
        ax.set(xlabel="step", ylabel="loss")
    return png(drawn)
