"""Cells of the rule for chunks: ``chunk_size=None`` against 1, 4 and the whole block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import get_args

from bench.interleaved import Ratio
from bench.speed import models, ours, plain
from bench.speed.asked import Alternative, Asked, Matrix
from bench.speed.cells import Cell, Row
from bench.speed.products import TOLERANCE, judge
from bench.speed.turns import Effort, prepared, rows_of, timed

_RULE = "rule"


@dataclass(frozen=True)
class Choice:
    """The rule against the best fixed chunk, for one matrix.

    Attributes:
        matrix: Hessian or GGN.
        rule: Cost of a product by the rule, in gradients.
        fixed: Costs by the size of the chunk.
        of_best: Time by the rule / time with the best fixed chunk.
    """

    matrix: str
    rule: Ratio
    fixed: dict[str, Ratio]
    of_best: Ratio


def rule(of: str, effort: Effort) -> Cell:
    """Return the costs of Hessian (mode reverse) and GGN products of a block, by chunk size.

    Args:
        of: Name of a net, which brings the size of the block, or ``net/k``.
        effort: Time and rounds of each of the two matrices.
    """
    name, _, given = of.partition("/")
    k = int(given or models.MODELS[name].block)
    case = models.made(name)
    rows: dict[str, Row] = {}
    gaps: dict[str, str] = {}
    rounds = gradient = 0.0
    for matrix in get_args(Matrix):
        asked = Asked(case, matrix, k)
        ready, broken = prepared(asked, _alternatives(asked), judge(plain.expected(asked)))
        found = timed(asked, ready, effort, TOLERANCE)
        rows |= rows_of(ready, found)
        gaps |= broken
        rounds, gradient = len(found.gradients), median(found.gradients)
    return Cell(
        title=f"{case.title}: k = {k}",
        rounds=int(rounds),
        gradient=gradient,
        tolerance=TOLERANCE,
        rows=rows,
        gaps=gaps,
    )


def _alternatives(asked: Asked) -> Iterator[Alternative]:
    for size in dict.fromkeys([None, 1, min(4, asked.k), asked.k]):
        make = partial(ours.in_chunks, size=size)
        yield Alternative(f"{asked.matrix}, {size or _RULE}", "hessfunc", "ours", make)


def choices(cell: Cell) -> Sequence[Choice]:
    """Return the rule against the best of the fixed chunks, for each matrix that was measured."""
    found = []
    for matrix in get_args(Matrix):
        title = f"{matrix}, {_RULE}"
        fixed = {
            name.rpartition(", ")[2]: row
            for name, row in cell.rows.items()
            if name.startswith(f"{matrix}, ") and title in row.ours and row.gradients
        }
        chosen = cell.rows.get(title)
        if fixed and chosen and chosen.gradients:
            best = min(fixed.values(), key=lambda row: row.gradients.median)
            costs = {size: row.gradients for size, row in fixed.items() if row.gradients}
            found.append(Choice(matrix, chosen.gradients, costs, best.ours[title]))
    return found
