"""The weighted sum of products that one process makes, and the mean that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc.trees import Matvec, Space, Tree, leaves

__all__ = ["Loader", "Share", "Sum"]

Loader: TypeAlias = Literal["whole", "sharded"]


@dataclass(frozen=True)
class Sum:
    """Products of a block with the matrices of batches, weighted and added up.

    Attributes:
        flat: the rows one after another, and room behind them for two numbers, so that all can be
            added up over ranks at once.
        rows: ``(k, n)``, or the columns of this rank; a view.
        weight: of all of these batches.
        checksum: of the examples that were read.
    """

    flat: Tensor
    rows: Tensor
    weight: float
    checksum: Tensor

    @classmethod
    def zero(cls, space: Space, k: int, checksum: Tensor) -> Sum:
        dtype = torch.promote_types(space.dtype, torch.float32)
        flat = torch.zeros(k * space.width + 2, dtype=dtype, device=space.device)
        return cls(flat, flat[:-2].view(k, space.width), 0.0, checksum)

    @classmethod
    def of(
        cls, space: Space, block: Tree, products: Iterable[tuple[float, Tree]], checksum: Tensor
    ) -> Sum:
        total = cls.zero(space, len(space.block_leaves(block)[0]), checksum)

        def add(weight: float, product: Tree) -> float:
            space.accumulate(total.rows, product, weight=weight)
            return weight

        # No product is named here: it is gone before the next one is made.
        return replace(total, weight=sum(starmap(add, products), 0.0))

    def mean(self, space: Space) -> Tree:
        if not self.weight > 0:
            raise ValueError(
                "the weights of the batches sum to zero: is the loader empty, or does `weight` "
                "count nothing?"
            )
        views = leaves(space.views(self.rows.div_(self.weight)))
        # Each leaf in its own dtype, but float32 at least.
        dtypes = (torch.promote_types(dtype, torch.float32) for dtype in space.dtypes)
        return space.tree(view.to(dtype) for view, dtype in zip(views, dtypes, strict=True))


class Share:
    """All of the work, on the one process that there is."""

    def place(self, i: int, /) -> int | None:
        """Where the i-th batch of this process stands among all; None if another takes it."""
        return i

    def all_well(self, act: Callable[[], None], /) -> None:
        """Do it, and raise on every process if it fails on one."""
        act()

    def over(self, space: Space, local: Callable[[Tree], Sum], /) -> Matvec:
        """The matvec of the mean, given the sum of one process."""
        return lambda block: local(block).mean(space)
