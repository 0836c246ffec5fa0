"""The space of a tree, and conversions between trees and flat vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.options import validated
from hessfunc.spaces.space import ProbeKind, Space, _advice, _names
from hessfunc.trees import Tree, flatten


def space_of(like: Tree, /) -> Space:
    """Return the space of vectors that look like ``like``, divided among ranks for DTensors.

    Raises:
        TypeError: a leaf is not a tensor, or not of a real floating-point dtype.
        ValueError: there is no leaf, or leaves lie on several devices or meshes.
    """
    found, structure = flatten(like)
    names = _names(structure)
    if not found:
        raise ValueError("the tree has no leaf: are all parameters frozen?")
    for name, leaf in zip(names, found, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"leaf {name!r} is a {type(leaf).__name__}, not a tensor{_advice(leaf)}"
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"leaf {name!r} has dtype {leaf.dtype}; curvature needs real floating-point "
                "leaves: keep the others fixed with `split` and `hold`"
            )
    devices = {leaf.device for leaf in found}
    if len(devices) > 1:
        raise ValueError(
            f"leaves lie on several devices, {sorted(map(str, devices))}: move them to one"
        )
    dtypes = tuple(leaf.dtype for leaf in found)
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    shapes = tuple(leaf.shape for leaf in found)
    space = Space(structure, names, shapes, dtype, dtypes, found[0].device)
    if any(hasattr(leaf, "device_mesh") for leaf in found):
        # torch.distributed takes a while to import.
        from hessfunc.spaces.dtensors import DTensorSpace

        return DTensorSpace.over(space, found)
    return space


@options.validated(tree=options.tree)
def ravel(tree: Tree, /) -> Tensor:
    """One flat vector ``(n,)`` of a tree, in the order of ``parameters_to_vector``."""
    space = space_of(tree)
    return space.ravel_leaves([leaf[None] for leaf in space.tree_leaves(tree)])[0]


@validated
def unravel(flat: Tensor, like: Tree, /) -> Tree:
    """The tree of a flat vector ``(n,)``, or the block of rows ``(k, n)``: views, no copy.

    Args:
        flat: the vector or the rows.
        like: a tree that says what vectors look like.

    Raises:
        ValueError: the last axis of ``flat`` does not have n entries.
    """
    return space_of(like).unravel(flat)


@options.validated(start=options.whole_number)
def random_like(
    like: Tree, k: int, /, *, kind: ProbeKind = "signs", seed: int, start: int = 0
) -> Tree:
    """A block of k random vectors of second moment I.

    Vector i is a function of (seed, start + i) alone: blocks may be cut, repeated or spread over
    processes without changing a single vector, and torch's random stream is not touched.

    Args:
        like: a tree that says what vectors look like.
        k: the number of vectors.
        kind: ``"signs"`` (Rademacher), ``"normal"``, or ``"sphere"`` of radius sqrt(n).
        seed: any integer.
        start: the index of the first vector.
    """
    space = space_of(like)
    return space.unravel(space.probes(range(start, start + k), kind=kind, seed=seed))
