"""Symmetric matrices with structure, on the entries of one parameter tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Saved
from hessfunc.display import Displayed
from hessfunc.memory import refuse_unless_fits
from hessfunc.options import at_least, finite, flag, tensor, validated
from hessfunc.spaces.of import random_like

Damping: TypeAlias = Literal["exact", "factored", "heuristic"]


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


@dataclass(frozen=True)
class Shifted:
    """Eigenvalues of a damped matrix.

    Attributes:
        values: Eigenvalues.
        rounding: Rounding error of each eigenvalue.
        is_positive: Whether an eigenvalue is positive in spite of its rounding error.
    """

    values: Tensor
    rounding: Tensor
    is_positive: Tensor


def refuse_method(method: str, damping: float, /) -> None:
    """Raise if a damping has no such method, or the method does not allow its sign."""
    if method not in get_args(Damping):
        raise ValueError(f"method={method!r}: choose {', '.join(map(repr, get_args(Damping)))}")
    if method != "exact" and damping < 0:
        raise ValueError(f"damping={damping:g} is negative: only method='exact' supports it")


def _refuse_negative(values: Tensor, damping: float, *, strictly: bool) -> None:
    least = float(values.min())
    if least < 0 or (strictly and not least > 0):
        raise ValueError(
            f"A + {damping:g} I is not positive definite: its smallest eigenvalue is "
            f"{least:.2e}; pass a damping larger than {damping - least:.2e}"
        )


class Block(Displayed, Saved, ABC):
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

    def norm(self) -> float:
        """Return the Frobenius norm, from the factors if the block has a structure."""
        return float(torch.linalg.matrix_norm(self.dense().double()))

    def diagonal(self) -> Tensor:
        """Return the diagonal, in the shape of the parameter."""
        return self.dense().diagonal().reshape(self.shape)

    def eigenvalues(self) -> Tensor:
        """Return the n eigenvalues in descending order, with their multiplicities."""
        values = self._spectrum.values
        zeros = values.new_zeros(self.n - len(values))
        return torch.cat([values, zeros]).sort(descending=True).values

    @validated(block=tensor)
    def inverse_matvec(
        self, block: Tensor, damping: float, /, *, method: Damping = "exact"
    ) -> Tensor:
        """Return ``(A + damping I)^-1`` times k vectors ``(k, *shape)``.

        The first call computes the eigenvalues, from the factors if the block has a structure.
        Later calls with any damping reuse them.

        Args:
            block: Vectors.
            damping: Number that is added to each eigenvalue.
            method: Damping of a Kronecker product B (x) A. ``"exact"`` inverts
                ``B (x) A + damping I``. ``"factored"`` inverts
                ``(B + sqrt(damping) I) (x) (A + sqrt(damping) I)``. ``"heuristic"`` inverts
                ``(B + sqrt(damping) / r I) (x) (A + r sqrt(damping) I)``, where r^2 is the ratio
                of the mean eigenvalues of A and B. Other blocks are damped exactly.

        Raises:
            ValueError: If the damped matrix is singular, or if a method other than ``"exact"`` has
                a negative damping.
            MemoryError: If the eigenvectors do not fit into memory.

        Source: Martens and Grosse 2015, arXiv 1503.05671, section 6.3.
        """
        refuse_method(method, damping)
        shifted = self._shifted(damping, method)
        return self._applied(block, 1 / self._nonsingular(shifted, damping))

    @validated
    def inverse(
        self, damping: float, /, *, method: Damping = "exact"
    ) -> Callable[[Tensor], Tensor]:
        """Return the matvec of ``(A + damping I)^-1``, for instance as a preconditioner.

        Args:
            damping: Number that is added to each eigenvalue.
            method: Method as in `inverse_matvec`.
        """
        refuse_method(method, damping)
        return lambda block: self.inverse_matvec(block, damping, method=method)

    @validated(block=tensor, exponent=finite)
    def power_matvec(self, block: Tensor, exponent: float, damping: float = 0.0, /) -> Tensor:
        """Return ``(A + damping I)^exponent`` times k vectors ``(k, *shape)``.

        Args:
            block: Vectors.
            exponent: Exponent, any real number.
            damping: Number that is added to each eigenvalue.

        Raises:
            ValueError: If the exponent is negative and the damped matrix is singular, or if the
                exponent is not an integer and an eigenvalue is negative.
        """
        shifted = self._shifted(damping)
        values = shifted.values if exponent >= 0 else self._nonsingular(shifted, damping)
        if not float(exponent).is_integer():
            values = torch.where(values.abs() <= shifted.rounding, values.clamp_min(0), values)
            _refuse_negative(values, damping, strictly=False)
        return self._applied(block, values**exponent)

    @validated
    def sample(self, k: int, /, damping: float = 0.0, *, seed: int) -> Tensor:
        """Draw k vectors ``(k, *shape)`` from the normal distribution N(0, (A + damping I)^-1).

            x = (A + damping I)^(-1/2) z,  z ~ N(0, I)

        Args:
            k: Number of vectors.
            damping: Number that is added to each eigenvalue.
            seed: Seed. Vector i depends on (seed, i) only.

        Raises:
            ValueError: If A + damping I is not positive definite.
        """
        at_least(1, k=k)
        like = self._like.new_zeros(()).expand(self.shape)
        return self.power_matvec(random_like(like, k, kind="normal", seed=seed), -0.5, damping)

    @validated
    def logdet(self, damping: float = 0.0, /) -> float:
        """Return ``log det (A + damping I)``.

        Raises:
            ValueError: If A + damping I is not positive definite.
        """
        values = self._nonsingular(self._shifted(damping), damping).double()
        _refuse_negative(values, damping, strictly=True)
        rank = len(self._spectrum.values)
        zeros = (self.n - rank) * math.log(damping) if rank < self.n else 0.0
        return float(values[:rank].log().sum()) + zeros

    def _shifted(self, damping: float, method: Damping = "exact") -> Shifted:
        """Return the eigenvalues of A + damping I: r in the basis, then one for all n - r zeros."""
        spectrum = self._spectrum
        zero = spectrum.values.new_zeros(1 if len(spectrum.values) < self.n else 0)
        values, rounding = (
            torch.cat([part, zero]) for part in (spectrum.values, spectrum.rounding)
        )
        least = rounding.clamp_min(torch.finfo(values.dtype).eps * abs(damping))
        return Shifted(values + damping, least, (values >= 0) & (damping > 0))

    def _nonsingular(self, shifted: Shifted, damping: float) -> Tensor:
        small = (shifted.values.abs() <= shifted.rounding) & ~shifted.is_positive
        if bool(small.any()):
            raise ValueError(f"A + {damping:g} I is singular up to rounding: pass a larger damping")
        return shifted.values

    def _applied(self, block: Tensor, values: Tensor) -> Tensor:
        """Return the products with the matrix that has other eigenvalues in the same basis.

        Args:
            block: Vectors ``(k, *shape)``.
            values: Eigenvalues: r in the basis, then one for all n - r others.
        """
        rows, spectrum = self._rows(block), self._spectrum
        # With orthonormal columns V, V diag(f) V' + c (I - V V') = c I + V diag(f - c) V', and the
        # terms in c cancel if V is square.
        if len(values) > len(spectrum.values):
            rest = values[-1]
            moved = spectrum.lift(spectrum.project(rows) * (values[:-1] - rest))
            return (rows * rest + moved).reshape(block.shape)
        return spectrum.lift(spectrum.project(rows) * values).reshape(block.shape)

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
