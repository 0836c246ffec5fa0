"""Vectors of shards are those of DTensors."""

from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.spaces.dtensors import DTensorSpace
from hessfunc.spaces.of import space_of
from hessfunc.spaces.shards import ShardSpace
from tests.distributed import modules, problems
from tests.distributed.dtensors import CUTS, cut, on_mesh
from tests.distributed.ranks import Ranks


def shards_are_those_of_dtensors(kind: str) -> bool:
    mesh, cuts = on_mesh((2,), kind)
    like = cut(problems.like(), mesh, cuts)
    outside = space_of(like)
    assert isinstance(outside, DTensorSpace)
    space = ShardSpace.of(outside)
    block = hf.random_like(like, 3, kind="normal", seed=1)
    shards = space.block_leaves(block)
    assert not any(hasattr(x, "to_local") for x in shards)
    assert [tuple(x.shape) for x in shards] == [(3, *x.extent) for x in space.layouts]
    # There and back.
    assert modules.error(space.block(shards), cut_whole(block)) == 0
    assert torch.equal(space.ravel_leaves(shards), outside.ravel(block))
    rows = space.ravel_leaves(shards)
    assert torch.equal(space.norms(rows), outside.norms(rows))
    first = {name: leaf[0] for name, leaf in block.items()}
    assert all(map(torch.equal, space.tree_leaves(first), [x[0] for x in shards]))
    return True


def cut_whole(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: modules.whole(leaf) for name, leaf in block.items()}


@pytest.mark.parametrize("kind", CUTS)
def test_shards_are_those_of_dtensors(kind: str, two: Ranks) -> None:
    assert all(two.run(shards_are_those_of_dtensors, kind))
