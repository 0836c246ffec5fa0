"""Pytrees of tensors: flatten, map and compare them.

A tree is a pytree of floating-point tensors, usually the dict of ``named_parameters()``. The leaves
of a tree are in torch's order, that of ``parameters_to_vector``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import optree
import torch
import torch.utils._pytree
from torch import Tensor

Made = TypeVar("Made")
Tree: TypeAlias = Any
Matvec: TypeAlias = Callable[[Tree], Tree]
# optree namespace of the containers that are registered with torch.
_NAMESPACE = "torch"


@contextmanager
def _torch_order() -> Iterator[None]:
    # optree sorts the keys of a dict; torch and `parameters_to_vector` keep the insertion order.
    with optree.dict_insertion_ordered(True, namespace=_NAMESPACE):
        yield


def flatten(tree: Tree, /) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves of a pytree, in torch's order, and its structure."""
    if torch.compiler.is_compiling():
        # Dynamo does not trace optree.
        return torch.utils._pytree.tree_flatten(tree)  # type: ignore[return-value]
    with _torch_order():
        leaves, structure = optree.tree_flatten(tree, namespace=_NAMESPACE)
    return leaves, structure


def leaves(tree: Tree, /) -> list[Any]:
    """Return the leaves of a pytree, in torch's order."""
    return flatten(tree)[0]


def tree_map(fn: Callable[..., Any], tree: Tree, /, *rest: Tree) -> Tree:
    """Apply ``fn`` to corresponding leaves of trees with the same structure."""
    first, structure = flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(map(fn, first, *others))


def whole(leaf: Tensor, /) -> Tensor:
    """Return a leaf as a plain tensor; a DTensor is gathered."""
    return leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf
