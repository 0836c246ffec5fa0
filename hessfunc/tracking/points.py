"""Points of a training as one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hessfunc.display import Displayed, curve
from hessfunc.tracking.measure import Point


class Points(Displayed, list[Point]):
    """Points in the order of their steps; a list of `Point`."""

    def _headline(self) -> dict[str, object]:
        if not self:
            return {"points": 0}
        steps = f"{self[0].step} to {self[-1].step}"
        last = {f"last {name}": text for name, text in self[-1]._headline().items()}
        return {"points": len(self), "steps": steps, **last}

    def _sparkline(self) -> str | None:
        known = [(point.step, point.top[0]) for point in self if point.top]
        if not known:
            return None
        steps, values = zip(*known, strict=True)
        return curve(steps, values, title="largest eigenvalue against steps")

    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return the points as plain Python, in a list under ``"points"``.

        Args:
            vectors: Accepted as for other results; points have no vectors.
        """
        return {"kind": "Points", "points": [point.to_dict() for point in self]}

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        rows = [row(point) for point in self]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}


def row(point: Point, /) -> dict[str, Any]:
    """Return the numbers of a point, with one column for each eigenvalue: top_1, top_2, ..."""
    row: dict[str, Any] = {"step": point.step, "epoch": point.epoch, "lr": point.lr}
    for name, value in point.to_dict().items():
        if isinstance(value, list):
            end = name.removesuffix("_residuals")
            kind = "_residual" if end != name else ""
            row |= {f"{end}_{i}{kind}": x for i, x in enumerate(value, 1)}
        elif name != "kind":
            row[name] = value
    return row
