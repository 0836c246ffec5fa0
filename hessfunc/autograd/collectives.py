"""Collectives of a model as differentiable functions of tensors, in every mode and under vmap.

Each rank differentiates its own scalar, and all ranks together differentiate the sum of them. A
collective that is linear then has the transposed collective as its backward:

    gather (a shard on each rank to the whole tensor)    <->  reduce-scatter (a sum over ranks)
    join (own rows to all rows, equal on each rank)      <->  take one's own rows

All ranks must evaluate and differentiate the same functions in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from hessfunc.ranks import Ranks
from hessfunc.stored import Stored


@dataclass(frozen=True, eq=False)
class Cut:
    """Division of tensors among ranks, each along one axis, as by ``Shard`` of DTensor.

    An axis of length L is divided into parts of ceil(L / R); the last parts may be shorter or
    empty.

    Attributes:
        ranks: Ranks that hold the parts.
        shapes: Shape of each whole tensor.
        axes: Axis along which each tensor is divided; None for a replicated tensor.
    """

    ranks: Ranks
    shapes: tuple[torch.Size, ...]
    axes: tuple[int | None, ...]

    @cached_property
    def extents(self) -> list[list[torch.Size]]:
        """Shape of the part of each rank, by tensor."""
        return [
            [_extent(shape, axis, self.ranks, rank) for rank in range(self.ranks.size)]
            for shape, axis in zip(self.shapes, self.axes, strict=True)
        ]

    def part(self, i: int, whole: Tensor, /) -> Tensor:
        """Return this rank's part of tensor i, as a view."""
        return self._parts(i, whole, 0)[self.ranks.rank]

    def _parts(self, i: int, whole: Tensor, leading: int) -> Sequence[Tensor]:
        axis = self.axes[i]
        if axis is None:
            return [whole] * self.ranks.size
        lengths = [extent[axis] for extent in self.extents[i]]
        return whole.split_with_sizes(lengths, dim=leading + axis)

    def _of_one_message(self, tensors: Sequence[Tensor]) -> Iterator[tuple[bool, list[int]]]:
        """Yield the tensors that are sent together: those of one dtype, divided or replicated."""
        groups: dict[tuple[bool, torch.dtype], list[int]] = {}
        for i, (tensor, axis) in enumerate(zip(tensors, self.axes, strict=True)):
            groups.setdefault((axis is not None, tensor.dtype), []).append(i)
        for (divided, _), group in groups.items():
            yield divided, group

    def gather(self, shards: Sequence[Tensor], leading: int, /) -> tuple[Tensor, ...]:
        """Gather the whole tensors from shards with some leading axes."""
        # Weights travel in the dtype in which they are stored.
        wholes = [x.held if isinstance(x, Stored) else x for x in shards]
        for divided, group in self._of_one_message(wholes):
            if not divided:
                continue
            before = wholes[group[0]].shape[:leading]
            sizes = [self._sizes(group, rank, before) for rank in range(self.ranks.size)]
            mine = torch.cat([wholes[i].reshape(-1) for i in group])
            parts: dict[int, list[Tensor]] = {i: [] for i in group}
            for rank, message in enumerate(self.ranks.gathered(mine, list(map(sum, sizes)))):
                for i, entries in zip(group, message.split(sizes[rank]), strict=True):
                    parts[i].append(entries.view((*before, *self.extents[i][rank])))
            for i, pieces in parts.items():
                axis = self.axes[i]
                assert axis is not None
                wholes[i] = torch.cat(pieces, dim=leading + axis)
        wholes = [whole.to(x.dtype) for whole, x in zip(wholes, shards, strict=True)]
        # A custom function must not return its argument.
        return tuple(w.view_as(w) if w is x else w for w, x in zip(wholes, shards, strict=True))

    def reduce(self, wholes: Sequence[Tensor], leading: int, /) -> tuple[Tensor, ...]:
        """Sum whole tensors with some leading axes over ranks, and return this rank's parts."""
        shards = list(wholes)
        for divided, group in self._of_one_message(wholes):
            before = wholes[group[0]].shape[:leading]
            if divided:
                sizes = [self._sizes(group, rank, before) for rank in range(self.ranks.size)]
                message = wholes[group[0]].new_zeros(self.ranks.size, max(map(sum, sizes)))
                rows = [
                    row.split([*of_rank, len(row) - sum(of_rank)])
                    for row, of_rank in zip(message, sizes, strict=True)
                ]
                for place, i in enumerate(group):
                    for row, part in zip(rows, self._parts(i, wholes[i], leading), strict=True):
                        row[place].view(part.shape).copy_(part)
                mine = self.ranks.reduced(message)
            else:
                mine = self.ranks.sum(torch.cat([wholes[i].reshape(-1) for i in group]))
            own = self._sizes(group, self.ranks.rank, before)
            for i, entries in zip(group, mine.split([*own, len(mine) - sum(own)]), strict=False):
                shards[i] = entries.view((*before, *self.extents[i][self.ranks.rank]))
        return tuple(shards)

    def _sizes(self, group: Sequence[int], rank: int, before: torch.Size) -> list[int]:
        return [before.numel() * self.extents[i][rank].numel() for i in group]


def _extent(shape: torch.Size, axis: int | None, ranks: Ranks, rank: int) -> torch.Size:
    if axis is None:
        return shape
    each = math.ceil(shape[axis] / ranks.size)
    length = max(0, min(each, shape[axis] - each * rank))
    return torch.Size((*shape[:axis], length, *shape[axis + 1 :]))


def gathered(cut: Cut, shards: Sequence[Tensor], /) -> tuple[Tensor, ...]:
    """Return whole tensors from the shards of all ranks.

    The cotangent of a whole tensor is this rank's part of a sum over ranks, so the pullback is
    `reduced`.

    Cost: an all-gather; each rank receives the parts of the others.
    """
    return _of(_Linear(cut.gather, cut.reduce), shards)


def reduced(cut: Cut, wholes: Sequence[Tensor], /) -> tuple[Tensor, ...]:
    """Return this rank's shards of the sum of whole tensors over ranks; the pullback is `gathered`.

    Cost: a reduce-scatter; each rank sends the parts of the others.
    """
    return _of(_Linear(cut.reduce, cut.gather), wholes)


def joined(ranks: Ranks, lengths: Sequence[int], rows: Tensor, /) -> Tensor:
    """Return the rows of all ranks, concatenated along the first axis, equal on every rank.

    All ranks must compute the same function of the result. The pullback therefore takes this
    rank's rows of a cotangent, which is the same on every rank.

    Args:
        ranks: Ranks that each have a part of the rows.
        lengths: Number of rows of each rank.
        rows: Rows of this rank.
    """

    def join(tensors: Sequence[Tensor], leading: int) -> tuple[Tensor, ...]:
        (part,) = tensors
        return (ranks.joined(part.movedim(leading, 0), lengths).movedim(0, leading),)

    def own(tensors: Sequence[Tensor], leading: int) -> tuple[Tensor, ...]:
        (every,) = tensors
        return (every.split_with_sizes(list(lengths), dim=leading)[ranks.rank].clone(),)

    return _of(_Linear(join, own), [rows])[0]


def counted_once(ranks: Ranks, tensor: Tensor, /) -> Tensor:
    """Return a tensor that is equal on every rank, such as a gathered weight, as a joined one.

    All ranks must compute the same function of the result, as with `joined`. The pullback
    therefore divides a cotangent, which is the same on every rank, among ranks that sum it.
    """

    def same(tensors: Sequence[Tensor], leading: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    def divided(tensors: Sequence[Tensor], leading: int) -> tuple[Tensor, ...]:
        return tuple(x / ranks.size for x in tensors)

    return _of(_Linear(same, divided), [tensor])[0]


_OnTensors: TypeAlias = Callable[[Sequence[Tensor], int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Linear:
    """Linear function of tensors with some leading axes, and its transpose over all ranks."""

    act: _OnTensors
    transpose: _OnTensors

    @property
    def mT(self) -> _Linear:
        return _Linear(self.transpose, self.act)


def _of(linear: _Linear, tensors: Sequence[Tensor], leading: int = 0) -> tuple[Tensor, ...]:
    if not tensors:
        return ()
    return _Collective.apply(linear, leading, *tensors)  # type: ignore[no-untyped-call]


class _Collective(Function):
    """Linear function that communicates, and that is its own derivative."""

    @staticmethod
    def forward(linear: _Linear, leading: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return linear.act(tensors, leading)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.linear, ctx.leading = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_of(ctx.linear.mT, cotangents, ctx.leading)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _of(ctx.linear, tangents, ctx.leading)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], linear: _Linear, leading: int, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        blocks = _with_probe_axis(info.batch_size, dims[2:], tensors)
        return _of(linear, blocks, leading + 1), (0,) * len(blocks)


def _with_probe_axis(
    size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Return tensors with the axis of a vmap first, expanded for those that have no such axis."""
    return [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]
