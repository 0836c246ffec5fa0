"""Landscape of a loss along one or two directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.display import curve

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

    def _sparkline(self) -> str | None:
        if self.y is not None:
            return None
        return curve(self.x.tolist(), self.values.tolist(), title="loss along the direction")

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        if self.y is None:
            return {"x": self.x.tolist(), "loss": self.values.tolist()}
        return {
            "x": self.x.repeat_interleave(len(self.y)).tolist(),
            "y": self.y.repeat(len(self.x)).tolist(),
            "loss": self.values.flatten().tolist(),
        }
