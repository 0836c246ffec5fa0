"""The vector space of a pytree of tensors: trees, blocks, flat rows and probes.

A *tree* is a pytree of floating-point tensors. A *block* is a tree whose leaves have one more,
leading, axis: the probe axis. Algorithms work on flat rows ``(k, n)``; a block of rows is seen as
a tree without a copy, and its leaves are written back to one row with one copy.
"""

from __future__ import annotations

import copy
import fnmatch
import gc
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import pairwise
from logging import Logger
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import optree
import torch
import torch.utils._cxx_pytree  # Registers torch's containers, and those to come, with optree.
from torch import Tensor, nn

from hessfunc import options
from hessfunc.options import validated
from hessfunc.precision import wide_dtype
from hessfunc.randomness import keys, normals, signs

if TYPE_CHECKING:
    from hessfunc.distributed.ranks import Ranks

__all__ = [
    "Matvec",
    "ProbeKind",
    "Rows",
    "Space",
    "Tree",
    "batch_leaves",
    "first_of",
    "flatten",
    "is_array",
    "leaf_paths",
    "leaves",
    "mapped",
    "merge",
    "opened",
    "random_like",
    "ravel",
    "split",
    "tree_map",
    "unchanged",
    "unravel",
    "whole",
]

Made = TypeVar("Made")
Tree: TypeAlias = Any
# A tensor whose last axis runs over the entries of a vector, or over those that are held here.
Rows: TypeAlias = Tensor
Matvec: TypeAlias = Callable[[Tree], Tree]
# (keys, places, device) -> random numbers.
Draw: TypeAlias = Callable[[Tensor, Sequence[range], torch.device], Tensor]
ProbeKind: TypeAlias = Literal["signs", "normal", "sphere"]

# Inner products of two blocks that are taken in float64 throughout.
_FEW_PRODUCTS = 4
# Entries that are converted to float64 at once: they stay in the cache.
_PIECE = 2**16
# Random entries that are drawn at once, which take about 2 and 24 bytes each.
_PIECE_OF_SIGNS = 2**18
_PIECE_OF_NORMALS = 2**15
# The same for other devices, where starting the kernels of a piece would take longer than they do.
_PIECE_OF_DEVICE = 2**22
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


def tree_map(fn: Callable[..., Any], tree: Tree, /, *rest: Tree) -> Tree:
    """``fn`` on corresponding leaves of trees of one structure."""
    first, structure = flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(map(fn, first, *others))


def whole(leaf: Tensor, /) -> Tensor:
    """A leaf, gathered where it is a DTensor."""
    return leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf


def _names(structure: optree.PyTreeSpec) -> tuple[str, ...]:
    paths = structure.paths()
    dotted = [".".join(map(_label, path)) or "params" for path in paths]
    if len(set(dotted)) == len(dotted):
        return tuple(dotted)
    # The keys 1 and "1", or "a.b" and "a" before "b", look alike with dots.
    several = {name for name in dotted if dotted.count(name) > 1}
    return tuple(
        "".join(f"[{key!r}]" for key in path) if name in several else name
        for name, path in zip(dotted, paths, strict=True)
    )


def _label(key: Any) -> str:
    return f"{key[0]}[{key[1]}]" if isinstance(key, tuple) and len(key) == 2 else str(key)


def _advice(leaf: object) -> str:
    """The tensor that should stand in the place of another object, as the end of a message."""
    if isinstance(leaf, np.ndarray):
        return ": pass torch.from_numpy(array), or `from_scipy(operator)` for a NumPy function"
    if isinstance(leaf, nn.Module):
        return ": pass its parameters, `model_fn, params = functional(model)`"
    return ""


def _described(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{len(names)} leaves ({shown}{', ...' if len(names) > 4 else ''})"


@dataclass(frozen=True, eq=False)
class Space:
    """The vector space of a tree of tensors.

    Attributes:
        structure: how the leaves are nested.
        names: the dotted path of each leaf.
        shapes: the shape of each leaf.
        dtype: of a flat row; the leaves' own, promoted where they differ.
        dtypes: of each leaf.
        device: the one device on which all leaves lie.
    """

    structure: optree.PyTreeSpec
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(cls, like: Tree, /) -> Space:
        """The space of vectors that look like ``like``; where they are DTensors, so are these.

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
        space = cls(structure, names, shapes, dtype, dtypes, found[0].device)
        if any(hasattr(leaf, "device_mesh") for leaf in found):
            # torch.distributed takes a while to import.
            from hessfunc.distributed.dtensors import DTensorSpace

            return DTensorSpace.over(space, found)
        return space

    @property
    def distributed(self) -> bool:
        """Whether leaves are DTensors, which neither vmap nor forward mode can take."""
        return False

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each leaf."""
        return [shape.numel() for shape in self.shapes]

    @property
    def n(self) -> int:
        """The dimension."""
        return sum(self.sizes)

    @property
    def ranks(self) -> Ranks | None:
        """The processes that each hold a part of every row; None of rows that are whole."""
        return None

    @property
    def columns(self) -> range:
        """The numbers of the entries of a row that are held here, which no other rank has."""
        return range(self.n)

    @property
    def cut(self) -> str | None:
        """How leaves are cut over ranks, where the numbers of entries depend on it."""
        return None

    @property
    def spans(self) -> list[range]:
        """The entries of each flat leaf that a row holds here: all of them, on one rank."""
        return [range(size) for size in self.sizes]

    @property
    def width(self) -> int:
        """The number of entries that a row holds here."""
        return sum(map(len, self.spans))

    @property
    def widest(self) -> int:
        """The most entries that a row holds on any rank, so the same number on all."""
        return self.width

    def zeros(self, count: int, dtype: torch.dtype, /) -> Tensor:
        """Rows of zeros."""
        return torch.zeros(count, self.width, dtype=dtype, device=self.device)

    def units(self, dtype: torch.dtype, /) -> Tensor:
        """All n unit vectors, as rows."""
        return torch.eye(self.n, dtype=dtype, device=self.device)

    def summed(self, numbers: Tensor, /) -> Tensor:
        """The sum over the parts of a row, from what was computed of each."""
        return numbers

    def least(self, number: int, /) -> int:
        """The least of a number, which every rank has its own of."""
        return number

    def on_all(self, act: Callable[[], Made], /) -> Made:
        """What ``act`` returns, called on every rank; its error on one is an error on all."""
        return act()

    def vectors(self, rows: Tensor, /) -> Tree:
        """The block of these rows, as a result holds it."""
        return self.unravel(rows)

    def rows(self, vectors: Tree, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The rows of a block, as a result holds it, or the row of one vector."""
        first = leaves(vectors)
        if first and isinstance(first[0], Tensor) and first[0].dim() == len(self.shapes[0]):
            return self.ravel_leaves([x[None] for x in self.tree_leaves(vectors)], dtype=dtype)
        return self.ravel(vectors, dtype=dtype)

    def factored(self, rows: Tensor, /) -> tuple[Tensor, Tensor]:
        """Orthonormal rows Q and a small R with ``rows = R' Q``."""
        basis, triangle = torch.linalg.qr(rows.mT)
        return basis.mT, triangle

    def fingerprint(self) -> dict[str, float]:
        """Numbers that are the same where the leaves have the same names, shapes and dtypes."""
        described = repr((self.names, self.shapes, self.dtypes)).encode()
        return {
            "the number of leaves": len(self.names),
            "the number of entries": self.n,
            "the names, shapes and dtypes of leaves": zlib.crc32(described) >> 4,
        }

    def tree(self, found: Iterable[Tensor], /) -> Tree:
        """The tree, or block, of these leaves."""
        return self.structure.unflatten(found)

    def tree_leaves(self, vector: Tree, /) -> list[Tensor]:
        """The leaves of one vector of this space, checked."""
        return self._checked(vector, batch_dims=0)

    def block_leaves(self, block: Tree, /) -> list[Tensor]:
        """The leaves of a block of vectors of this space, checked."""
        return self._checked(block, batch_dims=1)

    def _checked(self, tree: Tree, *, batch_dims: int) -> list[Tensor]:
        found = self._leaves_of_structure(tree)
        length = found[0].shape[:batch_dims]
        for name, shape, leaf in zip(self.names, self.shapes, found, strict=True):
            fits = leaf.shape == length + shape and leaf.device == self.device
            if not (fits and leaf.is_floating_point()):
                self._refuse(name, shape, leaf, length, batch_dims)
        return found

    def _refuse(
        self, name: str, shape: torch.Size, leaf: Tensor, length: torch.Size, batch_dims: int
    ) -> None:
        what = "block" if batch_dims else "vector"
        if not leaf.is_floating_point():
            raise TypeError(
                f"leaf {name!r} of the {what} has dtype {leaf.dtype}, and vectors are real and "
                f"floating-point: {'take its real part' if leaf.is_complex() else 'call .float()'}"
            )
        if leaf.device != self.device:
            raise ValueError(
                f"leaf {name!r} of the {what} lies on {leaf.device}, expected {self.device}"
            )
        if batch_dims and leaf.shape == shape:
            raise ValueError(
                f"leaf {name!r} has the shape of one vector, {tuple(shape)}, but a matvec takes a "
                "block, with a leading probe axis: use `apply(matvec, vector)`"
            )
        if leaf.shape[batch_dims:] == shape and leaf.dim() == len(shape) + batch_dims:
            raise ValueError(
                "the leaves of the block differ in their probe axis: "
                f"{self.names[0]} {length[0]}, {name} {len(leaf)}"
            )
        expected = ("k, " if batch_dims else "") + ", ".join(map(str, shape))
        raise ValueError(
            f"leaf {name!r} of the {what} has shape {tuple(leaf.shape)}, expected ({expected})"
        )

    def _leaves_of_structure(self, tree: Tree) -> list[Tensor]:
        try:
            found: list[Any] = self.structure.flatten_up_to(tree)
        except ValueError:
            given = _names(flatten(tree)[1])
            raise ValueError(
                "the vector does not have the structure of the parameters, "
                f"{_described(self.names)}: it has {_described(given)}"
            ) from None
        for name, leaf in zip(self.names, found, strict=True):
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    f"the vector does not have the structure of the parameters: at {name!r} it "
                    f"has a {type(leaf).__name__} where a tensor is due{_advice(leaf)}"
                )
        return found

    def stacked(self, vectors: Sequence[Sequence[Tensor]], /) -> list[Tensor]:
        """The leaves of a block, from those of its vectors."""
        return [torch.stack(found) for found in zip(*vectors, strict=True)]

    def ravel(self, block: Tree, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The rows ``(k, n)`` of a block: one copy."""
        return self.ravel_leaves(self.block_leaves(block), dtype=dtype)

    def ravel_leaves(
        self, found: Sequence[Tensor], /, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The rows ``(k, n)`` of a block's leaves: one copy."""
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in found):
            # Autograd has no copy into a view of one tensor among several.
            return torch.cat([leaf.flatten(1) for leaf in map(_with_axis, found)], dim=1).to(
                dtype or self.dtype
            )
        rows = torch.empty(len(found[0]), self.n, dtype=dtype or self.dtype, device=self.device)
        for target, leaf in zip(self._views(rows), found, strict=True):
            target.copy_(leaf)
        return rows

    def unravel(self, rows: Tensor, /) -> Tree:
        """The tree of a flat vector ``(n,)``, or the block of rows ``(k, n)``.

        Leaves are views of ``rows``, but for those of another dtype, which are converted.
        """
        if rows.dim() not in (1, 2) or rows.shape[-1] != self.n:
            raise ValueError(
                f"a flat vector of shape {tuple(rows.shape)} where ({self.n},) or (k, {self.n}) "
                "is due"
            )
        views = self._views(rows)
        return self.tree(v.to(dtype) for v, dtype in zip(views, self.dtypes, strict=True))

    def views(self, rows: Tensor, /) -> Tree:
        """The block of whole rows ``(k, n)``: views, in the dtype of the rows."""
        return self.tree(self._views(rows))

    def accumulate(self, rows: Tensor, block: Tree, /, *, weight: float) -> None:
        """Add a block, times a weight, to whole rows."""
        with torch.no_grad():
            for target, leaf in zip(self._views(rows), leaves(block), strict=True):
                target.add_(leaf, alpha=weight)

    def _views(self, rows: Tensor) -> list[Tensor]:
        parts = rows.split(self.sizes, dim=-1)
        return [
            part.view((*rows.shape[:-1], *shape))
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def leaf_of_columns(self, columns: Tensor, /) -> list[str]:
        """The names of the leaves in which these columns of a row lie, on whatever rank."""
        ends = torch.tensor([len(span) for span in self.spans], device="cpu").cumsum(0)
        found = torch.bucketize(columns.cpu(), ends, right=True)
        counts = torch.bincount(found, minlength=len(self.names)).to(self.device)
        return [name for name, count in zip(self.names, self.summed(counts), strict=True) if count]

    def gram(self, rows: Tensor, others: Tensor, /, *, run: int = 1024) -> Tensor:
        """The inner products ``rows @ others.T`` in float64, shape ``(j, k)``.

        A few float32 products are taken in float64. Of many, runs of entries are multiplied in
        float32 and summed in float64: off by less than 1e-7 |x| |y| as well, at any length, but
        for entries that are all alike, whose roundings add up (1e-6). Runs of 2^14 are twice as
        fast and off by up to 20 times as much.
        """
        return self.summed(self.gram_here(rows, others, run=run))

    def gram_here(self, rows: Tensor, others: Tensor, /, *, run: int) -> Tensor:
        """The part of `gram` of the entries that are held here."""
        wide = wide_dtype(rows.device)
        if rows.dtype == wide:
            return rows @ others.to(wide).mT
        if len(rows) > len(others):
            # The kernels are twice as fast with the few on the left.
            return self.gram_here(others, rows, run=run).mT
        if len(rows) * len(others) <= _FEW_PRODUCTS:
            return self._wide_gram(rows, others)
        whole = rows.shape[1] // run * run
        left = rows[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
        right = others[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
        total = torch.bmm(left, right.mT).sum(0, dtype=wide)
        return total + rows[:, whole:] @ others[:, whole:].mT

    def _wide_gram(self, rows: Tensor, others: Tensor) -> Tensor:
        # In pieces, as a whole copy in float64 would take longer to allocate than to fill.
        wide = wide_dtype(rows.device)
        total = torch.zeros(len(rows), len(others), dtype=wide, device=rows.device)
        piece = _PIECE if rows.device.type == "cpu" else _PIECE_OF_DEVICE
        for left, right in zip(rows.split(piece, 1), others.split(piece, 1), strict=True):
            total += left.to(wide) @ right.to(wide).mT
        return total

    def norms(self, rows: Tensor, /) -> Tensor:
        """The 2-norm of each row, in float64, shape ``(k,)``."""
        return self._norms(rows)

    def _norms(self, rows: Tensor) -> Tensor:
        # In pieces, as torch makes a copy in float64.
        wide = wide_dtype(rows.device)
        piece = _PIECE if rows.device.type == "cpu" else _PIECE_OF_DEVICE
        if rows.dtype == wide or rows.shape[1] <= piece:
            lengths = [torch.linalg.vector_norm(row, dim=1, dtype=wide) for row in rows.split(1)]
            return torch.cat(lengths)
        parts = [
            torch.linalg.vector_norm(part.to(wide), dim=1) for part in rows.split(piece, dim=1)
        ]
        return torch.linalg.vector_norm(torch.stack(parts), dim=0)

    def combine(self, coefficients: Tensor, rows: Tensor, /) -> Tensor:
        """The combinations ``coefficients @ rows`` in the rows' dtype, shape ``(j, n)``."""
        return coefficients.to(rows.device, rows.dtype) @ rows

    def by_leaf(self, rows: Tensor, others: Tensor, /) -> Tensor:
        """The inner product of each row with its other, leaf by leaf: float64 ``(k, leaves)``."""
        wide = wide_dtype(rows.device)
        products = (rows * others).split([len(span) for span in self.spans], dim=1)
        return self.summed(torch.stack([part.sum(1, dtype=wide) for part in products], dim=1))

    def draw(
        self, rows: Tensor, of: Draw, keys: Callable[[range], Tensor], scratch: int, /
    ) -> None:
        """Fill rows with random numbers, one call of ``of`` for many small leaves.

        Args:
            rows: Rows to fill.
            of: Function of keys and places, as `signs`.
            keys: Function of a range of leaves: their keys for each row, ``(k, leaves)``.
            scratch: Entries that are drawn at once: they stay in the cache.
        """
        begin = 0
        for leaves_, places in _grouped(self.spans, max(1, scratch // len(rows))):
            end = begin + sum(map(len, places))
            of_rows = [slice(0, len(rows))]
            if (end - begin) * len(rows) > scratch:
                of_rows = [slice(i, i + 1) for i in range(len(rows))]
            found = keys(leaves_)
            for some in of_rows:
                rows[some, begin:end] = of(found[some], places, self.device)
            begin = end

    def probes(
        self,
        indices: Sequence[int],
        /,
        *,
        kind: ProbeKind,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Random rows ``(k, n)``, of second moment I: row i depends on (seed, indices[i]) alone.

        Each entry is a function of (seed, probe index, leaf, position), the same on every device
        up to rounding; no random stream of torch is read or moved.

        Args:
            kind: ``"signs"``: +1 or -1; ``"normal"``: standard normal; ``"sphere"``: uniform on
                the sphere of radius sqrt(n).
        """
        if kind not in get_args(ProbeKind):
            raise ValueError(f"kind={kind!r}: choose 'signs', 'normal' or 'sphere'")
        rows = torch.empty(len(indices), self.width, dtype=dtype or self.dtype, device=self.device)
        if len(indices):
            on_cpu = self.device.type == "cpu"
            of, piece = (
                (signs, _PIECE_OF_SIGNS) if kind == "signs" else (normals, _PIECE_OF_NORMALS)
            )
            self.draw(
                rows,
                of,
                lambda leaves_: keys(seed, indices, leaves_, self.device),
                piece if on_cpu else _PIECE_OF_DEVICE,
            )
        if kind == "sphere":
            rows *= (math.sqrt(self.n) / self.norms(rows)).to(rows.dtype)[:, None]
        return rows


def _with_axis(leaf: Tensor) -> Tensor:
    """A leaf of a block, with an axis of entries if those are numbers."""
    return leaf if leaf.dim() > 1 else leaf[:, None]


def _grouped(spans: Sequence[range], most: int) -> Iterator[tuple[range, list[range]]]:
    """Runs of leaves with their places, or pieces of one leaf, of ``most`` entries at most."""
    # Each word of random bits gives 64 signs.
    most = max(64, most // 64 * 64)
    begin, places, total = 0, list[range](), 0
    for i, span in enumerate(spans):
        if places and total + len(span) > most:
            yield range(begin, i), places
            begin, places, total = i, [], 0
        if len(span) > most:
            cuts = [*range(span.start, span.stop, most), span.stop]
            for start, stop in pairwise(cuts):
                yield range(i, i + 1), [range(start, stop)]
            begin = i + 1
        else:
            places.append(span)
            total += len(span)
    if places:
        yield range(begin, len(spans)), places


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


@options.validated(tree=options.tree)
def ravel(tree: Tree, /) -> Tensor:
    """One flat vector ``(n,)`` of a tree, in the order of ``parameters_to_vector``."""
    space = Space.of(tree)
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
    return Space.of(like).unravel(flat)


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
    space = Space.of(like)
    return space.unravel(space.probes(range(start, start + k), kind=kind, seed=seed))


@validated
def split(
    tree: Mapping[str, Any],
    pattern: str | Iterable[str] | Callable[[str, Tensor], bool],
    /,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen leaves of a (nested) mapping, and the rest.

    Args:
        tree: a mapping of names to tensors, or to further mappings.
        pattern: a glob over dotted names (``"layer3.*"``), several of them or of exact names, or a
            predicate ``(name, tensor) -> bool``.

    Raises:
        TypeError: the tree has containers other than mappings.
        ValueError: nothing, or nothing by one of several patterns, is found.
    """
    found = list(_named(tree, (), ()))
    names = [name for name, _, _ in found]
    unknown: list[str] = []
    if callable(pattern):
        wanted = {name for name, _, leaf in found if pattern(name, leaf)}
    else:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        fitting = {one: _fitting(one, names) for one in patterns}
        wanted = set().union(*fitting.values())
        unknown = [one for one, fit in fitting.items() if not fit]
    if not wanted:
        raise ValueError(f"{pattern!r} chooses none of the leaves {first_of(names)}")
    if unknown:
        raise ValueError(f"there is no leaf named {', '.join(unknown)} among {first_of(names)}")
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, path, leaf in found:
        _insert(chosen if name in wanted else rest, path, leaf)
    return chosen, rest


def _named(
    tree: Mapping[str, Any], names: tuple[str, ...], path: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
    """The dotted name, the keys and the tensor of each leaf of a mapping."""
    for key, value in tree.items():
        here, keys = (*names, str(key)), (*path, key)
        if isinstance(value, Mapping):
            yield from _named(value, here, keys)
        elif isinstance(value, Tensor):
            yield ".".join(here), keys, value
        else:
            raise TypeError(
                f"{'.'.join(here)!r} is a {type(value).__name__}: `split` takes tensors in "
                "(nested) mappings"
            )


def _fitting(pattern: str, names: Sequence[str]) -> set[str]:
    # A name may have brackets, which a glob takes for a set of letters.
    if pattern in names:
        return {pattern}
    return {name for name in names if fnmatch.fnmatchcase(name, pattern)}


def first_of(names: Sequence[str], /) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Tensor) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def merge(chosen: Mapping[str, Any], rest: Mapping[str, Any], /) -> dict[str, Any]:
    """The whole of what `split` has cut in two."""
    whole = dict(rest)
    for key, value in chosen.items():
        whole[key] = merge(value, whole[key]) if key in whole else value
    return whole
