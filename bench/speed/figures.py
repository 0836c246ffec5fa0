"""The figures: targets, costs beside floors, time against memory, what costs grow with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.speed.asked import BY_TORCH
from bench.speed.cells import Cell, Row
from bench.speed.fits import power
from bench.speed.targets import front, verdicts
from hessfunc.plot.style import FIRST, PALETTE, QUIET, SECOND, clean, legend, note

_COLOURS = {"ours": FIRST, "peer": SECOND, "plain": QUIET}


def draw(cells: Mapping[str, Cell], folder: Path) -> list[Path]:
    """Draw the figures of the cells into the folder, and return their paths."""
    figures = {
        "targets": _targets(cells),
        "costs": _costs(cells),
        "pareto": _pareto([c for n, c in cells.items() if n.startswith("memory/") and c.rows]),
        "scaling": _scaling([c for c in cells.values() if c.lines]),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=160)
            written.append(path)
    return written


def _targets(cells: Mapping[str, Cell]) -> Figure | None:
    found = [one for one in verdicts(cells) if one.of_peer is not None]
    if not found:
        return None
    figure, (ax,) = _axes(1, (8.5, 1.2 + 0.22 * len(found)))
    for place, one in enumerate(reversed(found)):
        ratio = one.of_peer
        ax.plot([ratio.low, ratio.high], [place, place], color=FIRST, linewidth=1.4)
        ax.plot(ratio.median, place, "o", color=FIRST if one.met else SECOND, markersize=5)
        ax.plot(one.target.at_most, place, "|", color=QUIET, markersize=10)
    labels = [f"{one.target.work} · {one.net}" for one in reversed(found)]
    ax.set_yticks(range(len(found)), labels, fontsize="x-small")
    ax.axvline(1, color=QUIET, linewidth=0.6)
    ax.set(xlabel="ours / best peer")
    _octaves(ax)
    note(ax, ["bars: the targets", "red: missed", _machine(cells)])
    return figure


def _costs(cells: Mapping[str, Cell]) -> Figure | None:
    questions = {"product": "one product", "block": "a block", "ggn": "a block of the GGN"}
    of = {
        title: [c for n, c in cells.items() if n.startswith(f"{question}/") and c.rows]
        for question, title in questions.items()
    }
    of = {title: found for title, found in of.items() if found}
    if not of:
        return None
    nets = list(dict.fromkeys(cell.title for found in of.values() for cell in found))[::-1]
    figure, axes = _axes(len(of), (3.2 + 3.0 * len(of), 1.6 + 0.4 * len(nets)))
    for ax, (title, found) in zip(axes, of.items(), strict=True):
        for cell in found:
            place = nets.index(cell.title)
            for alternative, row in reversed(cell.rows.items()):
                ax.plot(row.gradients.median, place, "o", markersize=5, **_marked(alternative, row))
            ax.plot(cell.floor, place, "|", color="black", markersize=12)
        ax.set_yticks(range(len(nets)), nets if ax is axes[0] else [], fontsize="x-small")
        ax.set(ylim=(-0.5, len(nets) - 0.5), xlabel="gradients a product")
        _octaves(ax)
        note(ax, [title])
    for kind, label in {"ours": "hessfunc", "peer": "others", "plain": "autograd"}.items():
        axes[0].plot([], [], "o", color=_COLOURS[kind], label=label)
    hollow = {"color": FIRST, "markerfacecolor": "none"}
    if any(title.endswith(BY_TORCH) for cs in of.values() for c in cs for title in c.rows):
        axes[0].plot([], [], "o", label="hessfunc, torch's matrix products", **hollow)
    axes[0].plot([], [], "|", color="black", markersize=12, label="floor, in operations")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def _marked(title: str, row: Row) -> dict[str, str]:
    face = "none" if title.endswith(BY_TORCH) else _COLOURS[row.kind]
    return {"color": _COLOURS[row.kind], "markerfacecolor": face}


def _octaves(ax: Any, *, of: str = "x") -> None:
    """Logarithmic axes that are marked at powers of two."""
    for name in of:
        getattr(ax, f"set_{name}scale")("log", base=2)
        getattr(ax, f"{name}axis").set_major_formatter("{x:g}")


def _pareto(cells: Sequence[Cell]) -> Figure | None:
    if not cells:
        return None
    figure, axes = _axes(len(cells), (9.6, 4.2 * len(cells)), len(cells))
    for ax, cell in zip(axes, cells, strict=True):
        rows = {t: r for t, r in cell.rows.items() if r.bytes and r.gradients}
        points = {t: (row.gradients.median, row.bytes / 2**20) for t, row in rows.items()}
        for title, at in points.items():
            ax.plot(*at, "o", color=_COLOURS[rows[title].kind], markersize=5)
        ours = [at for title, at in points.items() if rows[title].kind == "ours"]
        ax.step(*zip(*front(ours), strict=True), where="post", color=FIRST, linewidth=1)
        ax.set(xlabel="gradients a product", ylabel="peak, MiB")
        _octaves(ax, of="xy")
        _named(ax, points, {title: _COLOURS[row.kind] for title, row in rows.items()})
        note(ax, [cell.title])
    return figure


def _named(ax: Any, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write the names of points at the right edge, in the order of the points' heights."""
    low, high = map(log, ax.get_ylim())
    names = sorted(points, key=lambda name: points[name][1])
    places = [(log(points[name][1]) - low) / (high - low) for name in names]
    # Names are one line apart: each is at least one above the one below it, from both ends.
    line = 1 / 15
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + line)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1 - line * (len(places) - 1 - i))
    for name, place in zip(names, places, strict=True):
        ax.annotate(
            name,
            points[name],
            (1.03, place),
            textcoords="axes fraction",
            verticalalignment="center",
            color=colours[name],
            size=8,
            arrowprops={
                "arrowstyle": "-",
                "color": QUIET,
                "linewidth": 0.4,
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )


def _scaling(cells: Sequence[Cell]) -> Figure | None:
    if not cells:
        return None
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure, axes = _axes(len(cells), (4.6 * columns, 3.8 * lines), lines)
    for ax, cell in zip(axes, cells, strict=False):
        for colour, line in zip(PALETTE, cell.lines, strict=False):
            fit = power(line.sizes, line.costs)
            ends = np.array([line.sizes[0], line.sizes[-1]])
            ax.plot(ends, fit.factor * ends**fit.exponent, color=colour, linewidth=0.8)
            label = f"{line.title}: {fit.exponent:.2f} ± {fit.stderr:.2f}"
            ax.plot(line.sizes, line.costs, "o", color=colour, markersize=4, label=label)
        ax.set(xscale="log", yscale="log", xlabel=cell.units[0], ylabel=cell.units[1])
        note(ax, [cell.title])
        legend(ax)
    for ax in axes[len(cells) :]:
        ax.remove()
    return figure


def _axes(count: int, size: tuple[float, float], lines: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, -(-count // lines), squeeze=False).ravel()
    return figure, [clean(ax) for ax in axes]


def _machine(cells: Mapping[str, Cell]) -> str:
    about = next((cell.about for cell in cells.values() if cell.about), {})
    return f"{about.get('machine', '')}, {about.get('threads', '')} thread(s)"
