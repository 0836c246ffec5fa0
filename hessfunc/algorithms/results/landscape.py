"""Landscape of a loss along one or two directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from hessfunc.algorithms.results.result import Result

Normalise: TypeAlias = Literal["filter", "unit"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Landscape(Result):
    """Loss along one direction u, or along two directions u and v.

        values_i = loss(params + x_i u),  values_ij = loss(params + x_i u + y_j v)

    Attributes:
        values: Losses, float64 ``(p,)`` or ``(p, q)``; infinite or NaN where the loss is, and NaN
            at points that a running result has not reached.
        x: Coordinates along u, float64 ``(p,)``.
        y: Coordinates along v, float64 ``(q,)``; None for one direction.
        lengths: Lengths ``|u|``, or ``|u|`` and ``|v|``, after normalisation, float64.
        normalise: Normalisation of the directions: ``"filter"``, ``"unit"``, or None for none.
        evaluations: Number of evaluations of the loss of one batch at one point. No product is
            made.
    """

    values: Tensor
    x: Tensor
    y: Tensor | None
    lengths: Tensor
    normalise: Normalise | None
    evaluations: int

    def _headline(self) -> dict[str, object]:
        known = self.values[self.values.isfinite()]
        loss = f"[{float(known.min()):.4g}, {float(known.max()):.4g}]" if len(known) else "[]"
        return {"shape": tuple(self.values.shape), "loss": loss, "evaluations": self.evaluations}
