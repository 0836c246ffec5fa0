"""Structures that hold tensors, of any type: open them and rebuild them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def batch_leaves(batch: Any, /) -> list[Any]:
    """Return the leaves of a batch, with objects that hold tensors opened.

    An object that cannot be opened is a leaf; `opened` refuses it.
    """
    return _Opened.of(batch, None, {}).leaves


def opened(
    tree: Any, what: str, /, *, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Return the leaves of any structure that holds tensors, and a function that rebuilds it.

    Beside the containers that are registered with torch, every object that holds tensors is
    opened: mappings, subclasses of dict, list and tuple, data classes and instances of any other
    class, by their ``__dict__`` and ``__slots__``. The function takes other leaves and returns a
    copy of the structure that holds them; it never writes into the original.

    Args:
        tree: Batch, inputs or outputs.
        what: Name of the tree for messages, such as ``"batch"``.
        is_leaf: Predicate of further values that count as leaves.

    Raises:
        TypeError: An object holds tensors and cannot be opened, or (from the function) copied.
    """
    found = _Opened.of(tree, is_leaf, {})
    found.refuse_hidden(what)
    return found.leaves, lambda leaves: found.rebuilt(iter(leaves), {})


def leaf_paths(
    tree: Any, root: str, /, *, is_leaf: Callable[[Any], bool] | None = None
) -> list[str]:
    """Return the expression that reaches each leaf of `opened` from a variable named root."""
    return _Opened.of(tree, is_leaf, {}).paths(root)


def mapped(fn: Callable[[Tensor], Tensor], tree: Any, what: str, /) -> Any:
    """Return a structure with ``fn`` of each of its tensors, objects opened as by `opened`."""
    found, rebuilt = opened(tree, what)
    if not any(isinstance(leaf, Tensor) for leaf in found):
        return tree
    return rebuilt(fn(leaf) if isinstance(leaf, Tensor) else leaf for leaf in found)


def is_array(leaf: Any, /) -> bool:
    """Whether a leaf is a tensor or a NumPy array of numbers, text or dates."""
    return isinstance(leaf, Tensor) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind != "O")


# Values that hold no tensors, or are leaves themselves.
_CLOSED = (
    *(Tensor, np.ndarray, np.generic, str, bytes, bytearray, int, float, complex, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.Generator, torch.Size),
    *(type, ModuleType, CodeType, Enum, PurePath, range, slice),
)


# Objects within objects that are opened.
_DEEPEST = 16


@dataclass(frozen=True)
class _Seen:
    """Another reference to an object that is opened elsewhere in the structure."""

    owner: Any


@dataclass(frozen=True)
class _Hiding:
    """A leaf that holds tensors and cannot be opened."""

    leaf: Any


@dataclass(frozen=True, eq=False)
class _Content:
    """What an object holds: its attributes, and the items of a mapping or elements of a sequence.

    Attributes:
        owner: Object itself.
        kinds: Kind of each place: ``"attribute"``, ``"slot"``, ``"item"`` or ``"element"``.
        places: Name of each attribute, key of each item or number of each element.
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
        """Open an object; None if it holds no tensor, or lies too deep to be data."""
        held = [*_attributes(owner), *_items(owner)]
        if not held or isinstance(owner, FunctionType | partial | Logger):
            return None
        seen[id(owner)] = owner
        kinds, places, values = zip(*held, strict=True)
        inner = _Opened.of(list(values), is_leaf, seen, depth + 1)
        holds = any(isinstance(x, _Content | _Hiding) or is_array(x) for x in inner.slots)
        return cls(owner, kinds, places, inner) if holds else None

    def rebuilt(self, found: Iterator[Any], made: dict[int, Any]) -> Any:
        """Return a copy of the object that holds the next of these leaves."""
        if isinstance(self.owner, tuple | MappingProxyType):
            return self._immutable(self.values.rebuilt(found, made))
        try:
            new = copy.copy(self.owner)
        except (TypeError, NotImplementedError, AttributeError, copy.Error) as error:
            raise self._not_copied(str(error)) from None
        if new is self.owner:
            raise self._not_copied("`copy.copy` returns the object itself")
        made[id(self.owner)] = new
        if getattr(self.owner, "__dict__", None) is self.owner:
            # A dict whose attributes are its items stays one.
            new.__dict__ = new
        values = self.values.rebuilt(found, made)
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
            "hold them in a tuple, a dict or a dataclass"
        )

    def paths(self, root: str) -> list[str]:
        """Return the expression that reaches each leaf from the object, named root."""
        roots = [
            f"{root}.{place}" if kind in ("attribute", "slot") else f"{root}[{place!r}]"
            for kind, place in zip(self.kinds, self.places, strict=True)
        ]
        # The structure is that of the list of values.
        return self.values.below(
            [one[1:].codify(roots[one[0].entry]) for one in self.values.structure.accessors()]
        )


def _attributes(owner: Any) -> list[tuple[str, Any, Any]]:
    """Return the attributes of an instance that hold its state: (kind, name, value)."""
    state = getattr(owner, "__dict__", None)
    found = []
    # A dict whose attributes are its items, by ``self.__dict__ = self``, has no others.
    if isinstance(state, dict) and state is not owner:
        found = [("attribute", name, value) for name, value in state.items()]
    for kind in type(owner).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else tuple(slots):
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(owner, name):
                found.append(("slot", name, getattr(owner, name)))
    return found


def _items(owner: Any) -> list[tuple[str, Any, Any]]:
    """Return the items of a dict or the elements of a list or tuple: (kind, place, value)."""
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
    """A structure of registered containers, with the objects among its leaves opened.

    Attributes:
        structure: Structure of the registered containers.
        slots: Leaves of the structure: each a leaf, `_Content`, `_Seen` or `_Hiding`.
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
        """Open a structure; ``seen`` has the objects that are opened already, by their id."""

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
            found, structure = optree.tree_flatten(tree, is_leaf, namespace=_NAMESPACE)
        return cls(structure, [slot(leaf) for leaf in found])

    @property
    def leaves(self) -> list[Any]:
        """The leaves, with those of each object in its place."""
        found: list[Any] = []
        for slot in self.slots:
            if isinstance(slot, _Content):
                found.extend(slot.values.leaves)
            elif not isinstance(slot, _Seen):
                found.append(slot.leaf if isinstance(slot, _Hiding) else slot)
        return found

    def rebuilt(self, found: Iterator[Any], made: dict[int, Any]) -> Any:
        """Return the structure with the next of these leaves; ``made`` has the copied objects."""

        def value(slot: Any) -> Any:
            if isinstance(slot, _Content):
                return slot.rebuilt(found, made)
            if isinstance(slot, _Seen):
                return made.get(id(slot.owner), slot.owner)
            return next(found)

        return self.structure.unflatten(map(value, self.slots))

    def paths(self, root: str) -> list[str]:
        """Return the expression that reaches each leaf from a variable named root."""
        return self.below([one.codify(root) for one in self.structure.accessors()])

    def below(self, paths: Sequence[str]) -> list[str]:
        """Return the expression that reaches each leaf, given those of the slots."""
        found: list[str] = []
        for path, slot in zip(paths, self.slots, strict=True):
            if isinstance(slot, _Content):
                found.extend(slot.paths(path))
            elif not isinstance(slot, _Seen):
                found.append(path)
        return found

    def refuse_hidden(self, what: str) -> None:
        """Raise for a leaf that holds tensors and cannot be opened."""
        for hiding in self._hiding():
            names = (p for p, x in zip(self.paths(what), self.leaves, strict=True) if x is hiding)
            raise TypeError(
                f"{next(names)} is a {type(hiding).__name__} that holds tensors, which would not "
                "be seen: hold them in a tuple, a dict or a dataclass"
            )

    def _hiding(self) -> Iterator[Any]:
        for slot in self.slots:
            if isinstance(slot, _Content):
                yield from slot.values._hiding()
            elif isinstance(slot, _Hiding):
                yield slot.leaf


def _hides_tensors(leaf: Any, depth: int = 4) -> bool:
    """Whether a value that cannot be opened, such as a closure or a set, holds a tensor."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind == "O" and any(isinstance(x, Tensor) for x in leaf.flat)
    if isinstance(leaf, _CLOSED) or depth == 0:
        return False
    if isinstance(leaf, FunctionType):
        # What a function reads from its module is not its own.
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
