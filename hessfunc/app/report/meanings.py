"""Sentences that interpret the numbers and figures of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hessfunc.app.report.rows import Number, Words

# Meaning of a residual, for every table of eigenvalues.
RESIDUAL = (
    "A residual is |A v \N{MINUS SIGN} value v| of the computed eigenvector v: some eigenvalue "
    "lies within this distance of the value."
)


def meaning(name: str, data: Mapping[str, Any], matrix: str, /) -> Words:
    """Return the sentence about a part, empty if its numbers say nothing more.

    Args:
        name: Name of the part.
        data: Plain data of the part.
        matrix: Name of the curvature matrix.
    """
    match name:
        case "eigenvalues" if data.get("stable_step") is not None:
            step = Number(data["stable_step"], ".3g")
            start = f"On a quadratic with this {matrix}, gradient descent is stable below a step "
            return (start, "size of ", step, ".")
        case "smallest":
            return _smallest(data, matrix)
        case "trace" if data.get("mean_eigenvalue") is not None:
            bars = ". Bars show the parts of the parameters, with their 95 % intervals."
            return ("The mean of all eigenvalues is ", Number(data["mean_eigenvalue"], ".3g"), bars)
        case "density" if count := data.get("count"):
            low, high = Number(count["low"], ","), Number(count["high"], ",")
            number = (low,) if count["low"] == count["high"] else (low, " to ", high)
            above = Number(count["above"], ".3g")
            bump = ". A bump of the height of the dashed line is about one eigenvalue."
            return ("With 95 % confidence, ", *number, " eigenvalues are above ", above, bump)
        case "line":
            return _line(data)
        case "plane":
            return ("Equal lengths on both axes are equal distances of the parameters.",)
    return ()


def _smallest(data: Mapping[str, Any], matrix: str) -> Words:
    if not data["values"] or None in (data["values"][0], data["residuals"][0]):
        return ()
    value, residual = data["values"][0], data["residuals"][0]
    if value + residual < 0:
        return (
            f"The {matrix} has a negative eigenvalue: the loss curves downwards along its "
            "eigenvector, so the parameters are not at a minimum.",
        )
    if value - residual > 0 and data["converged"][0]:
        return (
            f"The smallest eigenvalue that was found is positive: the {matrix} shows no direction "
            "of negative curvature.",
        )
    return ("The smallest eigenvalue that was found is zero within its residual.",)


def _line(data: Mapping[str, Any]) -> Words:
    known = [(v, x) for v, x in zip(data["values"], data["x"], strict=True) if v is not None]
    if not known:
        return ()
    lowest, at = min(known)
    if at == 0:
        return ("On this line, the loss is lowest at the parameters.",)
    return (
        *("On this line, the loss is lowest, ", Number(lowest, ".4g"), ", at "),
        *(Number(at, ".3g"), " from the parameters."),
    )
