"""Pytrees of tensors: flatten, map and compare them.

A tree is a pytree of floating-point tensors, usually the dict of ``named_parameters()``. The leaves
of a tree are in torch's order, that of ``parameters_to_vector``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import optree
from torch import Tensor

Made = TypeVar("Made")
Tree: TypeAlias = Any
Matvec: TypeAlias = Callable[[Tree], Tree]
# The namespace in which optree sees the containers that are registered with torch.
_NAMESPACE = "torch"


@contextmanager
def _torch_order() -> Iterator[None]:
    # optree sorts the keys of a dict; torch, and so `parameters_to_vector`, keeps their order.
    with optree.dict_insertion_ordered(True, namespace=_NAMESPACE):
        yield


def flatten(tree: Tree, /) -> tuple[list[Any], optree.PyTreeSpec]:
    """The leaves of a pytree, in torch's order, and its structure."""
    with _torch_order():
        found, structure = optree.tree_flatten(tree, namespace=_NAMESPACE)
    return found, structure


def leaves(tree: Tree, /) -> list[Any]:
    """The leaves of a pytree, in torch's order."""
    return flatten(tree)[0]


def tree_map(fn: Callable[..., Any], tree: Tree, /, *rest: Tree) -> Tree:
    """``fn`` on corresponding leaves of trees of one structure."""
    first, structure = flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(map(fn, first, *others))


def whole(leaf: Tensor, /) -> Tensor:
    """A leaf, gathered where it is a DTensor."""
    return leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf


def unchanged(names: Sequence[str], found: Sequence[Tensor], /) -> Callable[[], None]:
    """A check that raises once one of these leaves has been changed in place."""
    # Inference tensors have no version.
    tracked = [
        (n, x, x._version) for n, x in zip(names, found, strict=True) if not x.is_inference()
    ]

    def refuse_if_changed() -> None:
        for name, leaf, version in tracked:
            if leaf._version != version:
                raise RuntimeError(
                    f"parameter {name!r} has changed in place since this matvec was made (an "
                    "optimiser step?), so its products would belong to neither the old nor the "
                    "new parameters: make the matvec again"
                )

    return refuse_if_changed
