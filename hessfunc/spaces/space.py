"""The vector space of a tree: flat rows, inner products and probes.

A tree is a pytree of floating-point tensors. A block is a tree whose leaves have one more, leading
axis: the probe axis. Algorithms work on flat rows ``(k, n)``. A block of rows is viewed as a tree
without a copy, and its leaves are written back to a row with one copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import optree
import torch
import torch.utils._cxx_pytree
from torch import Tensor, nn

from hessfunc.memory import available_memory
from hessfunc.numerics import wide_dtype
from hessfunc.randomness import keys, normals, signs
from hessfunc.trees import Made, Tree, flatten, leaves

if TYPE_CHECKING:
    from hessfunc.ranks import Ranks


def products_eps(space: Space, dtype: torch.dtype) -> float:
    """The eps of products whose rows are in ``dtype``: that of the coarsest leaf counts too."""
    return max(torch.finfo(d).eps for d in (dtype, *space.dtypes))


def rows_dtype(space: Space) -> torch.dtype:
    """The dtype of a basis: that of the vectors, float32 at least."""
    return torch.promote_types(space.dtype, torch.float32)


# A tensor whose last axis runs over the entries of a vector, or over those that this rank holds.
Rows: TypeAlias = Tensor
# Metadata of a dataclass field whose tensors are `Rows`, which ranks divide by their last axis.
DIVIDED = {"divided": True}
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


def available_to(space: Space, device: torch.device | None = None, /) -> int:
    """The bytes that every rank of a space may still take of its device, or of another one."""
    return space.least(available_memory(device or space.device))
