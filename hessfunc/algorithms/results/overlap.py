"""Overlaps of two sets of vectors, and the angles between their spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.display import shown


@dataclass(frozen=True, kw_only=True, repr=False)
class Overlap(Result):
    """Overlaps of k vectors u with l vectors w, and the angles between their spans.

    Attributes:
        cosines: Absolute cosines ``|<u_i, w_j>| / (|u_i| |w_j|)``, float64 ``(k, l)``.
        angles: Principal angles between the spans in ascending order, in radians, float64
            ``(min(k, l),)``; 0 for a shared direction, pi / 2 for an orthogonal one.
        captured: Share of each ``|w_j|^2`` that lies in the span of the u, float64 ``(l,)``.
    """

    cosines: Tensor
    angles: Tensor
    captured: Tensor

    def _headline(self) -> dict[str, object]:
        return {
            "shape": tuple(self.cosines.shape),
            "largest": f"{float(self.cosines.max()):.4g}",
            "angles": shown(self.angles, 4),
            "captured": shown(self.captured, 4),
        }

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        rows, columns = self.cosines.shape
        return {
            "u": [i for i in range(rows) for _ in range(columns)],
            "w": list(range(columns)) * rows,
            "cosine": self.cosines.flatten().tolist(),
        }
