"""Pencils A - sigma B with B positive definite: their inner product, inverses and projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.driver import Method, RunOptions
from hessfunc.algorithms.eigen.ritz import rayleigh_ritz
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.solve.cg import ConjugateGradients
from hessfunc.algorithms.solve.minres import MinimalResiduals
from hessfunc.algorithms.solve.system import System
from hessfunc.algorithms.symmetry import SYMMETRIC
from hessfunc.spaces.space import Space, products_eps, rows_dtype
from hessfunc.trees import Tree

# Residual of a product with B^-1, relative to the vector.
_INVERTED = 1e-6
# Directions outside of a basis that are shorter than this part of the row are rounding.
_SHORTEST = 1e-6


@dataclass
class Scaled(Products):
    """Products with D^-1/2 A D^-1/2, which has the eigenvalues of A v = value D v.

    Attributes:
        root: Diagonal of D^-1/2, one row.
    """

    root: Tensor = field(
        default_factory=lambda: torch.ones(1, 1, dtype=torch.float64, device="cpu")
    )

    @classmethod
    def by(cls, products: Products, diagonal: Tree, /) -> Scaled:
        """Return the scaled products for a tree with the diagonal of D.

        Raises:
            ValueError: If an entry is not positive, or if the tree is not like a vector.
        """
        space = products.space
        space.tree_leaves(diagonal)
        entries = space.rows(diagonal, dtype=rows_dtype(space))
        smallest = float(entries.min()) if entries.numel() else 1.0
        if space.least(int(smallest > 0 and bool(entries.isfinite().all()))) == 0:
            raise ValueError(
                "the diagonal in `metric` must be positive and finite: A v = value B v needs a "
                "positive definite B, so add a damping to each leaf, `leaf + 1e-3`"
            )
        return cls(products.matvec, space, root=entries.rsqrt())

    def uncounted(self, rows: Tensor, /) -> Tensor:
        return super().uncounted(rows * self.root.to(rows)) * self.root.to(rows)

    def scaled(self, pairs: Eigenpairs, /) -> Eigenpairs:
        """Return the pairs with the vectors D^-1/2 w, which are orthonormal in v'D v."""
        rows = self.space.rows(pairs.vectors, dtype=rows_dtype(self.space))
        return replace(pairs, vectors=self.space.vectors(rows * self.root))

    def of_run(self, run: RunOptions, /) -> RunOptions:
        """Return the options of a run whose callback receives scaled pairs."""
        callback = run.get("callback")
        if callback is None:
            return run
        return {**run, "callback": lambda pairs: callback(self.scaled(pairs))}

    def unscaled(self, start: Tree, /) -> Tree:
        """Return the start D^1/2 v of the scaled problem."""
        rows = self.space.rows(start, dtype=rows_dtype(self.space))
        return self.space.vectors(rows / self.root)


@dataclass(frozen=True)
class Pencil:
    """Matrices A and B in flat rows, with the inner product v'B w.

    Attributes:
        products: Products with A, which count all products of the run.
        metric: Products with B, or None for the identity.
    """

    products: Products
    metric: Products | None

    @property
    def space(self) -> Space:
        return self.products.space

    def multiplied(self, rows: Tensor, /) -> Tensor:
        """Return the products with B."""
        if self.metric is None:
            return rows
        self.products.matvecs += len(rows)
        return self.metric(rows)

    def orthonormal(self, rows: Tensor, basis: Tensor, duals: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return B-orthonormal rows that extend a basis V by the rows, and their products with B.

        Args:
            rows: Rows, ``(k, n)``.
            basis: Rows V.
            duals: Products of V with B.

        Raises:
            ValueError: If B is not positive definite.
        """
        space = self.space
        for _ in range(2):
            lengths = space.norms(rows)
            rows = rows[lengths > 0] / lengths[lengths > 0].to(rows)[:, None]
            rows = rows - space.combine(space.gram(rows, duals), basis)
        rows = rows[space.norms(rows) > _SHORTEST]
        if not len(rows):
            return rows, rows
        images = self.multiplied(rows)
        squares, rotation = rayleigh_ritz(space.gram(rows, images))
        if float(squares[0]) < 0 and -float(squares[0]) > _SHORTEST**2 * float(squares[-1]):
            raise _indefinite(float(squares[0]))
        kept = squares > _SHORTEST**2 * squares[-1]
        if not bool(kept.any()):
            raise _indefinite(float(squares[-1]))
        change = (rotation[:, kept] / squares[kept].sqrt()).mT
        return space.combine(change, rows), space.combine(change, images)

    def inverted(self, rows: Tensor, room: int, /) -> tuple[Tensor, bool]:
        """Return the products with B^-1 by conjugate gradients, and whether all are accurate.

        Args:
            rows: Rows, ``(k, n)``.
            room: Largest number of products with B.

        Raises:
            ValueError: If B is not positive definite.
        """
        if self.metric is None:
            return rows, True
        before = self.metric.matvecs
        systems = tuple(_system(self.metric, row, _INVERTED) for row in rows.split(1))
        columns = _solved(ConjugateGradients(systems=systems), self.metric, room)
        self.products.matvecs += self.metric.matvecs - before
        for column in columns:
            if column.curvature is not None and column.curvature < 0:
                raise _indefinite(column.curvature)
        accurate = all(
            system.bound(column) <= 2 * system.tolerance
            for system, column in zip(systems, columns, strict=True)
        )
        return torch.cat([column.x for column in columns]), accurate

    def solved(
        self,
        rows: Tensor,
        shift: float,
        known: Tensor,
        duals: Tensor,
        /,
        *,
        rtol: float,
        room: int,
    ) -> Tensor:
        """Return the solutions T of projected systems, by minimal residuals.

            P'(A - shift B)P T' = P'R',  P = I - Q'Q B

        Args:
            rows: Rows R, ``(j, n)``.
            shift: Number close to the wanted eigenvalues.
            known: B-orthonormal rows Q, from which the solutions stay apart.
            duals: Products of Q with B.
            rtol: Tolerance of the residuals, relative to the rows.
            room: Largest number of products with A and B.
        """
        space = self.space

        def apart(rows: Tensor, given: Tensor, others: Tensor) -> Tensor:
            return rows - space.combine(space.gram(rows, given), others)

        def projected(rows: Tensor) -> Tensor:
            rows = apart(rows, duals, known)
            images = self.products(rows) - shift * self.multiplied(rows)
            return apart(images, known, duals)

        operator = _Operator(self.products.matvec, space, of_rows=projected)
        rows = apart(rows, known, duals)
        systems = tuple(_system(operator, row, rtol) for row in rows.split(1))
        each = 1 if self.metric is None else 2
        columns = _solved(MinimalResiduals(systems=systems), operator, room // each)
        return torch.cat([column.x for column in columns])


@dataclass
class _Operator(Products):
    """Products with an operator on rows that another object counts."""

    of_rows: Callable[[Tensor], Tensor] = field(default=lambda rows: rows)

    def uncounted(self, rows: Tensor, /) -> Tensor:
        return self.of_rows(rows)


def _system(products: Products, row: Tensor, rtol: float) -> System:
    length, eps = float(products.space.norms(row)), products_eps(products.space, row.dtype)
    return System(
        products=products,
        preconditioner=None,
        b=row,
        damping=0.0,
        tolerance=rtol * length,
        target=max(rtol, eps) * length,
        eps=eps,
        measure=False,
        symmetric=max(SYMMETRIC, 10 * eps, rtol),
    )


def _solved(method: Method[Any, Any], products: Products, room: int) -> tuple[Any, ...]:
    """Return the columns of a solver that stops at its tolerance or after ``room`` products."""
    state, begun = method.init(products, 0), products.matvecs
    while (left := room - (products.matvecs - begun)) > 0:
        before = products.matvecs
        if method.verdict(state, products, left) is not None:
            break
        state = method.step(state, products, left)
        if products.matvecs == before:
            break
    columns: tuple[Any, ...] = state
    return columns


def _indefinite(square: float) -> ValueError:
    return ValueError(
        f"`metric` is not positive definite: a vector v has v'Bv = {square:.1e} up to its length; "
        "pass the matvec of a positive definite B, such as `shift(ggn, 1e-3)`"
    )
