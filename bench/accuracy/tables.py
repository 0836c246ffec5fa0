"""The tables in Markdown: two a question."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bench.accuracy.measuring import Cell, Run, rank
from bench.accuracy.methods import METHODS
from bench.accuracy.questions import QUESTIONS, Question
from bench.markdown import table


def markdown(cells: dict[str, Cell], titles: dict[str, str], about: dict[str, object]) -> str:
    """The tables: two a question.

    Args:
        cells: by ``case/question/package: method``.
        titles: of the cases, in their order.
        about: where, when, with which versions.
    """
    parts = [
        "# Products to a stated accuracy",
        ", ".join(f"{key}: {value}" for key, value in about.items()),
        "One product is with one vector; a block of k counts k. **To reach it**: the products from "
        "which on nine of ten seeds are within the accuracy, by the true error (median over seeds, "
        "the stopping knob set as well as it can be); `> N` where N products do not do, `never` "
        "where the method stops of itself before, with any setting. **As shipped**: the products "
        "that the method takes by its own rule (median), and the error that nine of ten seeds are "
        "within; **bold** where that is beyond the accuracy. The ResNet-20 is run from one seed, "
        "and its eigenvalues are not known: the error is the largest residual, relative to the "
        "largest eigenvalue found.",
    ]
    for asked, question in QUESTIONS.items():
        methods = [method for method in METHODS if method.asked == asked]
        asked_of = [
            case for case in titles if any(f"{case}/{asked}/{m.title}" in cells for m in methods)
        ]
        missing = {m.title: "not measured" if m.version() else "not installed" for m in methods}
        rows = {
            method.title: [cells.get(f"{case}/{asked}/{method.title}") for case in asked_of]
            for method in methods
        }
        heads = [titles[case] for case in asked_of]
        parts += [
            f"## {question.title}",
            table(
                [
                    ["to reach it", *heads],
                    *(
                        [
                            m.title,
                            *(reach_cell(c) if c else missing[m.title] for c in rows[m.title]),
                        ]
                        for m in methods
                    ),
                ]
            ),
            table(
                [
                    ["as shipped", *heads],
                    *(
                        [
                            m.title,
                            *(
                                _shipped_cell(c.shipped, c.limit, question)
                                if c and c.shipped
                                else missing[m.title]
                                for c in rows[m.title]
                            ),
                        ]
                        for m in methods
                        if m.shipped is not None
                    ),
                ]
            ),
            "\n".join(f"- {method.title}: {method.rule}" for method in methods),
        ]
    for head, reasons in {
        "Where there is an exception in place of an answer:": {
            key: cell.failure for key, cell in cells.items()
        },
        "Where it was not measured what it takes to reach the accuracy:": {
            key: cell.unasked for key, cell in cells.items()
        },
    }.items():
        lines = [f"- {key}: {reason}" for key, reason in reasons.items() if reason]
        if lines:
            parts.append("\n".join([head, "", *lines]))
    return "\n\n".join(parts)


def reach_cell(cell: Cell) -> str:
    """What the accuracy takes, or why there is no number."""
    if cell.unasked is not None:
        return "not measured"
    if cell.reach is not None:
        return f"{cell.reach:.0f}"
    if cell.shipped and all(run.failure for run in cell.shipped):
        return "no answer"
    return "never" if cell.never else f"> {cell.limit}"


def _shipped_cell(runs: Sequence[Run], limit: int, question: Question) -> str:
    taken = statistics.median(run.products for run in runs)
    error = sorted(run.error for run in runs)[rank(len(runs)) - 1]
    if taken >= limit and math.isinf(error):
        return f"**> {limit}**"
    if math.isinf(error):
        size = "no answer"
    else:
        size = f"{error:.0e}" if question.accuracy < 1e-2 else f"{100 * error:.2g} %"
    text = f"{taken:.0f} at {size}"
    return text if error <= question.accuracy else f"**{text}**"
