"""Flatten and rebuild structures of any type that hold tensors."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from logging import Logger
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import numpy as np
import optree
import torch.utils._cxx_pytree
from torch import Tensor

from hessfunc.trees import _NAMESPACE, _torch_order, leaves


def number_of(batches: Any, /) -> int | None:
    """Return the number of batches, or None if it is unknown.

    The loader of an iterable data set has a ``len`` that raises TypeError.
    """
    try:
        return len(batches)
    except TypeError:
        return None


def batch_leaves(batch: Any, /) -> list[Any]:
    """Return the leaves of a batch, including those inside objects that hold tensors.

    An object that cannot be opened counts as one leaf, whereas `opened` raises for it.
    """
    return _Opened.of(batch, None, {}).leaves


def tensors_in(value: Any, /) -> Iterator[Tensor]:
    """Yield the tensors in nested containers of Python."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from tensors_in(part)


def opened(
    tree: Any, what: str, /, *, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Return the leaves of any structure that holds tensors, and a function that rebuilds it.

    The containers that are registered with torch are opened, and so is every other object that
    holds tensors: mappings, subclasses of dict, list and tuple, data classes, and instances of any
    other class by their ``__dict__`` and ``__slots__``. The returned function takes new leaves and
    returns a copy of the structure that holds them. It never writes into the original.

    Args:
        tree: Batch, inputs or outputs.
        what: Name of the tree for messages, such as ``"batch"``.
        is_leaf: Predicate for further values that count as leaves.

    Raises:
        TypeError: If an object holds tensors and cannot be opened or, raised by the returned
            function, cannot be copied.
    """
    opened_tree = _Opened.of(tree, is_leaf, {})
    opened_tree.refuse_hidden(what)
    return opened_tree.leaves, lambda leaves: opened_tree.rebuilt(iter(leaves), {})


def leaf_paths(
    tree: Any, root: str, /, *, is_leaf: Callable[[Any], bool] | None = None
) -> list[str]:
    """Return the expressions that reach the leaves of `opened` from a variable named ``root``."""
    return _Opened.of(tree, is_leaf, {}).paths(root)


def mapped(fn: Callable[[Tensor], Tensor], tree: Any, what: str, /) -> Any:
    """Apply ``fn`` to each tensor of a structure, with objects opened as by `opened`."""
    leaves, rebuilt = opened(tree, what)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return tree
    return rebuilt(fn(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def is_array(leaf: Any, /) -> bool:
    """Return whether a leaf is a tensor or a NumPy array of numbers, text or dates."""
    return isinstance(leaf, Tensor) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind != "O")


# Types that are never opened: their values hold no tensors or are leaves themselves.
_CLOSED = (
    *(Tensor, np.ndarray, np.generic, str, bytes, bytearray, int, float, complex, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.Generator, torch.Size),
    *(type, ModuleType, CodeType, Enum, PurePath, range, slice),
)


# Largest nesting depth of objects that are opened.
_DEEPEST = 16


@dataclass(frozen=True)
class _Seen:
    """Further reference to an object that is opened elsewhere in the structure."""

    owner: Any


@dataclass(frozen=True)
class _Hiding:
    """Leaf that holds tensors and cannot be opened."""

    leaf: Any


@dataclass(frozen=True, eq=False)
class _Content:
    """Content of an object: its attributes, mapping items and sequence elements.

    Attributes:
        owner: Object itself.
        kinds: Kind of each place: ``"attribute"``, ``"slot"``, ``"item"`` or ``"element"``.
        places: Name of each attribute, key of each item or index of each element.
        values: Value at each place, opened.
    """

    owner: Any
    kinds: tuple[str, ...]
    places: tuple[Any, ...]
    values: _Opened

    @classmethod
    def of(
        cls, owner: Any, is_leaf: Callable[[Any], bool] | None, seen: dict[int, Any], depth: int
    ) -> _Content | None:
        """Open an object; return None if it holds no tensor or is a function or a logger."""
        held = [*_attributes(owner), *_items(owner)]
        if not held or isinstance(owner, FunctionType | partial | Logger):
            return None
        seen[id(owner)] = owner
        kinds, places, values = zip(*held, strict=True)
        inner = _Opened.of(list(values), is_leaf, seen, depth + 1)
        holds = any(isinstance(x, _Content | _Hiding) or is_array(x) for x in inner.slots)
        return cls(owner, kinds, places, inner) if holds else None

    def rebuilt(self, new_leaves: Iterator[Any], made: dict[int, Any]) -> Any:
        """Return a copy of the object that holds the next leaves of ``new_leaves``."""
        if isinstance(self.owner, tuple | MappingProxyType):
            return self._immutable(self.values.rebuilt(new_leaves, made))
        try:
            new = copy.copy(self.owner)
        except (TypeError, NotImplementedError, AttributeError, copy.Error) as error:
            raise self._not_copied(str(error)) from None
        if new is self.owner:
            raise self._not_copied("`copy.copy` returns the object itself")
        made[id(self.owner)] = new
        if getattr(self.owner, "__dict__", None) is self.owner:
            # Some dicts are their own ``__dict__``: the copy must be too.
            new.__dict__ = new
        values = self.values.rebuilt(new_leaves, made)
        for kind, place, value in zip(self.kinds, self.places, values, strict=True):
            match kind:
                case "attribute":
                    new.__dict__[place] = value
                case "slot":
                    object.__setattr__(new, place, value)
                case "item":
                    dict.__setitem__(new, place, value)
                case _:
                    list.__setitem__(new, place, value)
        return new

    def _immutable(self, values: Sequence[Any]) -> Any:
        if isinstance(self.owner, MappingProxyType):
            return MappingProxyType(dict(zip(self.places, values, strict=True)))
        elements = [v for v, kind in zip(values, self.kinds, strict=True) if kind == "element"]
        new = tuple.__new__(type(self.owner), elements)
        for kind, place, value in zip(self.kinds, self.places, values, strict=True):
            if kind == "attribute":
                new.__dict__[place] = value
        return new

    def _not_copied(self, reason: str) -> TypeError:
        return TypeError(
            f"a {type(self.owner).__name__} holds tensors and cannot be copied ({reason}): "
            "put the tensors in a tuple, a dict or a dataclass"
        )

    def paths(self, root: str) -> list[str]:
        """Return the expressions that reach the leaves from an object named ``root``."""
        roots = [
            f"{root}.{place}" if kind in ("attribute", "slot") else f"{root}[{place!r}]"
            for kind, place in zip(self.kinds, self.places, strict=True)
        ]
        # The structure is a list of the values, so an accessor begins with the index of a place.
        return self.values.below(
            [path[1:].codify(roots[path[0].entry]) for path in self.values.structure.accessors()]
        )


def _attributes(owner: Any) -> list[tuple[str, Any, Any]]:
    """Return the attributes that hold the state of an instance as ``(kind, name, value)``."""
    state = getattr(owner, "__dict__", None)
    attributes = []
    # A dict with ``self.__dict__ = self`` has no attributes besides its items.
    if isinstance(state, dict) and state is not owner:
        attributes = [("attribute", name, value) for name, value in state.items()]
    for kind in type(owner).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else tuple(slots):
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(owner, name):
                attributes.append(("slot", name, getattr(owner, name)))
    return attributes


def _items(owner: Any) -> list[tuple[str, Any, Any]]:
    """Return dict items, or list or tuple elements, as ``(kind, place, value)``."""
    if isinstance(owner, dict):
        return [("item", key, value) for key, value in dict.items(owner)]
    if isinstance(owner, MappingProxyType):
        return [("item", key, value) for key, value in owner.items()]
    if isinstance(owner, list):
        return [("element", i, value) for i, value in enumerate(list.__iter__(owner))]
    if isinstance(owner, tuple):
        return [("element", i, value) for i, value in enumerate(tuple.__iter__(owner))]
    return []


@dataclass(frozen=True, eq=False)
class _Opened:
    """Structure of registered containers whose leaves may be opened objects.

    Attributes:
        structure: Structure of the registered containers.
        slots: Values at the leaves of the structure: plain leaves, `_Content`, `_Seen` or
            `_Hiding`.
    """

    structure: optree.PyTreeSpec
    slots: list[Any]

    @classmethod
    def of(
        cls,
        tree: Any,
        is_leaf: Callable[[Any], bool] | None,
        seen: dict[int, Any],
        depth: int = 0,
    ) -> _Opened:
        """Open a structure; ``seen`` maps ids to objects that have already been opened."""

        def slot(leaf: Any) -> Any:
            is_object = isinstance(leaf, np.ndarray) and leaf.dtype.kind == "O"
            if isinstance(leaf, _CLOSED) and not is_object:
                return leaf
            if is_leaf is not None and is_leaf(leaf):
                return leaf
            if id(leaf) in seen:
                return _Seen(leaf)
            content = _Content.of(leaf, is_leaf, seen, depth) if depth < _DEEPEST else None
            if content is None:
                return _Hiding(leaf) if _hides_tensors(leaf) else leaf
            return content

        with _torch_order():
            leaves, structure = optree.tree_flatten(tree, is_leaf, namespace=_NAMESPACE)
        return cls(structure, [slot(leaf) for leaf in leaves])

    @property
    def leaves(self) -> list[Any]:
        """Leaves of the structure, including the leaves of opened objects."""
        leaves: list[Any] = []
        for slot in self.slots:
            if isinstance(slot, _Content):
                leaves.extend(slot.values.leaves)
            elif not isinstance(slot, _Seen):
                leaves.append(slot.leaf if isinstance(slot, _Hiding) else slot)
        return leaves

    def rebuilt(self, new_leaves: Iterator[Any], made: dict[int, Any]) -> Any:
        """Return the structure with the next leaves of ``new_leaves``.

        ``made`` maps ids of the original objects to their copies.
        """

        def value(slot: Any) -> Any:
            if isinstance(slot, _Content):
                return slot.rebuilt(new_leaves, made)
            if isinstance(slot, _Seen):
                return made.get(id(slot.owner), slot.owner)
            return next(new_leaves)

        return self.structure.unflatten(map(value, self.slots))

    def paths(self, root: str) -> list[str]:
        """Return the expressions that reach the leaves from a variable named ``root``."""
        return self.below([path.codify(root) for path in self.structure.accessors()])

    def below(self, paths: Sequence[str]) -> list[str]:
        """Return the expressions that reach the leaves, given the expressions of the slots."""
        expressions: list[str] = []
        for path, slot in zip(paths, self.slots, strict=True):
            if isinstance(slot, _Content):
                expressions.extend(slot.paths(path))
            elif not isinstance(slot, _Seen):
                expressions.append(path)
        return expressions

    def refuse_hidden(self, what: str) -> None:
        """Raise TypeError if a leaf holds tensors and cannot be opened."""
        for hiding in self._hiding():
            names = (p for p, x in zip(self.paths(what), self.leaves, strict=True) if x is hiding)
            raise TypeError(
                f"{next(names)} is a {type(hiding).__name__} that holds tensors, but "
                "cannot be opened: put them in a tuple, a dict or a dataclass"
            )

    def _hiding(self) -> Iterator[Any]:
        for slot in self.slots:
            if isinstance(slot, _Content):
                yield from slot.values._hiding()
            elif isinstance(slot, _Hiding):
                yield slot.leaf


def _hides_tensors(leaf: Any, depth: int = 4) -> bool:
    """Return whether a value that cannot be opened, such as a closure or a set, holds a tensor."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind == "O" and any(isinstance(x, Tensor) for x in leaf.flat)
    if isinstance(leaf, _CLOSED) or depth == 0:
        return False
    if isinstance(leaf, FunctionType):
        # Globals belong to the module of a function, so only cells and defaults count.
        cells = [cell.cell_contents for cell in leaf.__closure__ or () if _is_filled(cell)]
        held = [*cells, *(leaf.__defaults__ or ()), *(leaf.__kwdefaults__ or {}).values()]
    else:
        held = gc.get_referents(leaf)
    return any(isinstance(x, Tensor) or _hides_tensors(x, depth - 1) for x in leaves(held))


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
