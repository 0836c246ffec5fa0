"""Trees of DTensors, placed in every way."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hessfunc.algorithms.results import Result
from hessfunc.trees import tree_map
from tests.distributed import modules, problems

# Of the leaves a (2, 3), b (1,), c (20, 1) and d (2, 5); None is a plain tensor.
CUTS: dict[str, list[list[Placement] | None]] = {
    "first axes": [[Shard(0)]] * 4,
    "last axes": [[Shard(1)], [Shard(0)], [Shard(1)], [Shard(1)]],
    "copies": [[Replicate()]] * 4,
    "some of each": [[Shard(1)], None, [Shard(0)], [Replicate()]],
}
CUTS_IN_TWO: dict[str, list[list[Placement] | None]] = {
    "both": [[Shard(0), Shard(1)], [Shard(0), Replicate()], [Shard(0), Shard(0)], None],
    "one": [[Replicate(), Shard(1)], None, [Replicate(), Shard(0)], [Shard(1), Replicate()]],
}


def cut(
    tree: dict[str, Tensor], mesh: DeviceMesh, cuts: list[list[Placement] | None], axes: int = 0
) -> dict[str, Tensor]:
    """The tree, or block where there is a leading axis, on a mesh."""
    found = {}
    for (name, leaf), placements in zip(tree.items(), cuts, strict=True):
        found[name] = leaf
        if placements is not None:
            shifted = [Shard(p.dim + axes) if isinstance(p, Shard) else p for p in placements]
            # Copied before it is cut: the whole leaf is the same on every rank.
            on_mesh = DTensor.from_local(leaf, mesh, [Replicate()] * mesh.ndim)
            found[name] = on_mesh.redistribute(placements=shifted)
    return found


def on_mesh(shape: tuple[int, ...], kind: str) -> tuple[DeviceMesh, list[list[Placement] | None]]:
    return problems.mesh(*shape, names=("x", "y")), (CUTS | CUTS_IN_TWO)[kind]


def as_matvec(matrix: Tensor, mesh: DeviceMesh, cuts: Any) -> Any:
    plain = problems.as_matvec(matrix)

    def matvec(block: Any) -> Any:
        assert [type(x) is DTensor for x in block.values()] == [c is not None for c in cuts]
        return cut(plain(tree_map(modules.whole, block)), mesh, cuts, axes=1)

    return matvec


def gathered(found: Any) -> Any:
    """A result with whole tensors."""
    if not isinstance(found, Result):
        return tree_map(modules.whole, found)
    names = [item.name for item in dataclasses.fields(found) if item.init]
    return dataclasses.replace(found, **{name: gathered(getattr(found, name)) for name in names})
