"""Arithmetic of rows whose columns are divided among ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hessfunc.ranks import Ranks
from hessfunc.spaces.inner_products import norms
from hessfunc.spaces.space import Space

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class DividedSpace(Space):
    """Vector space whose columns are divided among ranks: each rank holds distinct columns.

    Attributes:
        along: Ranks that hold the columns.
    """

    along: Ranks

    @property
    def ranks(self) -> Ranks:
        return self.along

    def summed(self, numbers: Tensor, /) -> Tensor:
        return self.ranks.sum(numbers)

    def least(self, number: int, /) -> int:
        return self.ranks.least(number, self.device)

    def on_all(self, act: Callable[[], Made], /) -> Made:
        return self.ranks.all_do(act, self.device)

    def entries(self, rows: Tensor, columns: Tensor, /) -> Tensor:
        # Each column is on one rank, so the sum over ranks has one term.
        return self.summed(rows @ self.units(columns, rows.dtype).mT)

    def norms(self, rows: Tensor, /) -> Tensor:
        return self.summed(norms(rows).square()).sqrt()

    def factored(self, rows: Tensor, /) -> tuple[Tensor, Tensor]:
        # TSQR, Demmel, Grigori, Hoemmen and Langou 2012, arXiv 0808.2664. With the part of rank r
        # factored as rows_r' = Q_r R_r, and the stacked R_r = P R with blocks P_r, the result is
        # rows_r' = (Q_r P_r) R.
        k = len(rows)
        basis, triangle = torch.linalg.qr(rows.mT)
        if len(triangle) < k:
            basis = torch.nn.functional.pad(basis, (0, k - len(triangle)))
            triangle = torch.nn.functional.pad(triangle, (0, 0, 0, k - len(triangle)))
        triangles = self.ranks.gathered(triangle, [k] * self.ranks.size)
        rotation, triangle = torch.linalg.qr(torch.cat(triangles))
        return (basis @ rotation[k * self.ranks.rank : k * (self.ranks.rank + 1)]).mT, triangle
