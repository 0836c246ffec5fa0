"""The numbers of an analysis as they are written, on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich import box
from rich.table import Table

from hessfunc.algorithms.results import Eigenpairs, Estimate, Result


@dataclass(frozen=True)
class Number:
    """A number of the content, and how it is written.

    Attributes:
        value: None where it is not known.
        style: a format specification.
    """

    value: float | None
    style: str

    def __str__(self) -> str:
        return "unknown" if self.value is None else format(self.value, self.style)


Words: TypeAlias = tuple[Number | str, ...]


@dataclass(frozen=True)
class Row:
    """What is known of one quantity.

    Attributes:
        label: its name.
        value: what was found.
        sureness: its residual, or its interval.
    """

    label: str
    value: Words
    sureness: Words = ()


def plain(words: Words, /) -> str:
    """The words as text."""
    return "".join(map(str, words))


def headline(subject: Mapping[str, Any], /) -> Words:
    """What is analysed, in one line."""
    return (
        *("loss ", Number(subject["loss"], ".4g")),
        *(" over ", Number(subject["examples"], ","), " examples, "),
        *(Number(subject["parameters"], ","), " parameters, "),
        *(subject["dtype"], " on ", subject["device"]),
    )


def rows(name: str, found: Mapping[str, Any], /) -> Iterator[Row]:
    """What a part has found, number by number.

    Args:
        name: of the part, one of `NAMES`.
        found: its plain data.
    """
    match name:
        case "eigenvalues" | "smallest":
            label = "eigenvalue {}" if name == "eigenvalues" else "smallest"
            columns = (found["values"], found["residuals"], found["converged"])
            for i, (value, residual, converged) in enumerate(zip(*columns, strict=True), start=1):
                doubt = () if converged else (" (not converged)",)
                sureness = (Number(residual, ".1e"), *doubt)
                yield Row(label.format(i), (Number(value, ".5g"),), sureness)
        case "trace":
            low, high = found["interval_95"]
            sureness = (Number(low, ".4g"), " to ", Number(high, ".4g"))
            yield Row("trace", (Number(found["value"], ".5g"),), sureness)
        case "density":
            size = (Number(found["probes"], ""), " x ", Number(found["steps"], ""), " nodes")
            yield Row("density", size)
        case "line":
            yield Row("loss on line", (Number(len(found["x"]), ""), " points"))
        case "plane":
            size = (Number(len(found["x"]), ""), " x ", Number(len(found["y"]), ""), " grid")
            yield Row("loss on plane", size)
        case _:
            raise ValueError(f"{name!r} is no part of an analysis")


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


def table(results: Mapping[str, Mapping[str, Any]], /) -> Table:
    """Each number with its residual or its interval, and what each part has cost.

    Args:
        results: the plain data of each part, by name.
    """
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("", no_wrap=True)
    for column in ("value", "residual or 95 % interval", "products", "time"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for name, found in results.items():
        cost = [f"{found['matvecs']:,}", f"{found['seconds']:.1f} s"]
        for row in rows(name, found):
            drawn.add_row(row.label, plain(row.value), plain(row.sureness), *cost)
            cost = []
        drawn.add_section()
    return drawn
