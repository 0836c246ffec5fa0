"""The tables, in Markdown: the targets, and one for each question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.interleaved import Ratio
from bench.markdown import table
from bench.speed.cells import Cell, Row
from bench.speed.fits import power
from bench.speed.rule import choices
from bench.speed.targets import Verdict, by_torch, verdicts

_TITLES = {
    "product": "One Hessian product, repeated on the same batch",
    "block": "A block of Hessian products",
    "compiled": "A block of Hessian products, compiled",
    "ggn": "A block of GGN products",
    "data": "A block of 8 products of the Hessian of 20 batches",
    "eigenpairs": "The ten dominant eigenpairs, to a residual of 1e-3 of each value",
    "trace": "The trace to 2 %",
    "density": "The spectral density",
    "memory": "Time beside the peak of memory",
}

_MEANING = (
    "Costs are in gradients of the same loss on the same batch, those of products for each vector: "
    "medians over rounds of the ratio in a round, with quartiles. All alternatives of a cell take "
    "turns. **Best peer**: the cheapest of the other libraries whose answer is right; plain "
    "autograd, which is no library, has a column of its own. **Floor**: the operations of the "
    "matrix products of one product over those of a gradient: 2 for the Hessian and 4/3 for the "
    "GGN of a deep net, less where the first layer's input needs no gradient. A cost below it "
    "says that operations run at a higher rate than in a gradient. "
    "**Bold**: an error beyond the tolerance, so no answer; its cost is that of one call. Memory: "
    "the peak of a process that does nothing else, above the net, the batch and the vectors. "
    "**By torch**: ours multiplies matrices by torch's own library, as all others do."
)


def markdown(cells: Mapping[str, Cell]) -> str:
    """All tables of the cells that are there."""
    parts = ["# How fast curvature is", _where(cells), _MEANING, _targets(verdicts(cells))]
    for question, title in _TITLES.items():
        of = [c for name, c in cells.items() if name.startswith(f"{question}/") and not c.absent]
        if of:
            parts += [f"## {title}", _question(of)]
            gaps = [f"- {c.title}: {which}: {why}" for c in of for which, why in c.gaps.items()]
            if gaps:
                parts.append("\n".join(gaps))
    ruled = [c for name, c in cells.items() if name.startswith("rule/") and c.rows]
    if ruled:
        parts += ["## The rule for chunks, in mode reverse", _rules(ruled)]
    grown = [cell for cell in cells.values() if cell.lines]
    if grown:
        parts += ["## What costs grow with", _scaling(grown)]
    return "\n\n".join(parts) + "\n"


def _where(cells: Mapping[str, Cell]) -> str:
    """What is the same for all cells, and what is not."""
    seen: dict[str, set[str]] = {}
    for cell in cells.values():
        for key, value in cell.about.items():
            seen.setdefault(key, set()).add(str(value)[:10] if key == "date" else str(value))
    return ", ".join(
        f"{key}: {' / '.join(sorted(values))}" for key, values in seen.items() if key != "load"
    )


def _targets(found: Sequence[Verdict]) -> str:
    rows = [
        [
            "work",
            "net",
            "target",
            "ours / best peer",
            "best peer",
            "ours / plain autograd",
            "ours / best peer, by torch",
            "ours",
            "floor",
            "",
        ]
    ]
    for one in found:
        memory = one.target.question == "memory"
        ours = _bytes(one.ours) if memory else _ratio(one.ours and one.ours.gradients)
        rows.append(
            [
                one.target.work,
                one.net,
                f"<= {one.target.at_most:g}",
                _ratio(one.of_peer),
                one.peer,
                _ratio(one.of_plain),
                _ratio(one.by_torch),
                f"{ours} {'MiB' if memory else ''}".strip() if one.ours else "",
                "" if memory or one.floor is None else f"{one.floor:.2f}",
                _met(one),
            ]
        )
    return table(rows)


def _met(found: Verdict) -> str:
    verdict = found.why if found.met is None else "met" if found.met else "**missed**"
    return f"{verdict}; not installed: {', '.join(found.missing)}" if found.missing else verdict


def _question(cells: Sequence[Cell]) -> str:
    head = ["net", "alternative", "gradients", "floor", "ours / it", "ours, by torch, / it"]
    rows = [[*head, "error", "products", "MiB", ""]]
    for cell in cells:
        floor = "" if cell.floor is None else f"{cell.floor:.2f}"
        ours = next((title for title, row in cell.rows.items() if row.kind == "ours"), "")
        for title, row in cell.rows.items():
            rows.append(
                [
                    cell.title,
                    title,
                    _ratio(row.gradients),
                    floor,
                    _ratio(row.ours.get(ours)),
                    _ratio(row.ours.get(by_torch(cell, ours))),
                    _error(row, cell),
                    f"{row.products:g}",
                    _bytes(row),
                    row.note,
                ]
            )
    about = "; ".join(
        f"{c.title}: {c.rounds} rounds, a gradient in {1e3 * c.gradient:.3g} ms" for c in cells
    )
    return f"{table(rows)}\n\n{about}."


def _rules(cells: Sequence[Cell]) -> str:
    rows = [["net", "matrix", "by the rule", "chunks: gradients", "rule / best"]]
    for cell in cells:
        for found in choices(cell):
            fixed = ", ".join(f"{size}: {cost.median:.2f}" for size, cost in found.fixed.items())
            rows.append(
                [cell.title, found.matrix, _ratio(found.rule), fixed, _ratio(found.of_best)]
            )
    return table(rows)


def _scaling(cells: Sequence[Cell]) -> str:
    rows = [["", "", "exponent", "from", "to", "measured"]]
    for cell in cells:
        for line in cell.lines:
            fit = power(line.sizes, line.costs)
            rows.append(
                [
                    cell.title,
                    line.title,
                    f"{fit.exponent:.2f} ± {fit.stderr:.2f}",
                    *(f"{size:g}" for size in (line.sizes[0], line.sizes[-1])),
                    f"{', '.join(f'{cost:.3g}' for cost in line.costs)} {cell.units[1]}",
                ]
            )
    return table(rows)


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return ""
    spread = "" if found.low == found.high else f" ({found.low:.2f}-{found.high:.2f})"
    return f"{found.median:.2f}{spread}"


def _error(row: Row, cell: Cell) -> str:
    if row.error is None:
        return ""
    wrong = cell.tolerance is not None and not row.error <= cell.tolerance
    return f"**{row.error:.0e}**" if wrong else f"{row.error:.0e}"


def _bytes(row: Row | None) -> str:
    return "" if row is None or row.bytes is None else f"{row.bytes / 2**20:.1f}"
