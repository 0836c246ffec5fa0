"""Vector space of a tree: flat rows, inner products and probes.

A tree is a pytree of floating-point tensors. A vector block is a tree whose leaves have an
additional leading axis, the probe axis. Algorithms work on flat rows ``(k, n)``. Rows are viewed as
a vector block without a copy; a vector block is written to rows with one copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import optree
import torch
import torch.utils._cxx_pytree
from torch import Tensor

from hessfunc.memory import available_memory
from hessfunc.numerics import wide_dtype
from hessfunc.randomness import Draw, fill, keys, normals, signs
from hessfunc.spaces.inner_products import PIECE_OF_DEVICE, gram, norms
from hessfunc.spaces.leaf_names import advice, described, names_of
from hessfunc.trees import Made, Tree, flatten, leaves

if TYPE_CHECKING:
    from hessfunc.ranks import Ranks


def products_eps(space: Space, dtype: torch.dtype | None = None) -> float:
    """Return the machine epsilon of products: the largest of their rows and of all leaves.

    Args:
        space: Space of the vectors.
        dtype: Dtype of the rows, by default that of a basis.
    """
    return max(torch.finfo(dtype or rows_dtype(space)).eps, space.eps)


def rows_dtype(space: Space) -> torch.dtype:
    """Return the dtype of a basis: the dtype of the vectors, and at least float32."""
    return torch.promote_types(space.dtype, torch.float32)


# A tensor whose last axis runs over the entries of a vector that this rank holds.
Rows: TypeAlias = Tensor
# Metadata of a dataclass field whose tensors are `Rows`, which ranks divide by their last axis.
DIVIDED = {"divided": True}
ProbeKind: TypeAlias = Literal["signs", "normal", "sphere"]
# Number of random entries that are drawn at once. A sign takes about 2 bytes of scratch memory, a
# normal number about 24.
_PIECE_OF_SIGNS = 2**18
_PIECE_OF_NORMALS = 2**15


@dataclass(frozen=True, eq=False)
class Space:
    """Vector space of a tree of tensors.

    Attributes:
        structure: Nesting of the leaves.
        names: Dotted path of each leaf.
        shapes: Shape of each leaf.
        dtype: Dtype of a flat row, promoted from the dtypes of the leaves.
        dtypes: Dtype of each leaf.
        device: Device of all leaves.
    """

    structure: optree.PyTreeSpec
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @property
    def distributed(self) -> bool:
        """Whether leaves are DTensors, which support neither vmap nor forward mode."""
        return False

    @cached_property
    def sizes(self) -> list[int]:
        """Number of entries of each leaf."""
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def n(self) -> int:
        """Dimension of the space."""
        return sum(self.sizes)

    @cached_property
    def eps(self) -> float:
        """Largest machine epsilon of the leaves."""
        return max(torch.finfo(dtype).eps for dtype in set(self.dtypes))

    @property
    def ranks(self) -> Ranks | None:
        """Ranks that each hold a part of every row; None if this process holds whole rows."""
        return None

    @property
    def columns(self) -> range:
        """Indices of the columns that this rank holds, disjoint from those of other ranks."""
        return range(self.n)

    @property
    def cut(self) -> str | None:
        """Description of the division of leaves among ranks, if column indices depend on it."""
        return None

    @cached_property
    def spans(self) -> list[range]:
        """Range of entries of each flat leaf that this rank holds; all entries on one rank."""
        return [range(size) for size in self.sizes]

    @cached_property
    def width(self) -> int:
        """Number of entries of a row that this rank holds."""
        return sum(map(len, self.spans))

    @property
    def widest(self) -> int:
        """Largest ``width`` of any rank, the same number on all ranks."""
        return self.width

    def zeros(self, count: int, dtype: torch.dtype, /) -> Tensor:
        """Return rows of zeros ``(count, width)``."""
        return torch.zeros(count, self.width, dtype=dtype, device=self.device)

    def places(self) -> Tensor:
        """Return the index in a flat vector of each column that this rank holds, ``(width,)``."""
        return torch.arange(self.n, device=self.device)

    def units(self, columns: Tensor, dtype: torch.dtype, /) -> Tensor:
        """Return the unit vectors of these columns of a flat vector as rows ``(k, width)``."""
        return (columns[:, None] == self.places()).to(dtype)

    def entries(self, rows: Tensor, columns: Tensor, /) -> Tensor:
        """Return the entries of rows in these columns of a flat vector, on every rank."""
        return rows[:, columns]

    def summed(self, numbers: Tensor, /) -> Tensor:
        """Sum over ranks numbers that each rank computed from its part of the rows."""
        return numbers

    def least(self, number: int, /) -> int:
        """Return the least of the numbers of all ranks."""
        return number

    def on_all(self, act: Callable[[], Made], /) -> Made:
        """Return the result of ``act``, called on every rank; an error on one raises on all."""
        return act()

    def vectors(self, rows: Tensor, /) -> Tree:
        """Return rows in the form in which a result stores vectors."""
        return self.unravel(rows)

    def rows(self, vectors: Tree, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows of a vector block, of the vectors of a result, or of one vector.

        Algorithms are not differentiated, so rows do not carry the graph of the vectors.
        """
        first = leaves(vectors)
        with torch.no_grad():
            if first and isinstance(first[0], Tensor) and first[0].dim() == len(self.shapes[0]):
                return self.ravel_leaves([x[None] for x in self.tree_leaves(vectors)], dtype=dtype)
            return self.ravel(vectors, dtype=dtype)

    def factored(self, rows: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return orthonormal rows Q ``(k, n)`` and triangular R ``(k, k)`` with ``rows = R' Q``."""
        basis, triangle = torch.linalg.qr(rows.mT)
        return basis.mT, triangle

    def fingerprint(self) -> dict[str, float]:
        """Numbers by name that identify the names, shapes and dtypes of the leaves."""
        described = repr((self.names, self.shapes, self.dtypes)).encode()
        return {
            "the number of leaves": len(self.names),
            "the number of entries": self.n,
            "the names, shapes and dtypes of leaves": zlib.crc32(described) >> 4,
        }

    def tree(self, tensors: Iterable[Tensor], /) -> Tree:
        """Return the tree, or vector block, with these leaves."""
        return self.structure.unflatten(tensors)

    def block(self, tensors: Iterable[Tensor], /) -> Tree:
        """Return the vector block with the leaves of a product."""
        return self.tree(tensors)

    def tree_leaves(self, vector: Tree, /) -> list[Tensor]:
        """Return the leaves of one vector of this space after checking them."""
        return self._checked(vector, batch_dims=0)

    def block_leaves(self, block: Tree, /) -> list[Tensor]:
        """Return the leaves of a vector block of this space after checking them."""
        return self._checked(block, batch_dims=1)

    def _checked(self, tree: Tree, *, batch_dims: int) -> list[Tensor]:
        leaves = self._leaves_of_structure(tree)
        length = leaves[0].shape[:batch_dims]
        for name, shape, leaf in zip(self.names, self.shapes, leaves, strict=True):
            fits = leaf.shape == length + shape and leaf.device == self.device
            if not (fits and leaf.is_floating_point()):
                self._refuse(name, shape, leaf, length, batch_dims)
        return leaves

    def _refuse(
        self, name: str, shape: torch.Size, leaf: Tensor, length: torch.Size, batch_dims: int
    ) -> None:
        kind = "block" if batch_dims else "vector"
        if not leaf.is_floating_point():
            raise TypeError(
                f"leaf {name!r} of the {kind} has dtype {leaf.dtype}, but vectors are real and "
                f"floating-point: {'take its real part' if leaf.is_complex() else 'call .float()'}"
            )
        if leaf.device != self.device:
            raise ValueError(
                f"leaf {name!r} of the {kind} is on {leaf.device}, expected {self.device}: call "
                f"leaf.to({str(self.device)!r})"
            )
        if batch_dims and leaf.shape == shape:
            raise ValueError(
                f"leaf {name!r} has the shape of one vector, {tuple(shape)}, but a matvec takes a "
                "vector block with a leading probe axis: use `apply(matvec, vector)`"
            )
        if leaf.shape[batch_dims:] == shape and leaf.dim() == len(shape) + batch_dims:
            raise ValueError(
                "the leaves of the block differ in the length of their probe axis: "
                f"{self.names[0]} has {length[0]}, {name} has {len(leaf)}"
            )
        expected = ("k, " if batch_dims else "") + ", ".join(map(str, shape))
        raise ValueError(
            f"leaf {name!r} of the {kind} has shape {tuple(leaf.shape)}, expected ({expected})"
        )

    def _leaves_of_structure(self, tree: Tree) -> list[Tensor]:
        try:
            leaves: list[Any] = self.structure.flatten_up_to(tree)
        except ValueError:
            given = names_of(flatten(tree)[1])
            raise ValueError(
                "the vector does not have the structure of the parameters, "
                f"{described(self.names)}: it has {described(given)}"
            ) from None
        for name, leaf in zip(self.names, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    "the vector does not have the structure of the parameters: its leaf "
                    f"{name!r} is a {type(leaf).__name__}, not a tensor{advice(leaf)}"
                )
        return leaves

    def stacked(self, vectors: Sequence[Sequence[Tensor]], /) -> list[Tensor]:
        """Stack the leaves of vectors to the leaves of a vector block."""
        return [torch.stack(leaves) for leaves in zip(*vectors, strict=True)]

    def ravel(self, block: Tree, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows ``(k, n)`` of a vector block, with one copy."""
        return self.ravel_leaves(self.block_leaves(block), dtype=dtype)

    def ravel_leaves(
        self, tensors: Sequence[Tensor], /, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the rows ``(k, n)`` of the leaves of a vector block, with one copy."""
        dtype = dtype or self.dtype
        # Autograd does not support copies into one of several views of `split`.
        if all(leaf.dtype == dtype and leaf.is_contiguous() for leaf in tensors) or (
            torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tensors)
        ):
            count = tensors[0].shape[0]
            flat = [x.reshape(count, size) for x, size in zip(tensors, self.sizes, strict=True)]
            return torch.cat(flat, dim=1).to(dtype)
        rows = torch.empty(len(tensors[0]), self.n, dtype=dtype, device=self.device)
        for target, leaf in zip(self._views(rows), tensors, strict=True):
            target.copy_(leaf)
        return rows

    def unravel(self, rows: Tensor, /) -> Tree:
        """Return the tree of a flat vector ``(n,)``, or the vector block of rows ``(k, n)``.

        Leaves are views of ``rows``, except for leaves of another dtype, which are converted.
        """
        if rows.dim() not in (1, 2) or rows.shape[-1] != self.n:
            raise ValueError(
                f"a flat vector has shape {tuple(rows.shape)}: pass one of shape ({self.n},) or "
                f"(k, {self.n})"
            )
        views = self._views(rows)
        return self.tree(v.to(dtype) for v, dtype in zip(views, self.dtypes, strict=True))

    def views(self, rows: Tensor, /) -> Tree:
        """Return whole rows ``(k, n)`` as a vector block of views, in the dtype of the rows."""
        return self.tree(self._views(rows))

    def accumulate(self, rows: Tensor, block: Tree, /, *, weight: float) -> None:
        """Add a vector block times a weight to whole rows, in place."""
        with torch.no_grad():
            for target, leaf in zip(self._views(rows), leaves(block), strict=True):
                target.add_(leaf, alpha=weight)

    def _views(self, rows: Tensor) -> list[Tensor]:
        parts = rows.split_with_sizes(self.sizes, dim=-1)
        return [
            part.view((*rows.shape[:-1], *shape))
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def leaf_of_columns(self, columns: Tensor, /) -> list[str]:
        """Return the names of the leaves that contain these columns of a row, on any rank."""
        ends = torch.tensor(
            [len(span) for span in self.spans], dtype=torch.long, device="cpu"
        ).cumsum(0)
        indices = torch.bucketize(columns.cpu(), ends, right=True)
        counts = torch.bincount(indices, minlength=len(self.names)).to(self.device)
        return [name for name, count in zip(self.names, self.summed(counts), strict=True) if count]

    def gram(self, rows: Tensor, others: Tensor, /, *, run: int = 1024) -> Tensor:
        """Return the inner products ``rows @ others.T`` in float64, shape ``(j, k)``.

        Up to four products of float32 rows are computed in float64. For more products, runs of
        entries are multiplied in float32 and their results summed in float64. The error stays
        below 1e-7 |x| |y| at any length, except for vectors of equal entries, whose rounding errors
        add up to 1e-6. Runs of 2^14 entries are twice as fast, with errors up to 20 times larger.
        """
        return self.summed(gram(rows, others, run=run))

    def norms(self, rows: Tensor, /) -> Tensor:
        """Return the 2-norm of each row in float64, shape ``(k,)``."""
        return norms(rows)

    def combine(self, coefficients: Tensor, rows: Tensor, /) -> Tensor:
        """Return ``coefficients @ rows`` in the dtype of the rows, shape ``(j, n)``."""
        return coefficients.to(rows.device, rows.dtype) @ rows

    def by_leaf(self, rows: Tensor, others: Tensor, /) -> Tensor:
        """Return inner products of corresponding rows for each leaf, float64 ``(k, leaves)``."""
        wide = wide_dtype(rows.device)
        products = (rows * others).split([len(span) for span in self.spans], dim=1)
        return self.summed(torch.stack([part.sum(1, dtype=wide) for part in products], dim=1))

    def draw(
        self, rows: Tensor, of: Draw, keys: Callable[[range], Tensor], scratch: int, /
    ) -> None:
        """Fill rows with random numbers, as in `randomness.fill`, by the places of this rank."""
        fill(rows, self.spans, of, keys, scratch)

    def probes(
        self,
        indices: Sequence[int],
        /,
        *,
        kind: ProbeKind,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return random rows ``(k, n)`` whose second moment E[v v'] is the identity.

        Each entry is a function of (seed, probe index, leaf, position), the same on every device
        up to rounding. Row i depends only on (seed, indices[i]). The random streams of torch are
        not used.

        Args:
            indices: Index of each probe.
            kind: Distribution: ``"signs"`` (+1 or -1), ``"normal"`` (standard normal) or
                ``"sphere"`` (uniform on the sphere of radius sqrt(n)).
            seed: Seed of the probes.
            dtype: Dtype of the rows; by default the dtype of the space.
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
                piece if on_cpu else PIECE_OF_DEVICE,
            )
        if kind == "sphere":
            rows *= (math.sqrt(self.n) / self.norms(rows)).to(rows.dtype)[:, None]
        return rows


def available_to(space: Space, device: torch.device | None = None, /) -> int:
    """Return the bytes that every rank of a space may still allocate on its device, or another."""
    return space.least(available_memory(device or space.device))
