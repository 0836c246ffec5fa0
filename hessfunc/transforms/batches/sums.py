"""The weighted sum of products that one process makes, and the mean that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.checksum import Checksum
from hessfunc.transforms.batches.reductions import Average
from hessfunc.trees import Matvec, Tree, leaves

Made = TypeVar("Made")

Data: TypeAlias = Literal["replicated", "sharded"]


@dataclass
class Read:
    """The checksums of one pass over the batches.

    Attributes:
        all: of what was read.
        own: of the batches that this process multiplies.
    """

    all: Checksum
    own: Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> Read:
        none = Checksum(device)
        return cls(none, none.total.clone())

    def add(self, batch: Any, *, own: bool) -> None:
        found = self.all.add(batch)
        if own:
            self.own += found


@dataclass(frozen=True)
class Sum:
    """Products of a block with the matrices of batches, weighted and added up.

    Attributes:
        flat: the rows one after another, and room behind them for two numbers, so that all can be
            added up over ranks at once.
        rows: ``(k, n)``, or the columns of this rank; a view.
        weight: of all of these batches.
        read: the checksums of the pass.
        average: How batches are put together.
    """

    flat: Tensor
    rows: Tensor
    weight: float
    read: Read
    average: Average

    @classmethod
    def zero(cls, space: Space, k: int, read: Read, average: Average) -> Sum:
        dtype = torch.promote_types(space.dtype, torch.float32)
        flat = torch.zeros(k * space.width + 2, dtype=dtype, device=space.device)
        return cls(flat, flat[:-2].view(k, space.width), 0.0, read, average)

    @classmethod
    def of(
        cls,
        space: Space,
        block: Tree,
        batches: Iterable[tuple[Callable[[], float], Callable[[], Matvec]]],
        read: Read,
        average: Average,
    ) -> Sum:
        """Sum over all batches, from functions that give the weight and the matvec of each.

        The weight is asked for after the matvec is made, which shows what the loss is.
        """
        total = cls.zero(space, len(space.block_leaves(block)[0]), read, average)

        def add(weight: Callable[[], float], matvec: Callable[[], Matvec]) -> float:
            # A rank that has no vector to multiply reads its batches, and no more.
            if len(total.rows):
                space.accumulate(total.rows, matvec()(block), weight=weight())
            return weight()

        # Neither matvec nor product is named: they are gone before the next graph is made.
        return replace(total, weight=sum(starmap(add, batches), 0.0))

    def mean(self, space: Space) -> Tree:
        """Return the weighted mean, or the sum of a loss that is a sum over examples."""
        if not self.weight > 0:
            raise ValueError(
                "the weights of the batches sum to zero: is the loader empty, or does `weight` "
                "count nothing?"
            )
        views = leaves(space.views(self.rows.div_(self.average.divisor(self.weight))))
        # Each leaf in its own dtype, but float32 at least.
        dtypes = (torch.promote_types(dtype, torch.float32) for dtype in space.dtypes)
        return space.tree(view.to(dtype) for view, dtype in zip(views, dtypes, strict=True))


class Share:
    """All of the work, on the one process that there is."""

    def place(self, i: int, /) -> int | None:
        """Where the i-th batch of this process stands among all; None if another takes it."""
        return i

    def all_well(self, act: Callable[[], Made], /) -> Made:
        """What ``act`` returns; its error on one process is an error on every one."""
        return act()

    def refuse_unlike(self, space: Space, params: Tree, batches: Iterable[Any], /) -> None:
        """Raise where processes are not given the same."""

    def over(self, space: Space, batches: Iterable[Any], local: Callable[[Tree], Sum], /) -> Matvec:
        """The matvec of the mean, given the sum of one process."""
        return lambda block: local(block).mean(space)
