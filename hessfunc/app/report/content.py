"""Analysis as plain data: the content of ``results.json`` and of every report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from hessfunc.algorithms.results import Density, Eigenpairs, Estimate, LeafEstimate, Result
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.algorithms.results.result import versions

# Names of the parts, in the order in which they are computed.
NAMES = ("eigenvalues", "smallest", "trace", "density", "line", "plane")


@dataclass(frozen=True)
class Part:
    """Finished part of an analysis.

    Attributes:
        name: Name of the part, one of `NAMES`.
        result: Result of the algorithm.
        seconds: Wall-clock time in seconds.
    """

    name: str
    result: Result
    seconds: float


@dataclass(frozen=True)
class Subject:
    """Network and data that are analysed.

    Attributes:
        target: Name of the target.
        parameters: Number of parameter entries.
        examples: Number of examples over which the loss is averaged.
        batches: Number of batches of these examples.
        loss: Mean loss over the examples.
        dtype: Dtype of the parameters.
        device: Device of the parameters.
        matrix: Name of the curvature matrix.
    """

    target: str
    parameters: int
    examples: int
    batches: int
    loss: float
    dtype: str
    device: str
    matrix: str = "Hessian"


@dataclass(frozen=True)
class Invocation:
    """Invocation of an analysis.

    Attributes:
        command: Command line, quoted for a shell.
        seed: Seed of all random numbers.
        began: Start time in ISO 8601 format.
    """

    command: str
    seed: int
    began: str


def content(
    run: Invocation, subject: Subject | None, parts: Iterable[Part], /, *, status: str
) -> dict[str, Any]:
    """Return the plain data of an analysis, finished or not."""
    return {
        "status": status,
        "subject": subject and asdict(subject),
        "run": asdict(run),
        "versions": versions(),
        "results": {part.name: as_json(part) for part in parts},
    }


def as_json(part: Part, /) -> dict[str, Any]:
    """Return the plain data of a part, without vectors and samples; NaN and Inf become None."""
    result = part.result
    data: dict[str, Any] = {}
    match result:
        case Eigenpairs():
            for name in ("values", "residuals", "intervals", "converged"):
                data[name] = getattr(result, name)
            largest = float(result.values.max()) if len(result.values) else 0.0
            # Gradient descent with step size s is stable on a quadratic if s < 2 / eigenvalue.
            data["stable_step"] = 2 / largest if largest > 0 else None
        case Estimate():
            data["value"] = result.value
            data["stderr"] = result.stderr
            data["interval_95"] = list(result.interval(0.95))
            data["mean_eigenvalue"] = result.value / result.n if result.n else None
            data["by_leaf"] = result.by_leaf
            data["by_leaf_95"] = {name: _interval(part) for name, part in result.by_leaf.items()}
        case Density():
            data["n"] = result.n
            data["probes"], data["steps"] = result.nodes.shape
            for name in ("width", "nodes", "weights", "masses"):
                data[name] = getattr(result, name)
            data["count"] = _count(result)
        case Landscape():
            for name in ("evaluations", "normalise", "lengths", "x", "y", "values"):
                data[name] = getattr(result, name)
    data |= {
        "matvecs": result.matvecs,
        "passes": result.passes,
        "seconds": round(part.seconds, 3),
        "reason": result.reason,
        "seed": result.seed,
    }
    return {name: _plain(value) for name, value in data.items()}


def _interval(part: float) -> list[float]:
    """Return the 95 % interval of the part of a leaf, NaN if it is unknown."""
    if isinstance(part, LeafEstimate):
        return list(part.interval(0.95))
    return [math.nan, math.nan]


def _count(density: Density) -> dict[str, float] | None:
    """Return bounds of the number of eigenvalues above a tenth of the largest Ritz value."""
    largest = float(density.nodes[density.weights > 0].max())
    if not largest > 0 or density.residuals is None:
        return None
    above = float(f"{largest / 10:.1g}")
    low, high = density.count_above(above, 0.95)
    return {"above": above, "low": low, "high": high}


def _plain(value: Any) -> Any:
    match value:
        case Tensor():
            return _plain(value.tolist())
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case _:
            return value


def as_text(content: dict[str, Any], /) -> str:
    """Return strict, indented JSON with each list of numbers on one line."""
    text = json.dumps(content, indent=2, allow_nan=False)
    # JSON strings contain no line breaks, so a bracketed match over several lines is a list.
    return re.sub(r"\[\n[^][{}\"]*\]", lambda match: " ".join(match[0].split()), text) + "\n"
