"""Vector space of a tree; conversions between trees and flat vectors; inner products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import optree
import torch
from torch import Tensor

from hessfunc import options
from hessfunc.numerics import wide_dtype
from hessfunc.options import validated
from hessfunc.spaces.leaf_names import advice, names_of
from hessfunc.spaces.space import ProbeKind, Space
from hessfunc.trees import Tree, flatten, whole


def space_of(like: Tree, /) -> Space:
    """Return the space of vectors with the structure of ``like``, divided among ranks for DTensors.

    Raises:
        TypeError: If a leaf is not a tensor of a real floating-point dtype.
        ValueError: If the tree has no leaf, or if leaves lie on several devices or meshes.
    """
    leaves, structure = flatten(like)
    names = names_of(structure)
    if not leaves:
        raise ValueError(
            "the tree has no leaf: check that not all parameters are frozen, or call "
            "`model.requires_grad_(True)`"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}, not a tensor{advice(leaf)}")
        if not leaf.is_floating_point():
            raise TypeError(
                f"leaf {name!r} has dtype {leaf.dtype}; curvature needs real floating-point "
                "leaves: keep the others fixed with `split` and `hold`"
            )
    devices = {leaf.device for leaf in leaves}
    if len(devices) > 1:
        raise ValueError(
            f"leaves lie on several devices, {sorted(map(str, devices))}: move all of them to one, "
            f"for instance with `leaf.to({str(leaves[0].device)!r})`"
        )
    dtypes = tuple(leaf.dtype for leaf in leaves)
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    shapes = tuple(leaf.shape for leaf in leaves)
    space = Space(structure, names, shapes, dtype, dtypes, leaves[0].device)
    if any(hasattr(leaf, "device_mesh") for leaf in leaves):
        # The import of torch.distributed is slow.
        from hessfunc.spaces.dtensors import DTensorSpace

        return DTensorSpace.over(space, leaves)
    return space


@options.validated(tree=options.tree)
def ravel(tree: Tree, /) -> Tensor:
    """Return a tree as a flat vector ``(n,)``, in the order of ``parameters_to_vector``.

    Examples:
        >>> hf.ravel({"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])})
        tensor([1., 2., 3.])
    """
    space = space_of(tree)
    return space.ravel_leaves([leaf[None] for leaf in space.tree_leaves(tree)])[0]


@validated
def unravel(flat: Tensor, like: Tree, /) -> Tree:
    """Return the tree of a flat vector ``(n,)``, or the vector block of rows ``(k, n)``.

    Leaves are views of ``flat``, except for leaves of another dtype, which are converted.

    Examples:
        >>> like = {"w": torch.zeros(1, 2), "b": torch.zeros(1)}
        >>> hf.unravel(torch.tensor([1.0, 2.0, 3.0]), like)
        {'w': tensor([[1., 2.]]), 'b': tensor([3.])}

    Args:
        flat: Flat vector or rows.
        like: Tree with the structure of a vector, such as the parameters.

    Raises:
        ValueError: If the last axis of ``flat`` does not have n entries.
    """
    return space_of(like).unravel(flat)


def inner(a: Tree, b: Tree, /) -> Tensor:
    """Return the inner product of two vectors as a float64 scalar.

        <a, b> = sum_i a_i b_i

    Products and sums are computed in float64 (float32 on MPS devices). The function can be
    differentiated and mapped, by autograd and by the transforms of `torch.func`.

    Examples:
        >>> a = {"w": torch.ones(2, 2), "b": torch.tensor([2.0])}
        >>> hf.inner(a, a)
        tensor(8., dtype=torch.float64)

    Args:
        a: Vector, a tree of floating-point tensors.
        b: Tree with the structure and shapes of ``a``.

    Raises:
        TypeError: If a leaf is not a tensor of a real floating-point dtype.
        ValueError: If the trees differ in their structure, shapes or device.
    """
    (entries, structure), (others, given) = flatten(a), flatten(b)
    # For speed, arguments are validated only if something is wrong.
    leaves = entries + others
    right = all(isinstance(x, Tensor) and x.is_floating_point() for x in leaves)
    if not right or len({x.device for x in leaves}) != 1:
        on = [space_of(options.tree(name, x)).device for name, x in (("a", a), ("b", b))]
        raise ValueError(f"a is on {on[0]}, and b on {on[1]}: move both to one device")
    if given != structure or any(x.shape != y.shape for x, y in zip(entries, others, strict=True)):
        raise ValueError(
            f"a has {_outlined(entries, structure)}, and b has {_outlined(others, given)}: pass "
            "two vectors of the same tree"
        )
    wide = wide_dtype(entries[0].device)
    parts = [whole((x.to(wide) * y.to(wide)).sum()) for x, y in zip(entries, others, strict=True)]
    return reduce(torch.add, parts)


def _outlined(entries: Sequence[Tensor], structure: optree.PyTreeSpec) -> str:
    shapes = ", ".join(
        f"{name} {tuple(leaf.shape)}"
        for name, leaf in zip(names_of(structure)[:4], entries, strict=False)
    )
    return f"{len(entries)} leaves ({shapes}{', ...' if len(entries) > 4 else ''})"


@options.validated(start=options.whole_number)
def random_like(
    like: Tree, k: int, /, *, kind: ProbeKind = "signs", seed: int, start: int = 0
) -> Tree:
    """Return a block of k random vectors whose second moment E[v v'] is the identity.

    Vector i depends only on (seed, start + i). Blocks can therefore be split, repeated or
    distributed over processes without changing a vector. The random stream of torch is not used.

    Examples:
        >>> block = hf.random_like({"w": torch.zeros(2, 3)}, 4, seed=0)
        >>> block["w"].shape, block["w"].abs().unique()
        (torch.Size([4, 2, 3]), tensor([1.]))

    Args:
        like: Tree with the structure of a vector, such as the parameters.
        k: Number of vectors.
        kind: Distribution of the vectors: ``"signs"`` (Rademacher), ``"normal"``, or
            ``"sphere"`` (uniform on the sphere of radius sqrt(n)).
        seed: Seed of the vectors, any integer.
        start: Index of the first vector.

    Returns:
        Tree of leaves ``(k, *shape)``.
    """
    space = space_of(like)
    return space.unravel(space.probes(range(start, start + k), kind=kind, seed=seed))
