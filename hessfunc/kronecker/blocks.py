"""Diagonal blocks of a block-diagonal curvature matrix: symmetric matrices with structure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from hessfunc.autograd.constant_matrix import refusing_gradients
from hessfunc.display import Displayed
from hessfunc.memory import refuse_unless_fits
from hessfunc.options import flag, tensor, tree, validated
from hessfunc.spaces.space import Space
from hessfunc.trees import Tree

_WITHOUT_GRAPH = (
    "a product with structured blocks keeps no graph of the parameters and the batch, so that "
    "their gradient would silently leave the product out: take the product under "
    "`torch.no_grad()`, or use `ggnvp(loss, differentiable=True)`"
)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a symmetric matrix, with the maps to and from its eigenbasis.

    Attributes:
        values: Eigenvalues ``(r,)``; the other n - r eigenvalues are zero.
        rounding: Rounding error of each eigenvalue, ``(r,)``.
        project: Map from rows ``(k, n)`` to their coordinates ``(k, r)``.
        lift: Map from coordinates ``(k, r)`` to rows ``(k, n)``.
    """

    values: Tensor
    rounding: Tensor
    project: Callable[[Tensor], Tensor]
    lift: Callable[[Tensor], Tensor]


def decomposition(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues ``(..., n)``, their rounding ``(..., 1)``, and the eigenvectors.

    Negative eigenvalues within rounding of zero are set to zero, so that a positive semi-definite
    matrix stays positive semi-definite.
    """
    values, vectors = torch.linalg.eigh(matrices)
    eps = torch.finfo(values.dtype).eps
    # Weyl's inequality: a backward error of n eps |A|_2 changes each eigenvalue by at most as much.
    rounding = values.shape[-1] * eps * values.abs().amax(-1, keepdim=True)
    return torch.where((values < 0) & (values >= -rounding), 0, values), rounding, vectors


class Block(Displayed, ABC):
    """Diagonal block: a symmetric matrix on the entries of one parameter tensor.

    Attributes:
        shape: Shape of the parameter.
        is_diagonal: Whether blocks of this class are diagonal matrices.
    """

    shape: torch.Size
    is_diagonal: ClassVar[bool] = False

    @property
    def n(self) -> int:
        """Dimension of the matrix."""
        return self.shape.numel()

    def _headline(self) -> dict[str, object]:
        return {"shape": tuple(self.shape), "n": self.n, "trace": f"{self.trace():.6g}"}

    @validated(vectors=flag)
    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return the kind, the shape, the dimension and the trace as plain Python.

        The factors are left out.

        Args:
            vectors: Accepted as for other results; nothing here is a vector.
        """
        numbers = {"n": self.n, "trace": self.trace()}
        return {"kind": type(self).__name__, "shape": list(self.shape), **numbers}

    def matvec(self, block: Tensor, /) -> Tensor:
        """Return the products with k vectors ``(k, *shape)``; every algorithm accepts this."""
        return self._product(self._rows(block)).reshape(block.shape)

    def dense(self) -> Tensor:
        """Materialise the matrix ``(n, n)``, in the order of the flattened parameter.

        Raises:
            MemoryError: If the matrix does not fit into memory.
        """
        refuse_unless_fits(
            2 * self.n**2,
            self._like,
            f"a dense block of {self.n} x {self.n} entries",
            "use `block.matvec`, and `cg(block.matvec, b, damping=...)` for the inverse",
        )
        return self._dense()

    @abstractmethod
    def trace(self) -> float:
        """Return the trace without materialising the matrix."""

    @validated(block=tensor)
    def inverse_matvec(self, block: Tensor, damping: float, /) -> Tensor:
        """Return ``(A + damping I)^-1`` times k vectors ``(k, *shape)``.

        The first call computes the eigenvalues, from the factors if the block has a structure.
        Later calls with any damping reuse them.

        Raises:
            ValueError: If A + damping I is singular.
            MemoryError: If the eigenvectors do not fit into memory.
        """
        rows, spectrum = self._rows(block), self._spectrum
        shifted = self._shifted(damping)
        inverse = 1 / shifted[: len(spectrum.values)]
        # With orthonormal columns V and A = V diag(l) V',
        #   (A + d I)^-1 = I / d + V diag(1 / (l + d) - 1 / d) V',
        # and the terms in 1 / d cancel if V is square.
        if len(spectrum.values) < self.n:
            moved = spectrum.lift(spectrum.project(rows) * (inverse - 1 / damping))
            return (rows / damping + moved).reshape(block.shape)
        return spectrum.lift(spectrum.project(rows) * inverse).reshape(block.shape)

    @validated
    def logdet(self, damping: float = 0.0, /) -> float:
        """Return ``log det (A + damping I)``.

        Raises:
            ValueError: If A + damping I is not positive definite.
        """
        shifted = self._shifted(damping).double()
        if not bool((shifted > 0).all()):
            least = float(shifted.min())
            raise ValueError(
                f"A + {damping:g} I is not positive definite: its smallest eigenvalue is "
                f"{least:.2e}; pass a damping larger than {damping - least:.2e}"
            )
        missing = self.n - len(self._spectrum.values)
        total = float(shifted[: len(self._spectrum.values)].log().sum())
        return total + (missing * math.log(damping) if missing else 0.0)

    def _shifted(self, damping: float) -> Tensor:
        """Return the eigenvalues of A + damping I: r in the basis, then one for all n - r zeros."""
        spectrum = self._spectrum
        zero = spectrum.values.new_zeros(1 if len(spectrum.values) < self.n else 0)
        values, rounding = (
            torch.cat([part, zero]) for part in (spectrum.values, spectrum.rounding)
        )
        shifted = values + damping
        least = rounding.clamp_min(torch.finfo(values.dtype).eps * abs(damping))
        if bool(((shifted.abs() <= least) & ~((values >= 0) & (damping > 0))).any()):
            raise ValueError(f"A + {damping:g} I is singular up to rounding: pass a larger damping")
        return shifted

    def _rows(self, block: Tensor) -> Tensor:
        if block.dim() != len(self.shape) + 1 or block.shape[1:] != self.shape:
            expected = ", ".join(("k", *map(str, self.shape)))
            raise ValueError(
                f"expected a vector block of shape ({expected}), got {tuple(block.shape)}"
            )
        return block.reshape(len(block), self.n)

    @cached_property
    def _spectrum(self) -> Spectrum:
        return self._decomposed()

    def _decomposed(self) -> Spectrum:
        values, rounding, vectors = decomposition(self.dense())
        return Spectrum(
            values,
            rounding.expand_as(values),
            lambda rows: rows @ vectors,
            lambda rows: rows @ vectors.mT,
        )

    @property
    @abstractmethod
    def _like(self) -> Tensor:
        """Tensor with the dtype and the device of the block."""

    @abstractmethod
    def _product(self, rows: Tensor) -> Tensor:
        """Return the products with rows ``(k, n)``."""

    @abstractmethod
    def _dense(self) -> Tensor: ...


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Displayed, Mapping[str, Block]):
    """Block-diagonal matrix with one diagonal block for each parameter.

    It maps the name of a parameter to its block. Called on a tree, it is the matvec of the whole
    matrix.

    Attributes:
        blocks: Diagonal blocks by the name of the parameter, in the order of the parameters.
        space: Space of the parameters.
        constants: Parameters and tensors of the batch that require a gradient, which products
            leave out; their gradient is refused.
    """

    blocks: Mapping[str, Block]
    space: Space
    constants: tuple[Tensor, ...] = ()

    def _headline(self) -> dict[str, object]:
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in self.values()))
        trace = f"{self.trace():.6g}"
        return {"blocks": len(self), "n": self.space.n, "kinds": f"[{kinds}]", "trace": trace}

    @validated(vectors=flag)
    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return the kind, the shape, the dimension and the trace of each block, by name.

        The factors are left out.

        Args:
            vectors: Accepted as for other results; nothing here is a vector.
        """
        return {"kind": "Blocks", "blocks": {name: b.to_dict() for name, b in self.items()}}

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        return {
            "block": list(self),
            "kind": [type(block).__name__ for block in self.values()],
            "shape": [tuple(block.shape) for block in self.values()],
            "n": [block.n for block in self.values()],
            "trace": [block.trace() for block in self.values()],
        }

    def __getitem__(self, name: str) -> Block:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def diagonals(self) -> tuple[str, ...]:
        """Names of the parameters whose block is a diagonal matrix."""
        return tuple(name for name, block in self.blocks.items() if block.is_diagonal)

    def __call__(self, block: Tree, /) -> Tree:
        return self._each(block, lambda part, rows: part.matvec(rows))

    @validated(block=tree)
    def inverse_matvec(self, block: Tree, damping: float, /) -> Tree:
        """Return ``(A + damping I)^-1`` times a vector block, as in `Block.inverse_matvec`."""
        return self._each(block, lambda part, rows: part.inverse_matvec(rows, damping))

    def trace(self) -> float:
        """Return the trace of the whole matrix."""
        return math.fsum(part.trace() for part in self.blocks.values())

    @validated
    def logdet(self, damping: float = 0.0, /) -> float:
        """Return ``log det (A + damping I)`` of the whole matrix."""
        return math.fsum(part.logdet(damping) for part in self.blocks.values())

    def _each(self, block: Tree, fn: Callable[[Block, Tensor], Tensor]) -> Tree:
        leaves = self.space.block_leaves(block)
        parts = [self.blocks[name] for name in self.space.names]
        outs = [fn(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]
        if self.constants and torch.is_grad_enabled():
            outs = list(refusing_gradients(self.constants, outs, _WITHOUT_GRAPH))
        return self.space.tree(outs)
