"""Formatted numbers of an analysis, for the terminal and the page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.table import Table

from hessfunc.algorithms.results import Eigenpairs, Estimate, Result
from hessfunc.app import terminal


@dataclass(frozen=True)
class Number:
    """Number of the content with its format.

    Attributes:
        value: Value, or None if it is not known.
        style: Format specification.
    """

    value: float | None
    style: str

    def __str__(self) -> str:
        return "unknown" if self.value is None else format(self.value, self.style)


Words: TypeAlias = tuple[Number | str, ...]


@dataclass(frozen=True)
class Row:
    """Row of a table: one quantity with its value and uncertainty.

    Attributes:
        label: Name of the quantity.
        value: Value of the quantity.
        sureness: Residual or interval of the value.
    """

    label: str
    value: Words
    sureness: Words = ()


def aligned(column: Sequence[Words], /) -> list[str]:
    """Return the blanks that align the decimal points of a right-aligned column.

    A figure space is as wide as a digit, and a punctuation space as wide as a point.
    """
    ends = [_decimals(plain(words)) for words in column]
    most = max((end for end in ends if end is not None), default=0)
    return [
        # A number with an exponent has no point to align.
        ""
        if end is None
        else "\N{PUNCTUATION SPACE}" * (not end and bool(most)) + "\N{FIGURE SPACE}" * (most - end)
        for end in ends
    ]


def _decimals(text: str) -> int | None:
    """Return the number of digits after the point; None for a number with an exponent."""
    return len(text.partition(".")[2]) if _NUMBER.fullmatch(text) else None


# Number without an exponent.
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d*")


def plain(words: Words, /) -> str:
    """Return the words as plain text."""
    return "".join(map(str, words))


def headline(subject: Mapping[str, Any], /) -> Words:
    """Return matrix, loss, examples, parameters, dtype and device on one line."""
    return (
        f"{subject['matrix']} of the ",
        *("loss ", Number(subject["loss"], ".4g")),
        *(" over ", Number(subject["examples"], ","), " examples, "),
        *(Number(subject["parameters"], ","), " parameters, "),
        *(subject["dtype"], " on ", subject["device"]),
    )


def rows(name: str, data: Mapping[str, Any], /) -> Iterator[Row]:
    """Yield the rows of a part.

    Args:
        name: Name of the part, one of `NAMES`.
        data: Plain data of the part.
    """
    match name:
        case "eigenvalues" | "smallest":
            label = "eigenvalue {}" if name == "eigenvalues" else "smallest"
            columns = (data["values"], data["residuals"], data["converged"])
            for i, (value, residual, converged) in enumerate(zip(*columns, strict=True), start=1):
                doubt = () if converged else (" (not converged)",)
                sureness = (Number(residual, ".1e"), *doubt)
                yield Row(label.format(i), (Number(value, ".5g"),), sureness)
        case "trace":
            low, high = data["interval_95"]
            sureness = (Number(low, ".4g"), " to ", Number(high, ".4g"))
            yield Row("trace", (Number(data["value"], ".5g"),), sureness)
        case "density":
            size = (Number(data["probes"], ""), " x ", Number(data["steps"], ""), " nodes")
            yield Row("density", size)
        case "line":
            yield Row("loss on line", (Number(len(data["x"]), ""), " points"))
        case "plane":
            size = (Number(len(data["x"]), ""), " x ", Number(len(data["y"]), ""), " grid")
            yield Row("loss on plane", size)
        case _:
            raise ValueError(f"{name!r} is not a part of an analysis")


def brief(result: Result, /) -> str:
    """Return the state of a running result in a few words."""
    match result:
        case Eigenpairs():
            done = int(result.converged.sum())
            return f"{result.values[0]:.4g}, {done} of {len(result.values)} converged"
        case Estimate():
            return f"{result.value:.4g} ± {result.stderr:.2g}"
        case _:
            return ""


def table(results: Mapping[str, Mapping[str, Any]], /) -> Table:
    """Return a table of all values with residual or interval, and of the cost of each part.

    Args:
        results: Plain data of each part, by name.
    """
    lines: list[tuple[str, ...]] = []
    for name, data in results.items():
        cost = [f"{data['matvecs']:,}", f"{data['seconds']:.1f} s"]
        for row in rows(name, data):
            lines.append((row.label, plain(row.value), plain(row.sureness), *cost))
            cost = []
        lines.append(())
    columns = ("", "value", "residual or 95 % interval", "products", "time")
    return terminal.table(columns, lines)
