"""Vector space of DTensors whose products are computed from the shards of each rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hessfunc.spaces.dtensors import DTensorSpace
from hessfunc.trees import Tree


@dataclass(frozen=True, eq=False)
class ShardSpace(DTensorSpace):
    """Vector space whose vectors are DTensors outside, and plain shards inside of a product.

    Shards support vmap and forward mode, which DTensors do not.
    """

    @classmethod
    def of(cls, space: DTensorSpace, /) -> ShardSpace:
        return cls(**{item.name: getattr(space, item.name) for item in fields(DTensorSpace)})

    @property
    def distributed(self) -> bool:
        return False

    def tree_leaves(self, vector: Tree, /) -> list[Tensor]:
        return [_shard(leaf) for leaf in super().tree_leaves(vector)]

    def block_leaves(self, block: Tree, /) -> list[Tensor]:
        return [
            layout.local(leaf)
            for layout, leaf in zip(self.layouts, super().block_leaves(block), strict=True)
        ]

    def block(self, tensors: Iterable[Tensor], /) -> Tree:
        return self.tree(
            layout.tensor(shard, 1) for layout, shard in zip(self.layouts, tensors, strict=True)
        )

    def ravel_leaves(
        self, tensors: Sequence[Tensor], /, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        parts = [
            shard.reshape(len(shard), math.prod(layout.extent))[
                :, layout.run.start : layout.run.stop
            ]
            for shard, layout in zip(tensors, self.layouts, strict=True)
        ]
        return torch.cat(parts, dim=1).to(dtype or self.dtype)


def _shard(leaf: Any) -> Tensor:
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf
