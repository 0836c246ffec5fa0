"""An analysis as plain data: what ``results.json`` holds, and all that is shown of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from hessfunc.algorithms.results import Density, Eigenpairs, Estimate, Result, versions
from hessfunc.algorithms.results.landscape import Landscape

# In the order in which they are found.
NAMES = ("eigenvalues", "smallest", "trace", "density", "line", "plane")


@dataclass(frozen=True)
class Part:
    """One finished part of an analysis.

    Attributes:
        name: one of `NAMES`.
        result: what was found.
        seconds: how long that took.
    """

    name: str
    result: Result
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What is analysed.

    Attributes:
        target: its name.
        parameters: how many numbers they are.
        examples: how many the loss is the mean over.
        batches: in so many batches.
        loss: its value.
        dtype: of the parameters.
        device: of the parameters.
    """

    target: str
    parameters: int
    examples: int
    batches: int
    loss: float
    dtype: str
    device: str


@dataclass(frozen=True)
class Run:
    """How an analysis was started.

    Attributes:
        command: as a shell takes it.
        seed: of all that is random.
        began: when, in ISO 8601.
    """

    command: str
    seed: int
    began: str


def content(
    run: Run, subject: Subject | None, parts: Iterable[Part], /, *, status: str
) -> dict[str, Any]:
    """Plain data of an analysis, finished or not."""
    return {
        "status": status,
        "subject": subject and asdict(subject),
        "run": asdict(run),
        "versions": versions(),
        "results": {part.name: as_json(part) for part in parts},
    }


def as_json(part: Part, /) -> dict[str, Any]:
    """Plain data of a part, without vectors and samples; what is not finite is None."""
    result = part.result
    found: dict[str, Any] = {}
    match result:
        case Eigenpairs():
            for name in ("values", "residuals", "intervals", "converged"):
                found[name] = getattr(result, name)
        case Estimate():
            found["value"] = result.value
            found["stderr"] = result.stderr
            found["interval_95"] = list(result.interval(0.95))
            found["by_leaf"] = result.by_leaf
        case Density():
            found["n"] = result.n
            found["probes"], found["steps"] = result.nodes.shape
            for name in ("width", "nodes", "weights"):
                found[name] = getattr(result, name)
        case Landscape():
            for name in ("evaluations", "normalise", "lengths", "x", "y", "values"):
                found[name] = getattr(result, name)
    found |= {
        "matvecs": result.matvecs,
        "passes": result.passes,
        "seconds": round(part.seconds, 3),
        "reason": result.reason,
        "seed": result.seed,
    }
    return {name: _plain(value) for name, value in found.items()}


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
    """Strict JSON, indented, with each list of numbers on one line."""
    text = json.dumps(content, indent=2, allow_nan=False)
    # No string of JSON has a line break, so what spans lines here is a list.
    return re.sub(r"\[\n[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text) + "\n"
