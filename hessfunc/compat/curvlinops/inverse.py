"""Inverses of linear operators by conjugate gradients, LSMR and Neumann series."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.solve.cg import cg
from hessfunc.compat.curvlinops.arguments import CHECKS
from hessfunc.compat.curvlinops.matvecs import as_matvec
from hessfunc.compat.curvlinops.operator import Composed, PyTorchLinearOperator
from hessfunc.options import validated

_PRODUCTS = 1000


class Inverse(Composed):
    """Inverse of a square operator."""

    def __init__(self, A: PyTorchLinearOperator) -> None:
        if A._in_shape != A._out_shape:
            raise ValueError(
                f"the operator of shape {A.shape} is not square, so that it has no inverse: pass a "
                "square operator"
            )
        super().__init__(A, A._in_shape, A._out_shape)
        self.SELF_ADJOINT = A.SELF_ADJOINT

    def _flat(self, X: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten(end_dim=-2) for x in X])

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        parts = zip(flat.split(self._in_shape_flat), self._in_shape, strict=True)
        return [part.reshape(*shape, -1) for part, shape in parts]


class CGInverseLinearOperator(Inverse):
    """Inverse of a symmetric positive definite operator, by `cg`.

    Args:
        A: Operator.
        tolerance: Relative tolerance of the measured residual.
        max_iter: Largest number of iterations.
        initial_guess: Start vector or matrix, flat; zero by default.
        preconditioner: Function that multiplies the columns of a flat matrix with an approximate
            inverse.
        **others: Options of ``linear_cg`` that are ignored: ``eps``, ``n_tridiag``,
            ``max_tridiag_iter`` and ``stop_updating_after``.

    Warns:
        UserWarning: A product has not reached the tolerance, and no ``max_iter`` is given.
    """

    _IGNORED = frozenset({"eps", "n_tridiag", "max_tridiag_iter", "stop_updating_after"})

    @validated(**CHECKS)
    def __init__(
        self,
        A: PyTorchLinearOperator,
        *,
        tolerance: float | None = None,
        max_iter: int | None = None,
        initial_guess: Tensor | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(A)
        if unknown := others.keys() - self._IGNORED:
            raise TypeError(
                f"CGInverseLinearOperator has no option {min(unknown)!r}: choose tolerance, "
                "max_iter, initial_guess or preconditioner"
            )
        self._tolerance = 1e-5 if tolerance is None else tolerance
        self._max_iter = max_iter
        self._initial_guess, self._preconditioner = initial_guess, preconditioner

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        rows = self._flat(X).mT
        matvec, like = as_matvec(self._A)
        multiply, start = self._preconditioner, self._initial_guess
        solution = cg(
            matvec,
            rows,
            like=like,
            rtol=self._tolerance,
            max_matvecs=len(rows) * (1 + (self._max_iter or _PRODUCTS)),
            preconditioner=None if multiply is None else lambda block: multiply(block.mT).mT,
            start=None if start is None else start.reshape(like.numel(), -1).mT.expand_as(rows),
        )
        if self._max_iter is None and not solution.converged:
            warnings.warn(
                f"conjugate gradients have not converged: {solution.reason}; add a damping to the "
                "operator, or pass tolerance= or max_iter=",
                stacklevel=4,
            )
        return self._shaped(solution.x.mT)


class LSMRInverseLinearOperator(Inverse):
    """Inverse of any square operator, by ``scipy.sparse.linalg.lsmr`` on the CPU.

    Args:
        A: Operator.
        **lsmr_hyperparameters: Options of ``lsmr``.
    """

    @validated(**CHECKS)
    def __init__(self, A: PyTorchLinearOperator, **lsmr_hyperparameters: Any) -> None:
        super().__init__(A)
        self._lsmr_hyperparameters = lsmr_hyperparameters
        self._lsmr_info: list[Any] = []

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        from scipy.sparse.linalg import lsmr

        rows = self._flat(X).mT.cpu().double().numpy()
        operator = self._A.to_scipy()
        found = [lsmr(operator, row, **self._lsmr_hyperparameters) for row in rows]
        self._lsmr_info = [solution[1:] for solution in found]
        solutions = torch.stack([torch.from_numpy(solution[0]) for solution in found], dim=1)
        return self._shaped(solutions.to(X[0]))

    def _adjoint(self) -> LSMRInverseLinearOperator:
        return LSMRInverseLinearOperator(self._A.adjoint(), **self._lsmr_hyperparameters)


class NeumannInverseLinearOperator(Inverse):
    """Truncated Neumann series of the inverse.

        A^-1 ~ s sum_k (I - s A)^k,  k = 0 .. num_terms

    It converges if the eigenvalues of s A are between 0 and 2, and CG converges faster.

    Args:
        A: Operator.
        num_terms: Number of products.
        scale: Scale s.
        check_nan: Whether to raise an error if a term is not finite.

    Raises:
        ValueError: If a term is not finite. Raised by a product.
    """

    @validated(**CHECKS)
    def __init__(
        self,
        A: PyTorchLinearOperator,
        num_terms: int = 100,
        scale: float = 1.0,
        check_nan: bool = True,
    ) -> None:
        super().__init__(A)
        self._num_terms, self._scale, self._check_nan = num_terms, scale, check_nan

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        total = term = X
        for _ in range(self._num_terms):
            products = self._A._matmat(term)
            term = [t - self._scale * p for t, p in zip(term, products, strict=True)]
            total = [sum_ + t for sum_, t in zip(total, term, strict=True)]
            if self._check_nan and not all(bool(part.isfinite().all()) for part in total):
                raise ValueError(
                    f"the Neumann series diverges with scale={self._scale:g}: pass a scale below 2 "
                    "divided by the largest eigenvalue, or use CGInverseLinearOperator"
                )
        return [self._scale * part for part in total]

    def _adjoint(self) -> NeumannInverseLinearOperator:
        return NeumannInverseLinearOperator(
            self._A.adjoint(), self._num_terms, self._scale, self._check_nan
        )
