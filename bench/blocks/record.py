"""What was measured, in JSON, and the tables beside it in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from bench.blocks.measuring import Cell
from bench.blocks.problems import PROBLEMS
from bench.blocks.questions import QUESTIONS, Question
from bench.environment import environment
from bench.interleaved import Ratio
from bench.markdown import table

_PATH = Path(__file__).parents[1] / "results" / "blocks.json"

_MEANINGS = [
    "Error: of ours, relative to the other library, in float64, of products; the largest of a "
    "parameter.",
    "Time: in float32, in turn, on one thread: ours / theirs, the median over rounds and its "
    "quartiles; the milliseconds are medians, and noise on a shared machine. Of factors: a forward "
    "pass and all that follows. BackPACK's calls leave the gradient of the loss as well.",
    "Memory: the peak of one call in a process of its own (VmHWM), above what was resident before; "
    "results are included, and what a first call alone takes is not. In MiB.",
    'BackPACK\'s factors of a convolution with P positions are B of `sharing="reduce"`, and P '
    'times A of `sharing="expand"`: ours are recombined so for the error, and timed with the '
    'default, "expand". Those of a bias are of "reduce".',
    "EKFAC, reduce: where a convolution's A is singular, its null space has no eigenvectors of "
    "its own, and the eigenvalues of the corrected blocks depend on the choice. The digits net "
    "is compared on 512 random images for that reason; 3c3d would need more than 1,600.",
    "HMP, GGNMP, PCHMP: products of the diagonal blocks of the Hessian, the GGN and the "
    'positive-curvature Hessian ("abs") with one vector each, after everything that precedes '
    "them. Held: each parameter prepared alone, with the others held fixed. All: "
    "`per_block(hvp(loss)(params, batch), params)`; `pchvp(loss)(params, batch)`.",
    "BackPACK's PCHMP multiplies phi'' by the gradient twice (`hessian_diagonal` has it already, "
    "`modified_residual_mat_prod` multiplies again), which shows where phi'' is not zero; "
    '"gradient once" is BackPACK without the second.',
]


def read() -> dict[str, dict[str, Cell]]:
    """The cells, by net and by question."""
    if not _PATH.exists():
        return {}
    stored = json.loads(_PATH.read_text())["cells"]
    return {
        name: {
            title: Cell(**{**cell, "ratios": {w: Ratio(**r) for w, r in cell["ratios"].items()}})
            for title, cell in cells.items()
        }
        for name, cells in stored.items()
    }


def write(found: Mapping[str, Mapping[str, Cell]]) -> str:
    """The tables, which are written with all numbers to bench/results/."""
    peers = {name: version(name) for name in ("backpack-for-pytorch", "curvlinops-for-pytorch")}
    about = {**environment(), **peers}
    text = "\n\n".join(
        [
            "# Blocks of curvature matrices, beside other libraries",
            ", ".join(f"{name}: {value}" for name, value in about.items()),
            "\n".join(f"- {meaning}" for meaning in _MEANINGS),
            *(_of_net(name, found[name]) for name in PROBLEMS if name in found),
        ]
    )
    cells = {n: {title: asdict(cell) for title, cell in of.items()} for n, of in found.items()}
    _PATH.write_text(json.dumps({"environment": about, "cells": cells}, indent=1))
    _PATH.with_suffix(".md").write_text(f"{text}\n")
    return text


def _of_net(name: str, cells: Mapping[str, Cell]) -> str:
    title, examples, _ = PROBLEMS[name]
    heads = ["", "error", "time, ours / theirs", "ms, ours", "theirs", "MiB, ours", "theirs"]
    rows = [heads]
    for question in QUESTIONS:
        cell = cells.get(key(question))
        if cell is not None:
            rows += _rows(question, cell)
    days = ", ".join(sorted({cell.day for cell in cells.values()}))
    return f"## {title}, {examples} examples\n\nMeasured on {days}.\n\n{table(rows)}"


def key(question: Question) -> str:
    """The name of a question: two libraries may have the same matrix."""
    return f"{question.title} ({question.peer})"


def _rows(question: Question, cell: Cell) -> list[list[str]]:
    if cell.unasked:
        return [[key(question), cell.unasked, *[""] * 5]]
    errors = "; ".join(f"{_error(e)} {what}".strip() for what, e in cell.errors.items())
    rows = []
    for way, r in cell.ratios.items():
        time, memory = cell.seconds, cell.bytes
        rows.append(
            [
                f"{key(question)}{way.removeprefix('ours')}",
                errors,
                f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})",
                *(f"{1e3 * time[which]:.3g}" for which in (way, question.peer)),
                *(f"{memory[which] / 2**20:.1f}" for which in (way, question.peer)),
            ]
        )
    return rows


def _error(error: float | str) -> str:
    return error if isinstance(error, str) else f"{error:.0e}"
