"""Result of a landscape: a loss along one or two directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from hessfunc.algorithms.results.result import Result

Normalise: TypeAlias = Literal["filter", "unit"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Landscape(Result):
    """A loss along one direction u, or along two, u and v.

        values_i = loss(params + x_i u),  values_ij = loss(params + x_i u + y_j v)

    Attributes:
        values: float64 ``(p,)`` or ``(p, q)``; infinite or NaN where the loss is, and NaN where it
            is not known yet.
        x: coordinates along the first direction, float64 ``(p,)``.
        y: along the second, float64 ``(q,)``; None along one direction.
        lengths: |u|, or |u| and |v|, after they were normalised, float64.
        normalise: how they were: ``"filter"``, ``"unit"``, or None, as they came.
        evaluations: of the loss of one batch at one point; no product is made.
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
