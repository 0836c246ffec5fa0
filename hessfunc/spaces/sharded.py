"""Vector space of a replicated tree, with rows that are divided among the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hessfunc.options import validated
from hessfunc.ranks import Ranks
from hessfunc.spaces.divided import DividedSpace
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Tree

# Number of entries of rows that are gathered at once.
_GATHERED = 2**22


@validated
def sharded(like: Tree, mesh: DeviceMesh, /) -> ShardedSpace:
    """Return a vector space that divides each vector among the ranks of a mesh.

    Pass it as ``space=`` to an algorithm. Each of R ranks then holds 1/R of the basis and does 1/R
    of the arithmetic. The ranks gather the vector block before each product, and each rank keeps
    its part of the product. Numbers that control the algorithm have the same bits on all ranks.

        space = hf.sharded(params, mesh)
        top = hf.lanczos(matvec, params, k=10, space=space)
        space.gathered(top.vectors)                             # the same block on every rank

    All ranks must call the algorithm with the same options. The ``vectors`` of the result are this
    rank's part, rows ``(k, about n / R)``. They can be passed to ``start`` or ``deflate``.

    Args:
        like: Parameters, replicated on each rank.
        mesh: Mesh of ranks, with one axis or several.

    Raises:
        ValueError: If the ranks have different leaves, or if the mesh does not contain this
            process.
        ConnectionError: If another rank has ended or does not take part. Algorithms raise it too.

    Cost: each product gathers a block of k vectors, k n numbers. An inner product is an all-reduce
    of one number.
    """
    whole = space_of(like)
    ranks = Ranks.of(mesh)
    ranks.agree(whole.fingerprint(), whole.device)
    own = {item.name: getattr(whole, item.name) for item in fields(Space)}
    return ShardedSpace(**own, along=ranks)


@dataclass(frozen=True, eq=False)
class ShardedSpace(DividedSpace):
    """Vector space in which each rank holds a contiguous range of columns."""

    @cached_property
    def columns(self) -> range:
        return self.ranks.parts(self.n)[self.ranks.rank]

    @cached_property
    def spans(self) -> list[range]:
        spans, begin = [], 0
        for size in self.sizes:
            first = min(max(self.columns.start - begin, 0), size)
            last = min(max(self.columns.stop - begin, 0), size)
            spans.append(range(first, max(first, last)))
            begin += size
        return spans

    @property
    def widest(self) -> int:
        return max(map(len, self.ranks.parts(self.n)))

    def gathered(self, vectors: Tensor, /) -> Tree:
        """Gather the vectors of a result as a vector block that is replicated on every rank.

        All ranks must call this method.

        Cost: k n numbers, in memory and in communication.
        """
        return self.unravel(vectors)

    def vectors(self, rows: Tensor, /) -> Tree:
        return rows

    def rows(self, vectors: Tree, /, *, dtype: torch.dtype | None = None) -> Tensor:
        is_vector = self.shapes == (getattr(vectors, "shape", None),)
        if isinstance(vectors, Tensor) and vectors.shape[1:] == (self.width,) and not is_vector:
            return vectors.detach().to(dtype or self.dtype)
        return super().rows(vectors, dtype=dtype)

    def ravel_leaves(
        self, tensors: Sequence[Tensor], /, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        rows = torch.empty(
            len(tensors[0]), self.width, dtype=dtype or self.dtype, device=self.device
        )
        parts = rows.split([len(span) for span in self.spans], dim=1)
        for part, leaf, span in zip(parts, tensors, self.spans, strict=True):
            part.copy_(_flat(leaf)[:, span.start : span.stop])
        return rows

    def unravel(self, rows: Tensor, /) -> Tree:
        if rows.dim() == 1:
            return super().unravel(self._whole(rows[None])[0])
        return super().unravel(self._whole(rows))

    def _whole(self, rows: Tensor) -> Tensor:
        """Gather all columns of the rows.

        A few rows are gathered at once, because each piece is in memory twice.
        """
        lengths = [len(part) for part in self.ranks.parts(self.n)]
        whole = rows.new_empty(len(rows), self.n)
        few = max(1, _GATHERED // max(self.n, 1))
        for mine, target in zip(rows.split(few), whole.split(few), strict=True):
            padded = torch.nn.functional.pad(mine, (0, max(lengths) - self.width))
            parts = self.ranks.gathered(padded, [len(mine)] * self.ranks.size)
            for part, columns in zip(parts, target.split(lengths, dim=1), strict=True):
                columns.copy_(part[:, : columns.shape[1]])
        return whole

    def places(self) -> Tensor:
        return torch.arange(self.columns.start, self.columns.stop, device=self.device)


def _flat(leaf: Tensor) -> Tensor:
    # A block of scalars has only the probe axis.
    return leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None]
