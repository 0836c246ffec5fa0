"""Weighted sums of the products of batches on one process, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from hessfunc.autograd.functorch import transforming
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.checksum import Checksum
from hessfunc.transforms.batches.reductions import Average
from hessfunc.trees import Matvec, Tree, leaves

Made = TypeVar("Made")

Data: TypeAlias = Literal["replicated", "sharded"]
Keep: TypeAlias = bool | Literal["auto"]


@dataclass
class Read:
    """Checksums of one pass over the batches.

    Attributes:
        all: Checksum of all batches that this process read.
        own: Checksum of the batches that this process multiplied.
        fixed: Frozen parameters and buffers that the losses of the batches read, by name.
    """

    all: Checksum
    own: Tensor
    fixed: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def nothing(cls, device: torch.device) -> Read:
        none = Checksum(device)
        return cls(none, none.total.clone())

    def add(self, batch: Any, *, own: bool) -> None:
        added = self.all.add(batch)
        if own:
            self.own += added


@dataclass(frozen=True)
class Sum:
    """Weighted sum of the products of a block with the matrices of batches.

    Attributes:
        flat: Tensor with all rows and two further entries, so that a single all-reduce can sum
            rows and weight.
        rows: View ``(k, n)`` of the rows, or of the columns on this rank.
        weight: Total weight of the batches.
        read: Checksums of the pass.
        average: Combination of the batches.
        attached: Leaves of the weighted sum of those products that have a graph, which rows would
            lose; None if there is none.
    """

    flat: Tensor
    rows: Tensor
    weight: float
    read: Read
    average: Average
    attached: list[Tensor] | None = None

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
        """Sum over all batches, given functions that return the weight and matvec of each.

        The weight is computed after the matvec, because making the matvec reveals the loss.
        """
        total = cls.zero(space, len(space.block_leaves(block)[0]), read, average)
        attached: list[Tensor] | None = None

        def add_product(product: Tree, weight: float) -> None:
            nonlocal attached
            if not (transforming() or (torch.is_grad_enabled() and has_graph(product))):
                space.accumulate(total.rows, product, weight=weight)
                return
            parts = [weight * leaf for leaf in leaves(product)]
            if attached is not None:
                parts = [a + part for a, part in zip(attached, parts, strict=True)]
            attached = parts

        def add(weight: Callable[[], float], matvec: Callable[[], Matvec]) -> float:
            # A rank without vectors only reads its batches, for the checksum and the weight.
            if len(total.rows):
                # No variable holds the matvec or the product, so both are freed before the next
                # graph.
                add_product(matvec()(block), weight())
            return weight()

        weight = sum(starmap(add, batches), 0.0)
        return replace(total, weight=weight, attached=attached)

    def mean(self, space: Space) -> Tree:
        """Return the weighted mean, or the sum if the loss is a sum over examples."""
        refuse_no_weight(self.weight)
        divisor = self.average.divisor(self.weight)
        parts = leaves(space.views(self.rows.div_(divisor)))
        if self.attached is not None:
            parts = [p + a / divisor for p, a in zip(parts, self.attached, strict=True)]
        # Each leaf keeps its dtype, except that 16-bit leaves become float32.
        dtypes = (torch.promote_types(dtype, torch.float32) for dtype in space.dtypes)
        return space.tree(part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True))


@dataclass(frozen=True)
class Passed:
    """Numbers that one process has summed in a pass over its batches.

    Attributes:
        flat: Sums; empty without a batch.
        read: Checksums of the pass.
        average: Combination of the batches.
    """

    flat: Tensor
    read: Read
    average: Average


def refuse_no_weight(weight: float, /) -> None:
    """Raise ValueError unless the total weight of the batches is positive."""
    if not weight > 0:
        raise ValueError(
            "the weights of the batches sum to zero: check that the loader is not empty, and that "
            "`weight` returns positive numbers"
        )


def has_graph(tree: Tree, /) -> bool:
    """Return whether a leaf requires a gradient."""
    return any(leaf.requires_grad for leaf in leaves(tree))


class Partition:
    """Single-process partition: this process evaluates every batch."""

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of its batches, instead of one with the same."""
        return True

    def place(self, i: int, /) -> int | None:
        """Return the index among all batches of the i-th batch read here, None if not evaluated."""
        return i

    def all_well(self, act: Callable[[], Made], /) -> Made:
        """Return the result of ``act``; an error on one process raises on all processes."""
        return act()

    def refuse_unlike(
        self, space: Space, params: Tree, batches: Iterable[Any], options: Mapping[str, object], /
    ) -> None:
        """Raise if processes have different options or parameters, or incompatible loaders."""

    def over(self, space: Space, batches: Iterable[Any], local: Callable[[Tree], Sum], /) -> Matvec:
        """Return the matvec of the mean, given the function that computes the sum of a process."""
        return lambda block: local(block).mean(space)

    def summed(self, batches: Iterable[Any], local: Callable[[], Passed], /) -> Tensor:
        """Return the sum over processes, given the function that passes over one's own batches."""
        return local().flat

    def each(
        self, function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], /
    ) -> list[Tensor]:
        """Return a function of each matrix, of its shape; processes divide the matrices."""
        return [function(matrix) for matrix in matrices]

    def gathered(self, own: Made, /) -> list[Made]:
        """Return the object of each process that has batches of its own."""
        return [own]
