"""Linear system of one right-hand side, in flat rows, and the iterate that all methods share."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from hessfunc.algorithms.products import LIMITS, Products, refuse_infinite, refuse_scale
from hessfunc.algorithms.symmetry import SYMMETRIC, refuse_unless_rounding
from hessfunc.numerics import rounding
from hessfunc.options import at_least
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Made, Matvec, Tree

# Coroutine of a column. It yields a matrix and a vector ``(1, n)``, and receives their product.
Steps: TypeAlias = Generator[tuple[Products, Tensor], Tensor, Made]


@dataclass(frozen=True, kw_only=True)
class System:
    """Linear system ``(A + damping I) x = b`` of one column, in flat rows.

    Attributes:
        products: Counted products with A, of all columns.
        preconditioner: Products with a matrix close to the inverse of A + damping I; None for I.
        b: Right-hand side, ``(1, n)``.
        damping: Number that is added to the diagonal of A.
        tolerance: Largest 2-norm of the residual of a solution.
        target: Residual at which a recurrence stops, at least eps |b|.
        eps: Relative rounding of the products.
        measure: Whether a product always measures the residual of a solution.
        symmetric: Largest difference of u'Av and v'Au that is let through, in units of |A|.
        last: Last vector, its product and its length, for the test of symmetry; empty at first.
    """

    products: Products
    preconditioner: Products | None
    b: Tensor
    damping: float
    tolerance: float
    target: float
    eps: float
    measure: bool
    symmetric: float
    last: deque[tuple[Tensor, Tensor, float]] = field(default_factory=partial(deque, maxlen=1))

    @classmethod
    def each(
        cls,
        matvec: Matvec,
        b: Tree,
        damping: float,
        preconditioner: Matvec | None,
        rtol: float,
        atol: float,
        *,
        like: Tree | None = None,
        space: Space | None = None,
        measure: bool = True,
    ) -> tuple[System, ...]:
        """Return the systems of all right-hand sides, with the arguments of `cg`."""
        at_least(0, rtol=rtol, atol=atol)
        if not math.isfinite(damping):
            raise ValueError(f"damping={damping}: it must be finite")
        products = Products.of(matvec, b if like is None else like, space)
        space = products.space
        others = None if preconditioner is None else Products(preconditioner, space)
        rows = finite_rows(space, b, "b", is_block=like is not None)
        eps = products_eps(space, rows.dtype)

        def of(row: Tensor) -> System:
            length = float(space.norms(row))
            tolerance = max(rtol * length, atol)
            return cls(
                products=products,
                preconditioner=others,
                b=row,
                damping=damping,
                tolerance=tolerance,
                target=max(tolerance, eps * length),
                eps=eps,
                measure=measure,
                # The residual is measured, so a loose tolerance allows less accurate products.
                symmetric=max(SYMMETRIC, 10 * eps, tolerance / length if length else 0.0),
            )

        return tuple(map(of, rows.split(1)))

    @property
    def space(self) -> Space:
        return self.products.space

    def product(self, row: Tensor, /) -> Steps[Tensor]:
        """Return the product of a row with A + damping I."""
        image = yield self.products, row
        return image + self.damping * row

    def preconditioned(self, row: Tensor, /) -> Steps[tuple[Tensor, float]]:
        """Return ``M r`` and ``r'Mr``, with M the preconditioner."""
        if self.preconditioner is None:
            return row, float(self.space.norms(row)) ** 2
        image = yield self.preconditioner, row
        square = float(self.space.gram(row, image))
        if not square > 0 and (length := float(self.space.norms(row))):
            raise ValueError(
                f"the preconditioner is not positive definite: r'Mr = {square:.1e} for a residual "
                f"of length {length:.1e}; omit `preconditioner`, or make it positive definite"
            )
        return image, square

    def compared(
        self, state: AnyIterate, row: Tensor, image: Tensor, length: float, /
    ) -> AnyIterate:
        """Return the state after a test of symmetry on two successive products.

        For a symmetric A, u'Av = v'Au. The test makes no product unless it fails.

        Args:
            state: State of the run.
            row: Vector v, ``(1, n)``.
            image: Product with v.
            length: Length of v.
        """
        # The last product is not part of the state: a resumed run tests one product later.
        before = self.last[0] if self.last else None
        self.last.append((row, image, length))
        if before is None or not state.largest:
            return state
        forms = self.space.gram(before[0], image) - self.space.gram(row, before[1])
        difference = abs(float(forms)) / (before[2] * length)
        tolerance = refuse_unless_rounding(
            self.products,
            row,
            difference,
            state.largest,
            max(self.symmetric, state.rounded),
        )
        if difference <= state.asymmetry and tolerance == state.rounded:
            return state
        return replace(state, asymmetry=max(state.asymmetry, difference), rounded=tolerance)

    def begin(self, start: Tensor | None, /) -> Steps[Iterate]:
        """Return the start, a row, and its residual."""
        x, residual = torch.zeros_like(self.b), self.b
        # For b = 0 the solution is zero, without a product.
        if start is not None and bool(self.space.norms(self.b) > 0):
            x = start
            if bool(self.space.norms(x) > 0):
                x, residual, _ = yield from self.measured(x)
        length, path = self.space.norms(torch.cat([residual, x])).tolist()
        origin = (x, residual)
        return Iterate(
            x=x, residual=residual, length=length, first=length, origin=origin, path=path
        )

    def measured(self, x: Tensor, /) -> Steps[tuple[Tensor, Tensor, float]]:
        """Return x rounded to the dtypes of the result, its measured residual, and the length."""
        x = self.space.ravel(self.space.unravel(x), dtype=x.dtype)
        residual = self.b - (yield from self.product(x))
        return x, residual, float(self.space.norms(residual))

    def settled(self, state: Iterate, /) -> bool:
        """Return whether the residual is known to be within the tolerance, without a product."""
        if state.measured:
            return state.length <= self.tolerance
        return not self.measure and self.bound(state) <= self.tolerance

    def bound(self, state: Iterate, /) -> float:
        """Return a bound of the residual that includes the rounding of all products behind it."""
        drift = 0.0 if state.measured else rounding(self.eps, state.largest) * state.path
        return state.length + drift


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """Common part of the states of all methods.

    Attributes:
        x: Iterate, ``(1, n)``.
        residual: Residual of x, from a product if ``measured``, otherwise from the recurrence.
        length: Length of the residual.
        first: Length of the residual with which the recurrence began.
        origin: Iterate and residual with which the recurrence began.
        measured: Whether a product gave the residual, so that the recurrence restarts.
        inexact: Whether the recurrence has lost its accuracy and should restart.
        stopped: Whether the method has met an obstacle.
        hidden: Whether rounding hides the tolerance.
        again: Whether the recurrence has restarted at least once.
        largest: Length of the longest product with a unit vector.
        path: Length of the first x plus the lengths of all steps.
        asymmetry: Largest difference of u'Av and v'Au so far, for unit vectors.
        rounded: Measured difference that the rounding of products explains, in units of |A|.
        reason: Reason for which the column has stopped; empty while the run lasts.
    """

    x: Rows = field(metadata=DIVIDED)
    residual: Rows = field(metadata=DIVIDED)
    length: float
    first: float
    origin: tuple[Rows, Rows] = field(metadata=DIVIDED)
    measured: bool = True
    inexact: bool = False
    stopped: bool = False
    hidden: bool = False
    again: bool = False
    largest: float = 0.0
    path: float = 0.0
    asymmetry: float = 0.0
    rounded: float = 0.0
    reason: str = ""


AnyIterate = TypeVar("AnyIterate", bound=Iterate)


def finite_rows(space: Space, tree: Tree, what: str, /, *, is_block: bool) -> Tensor:
    """Return the rows of a block, or the row of one vector, after checking them."""
    checked = space.block_leaves(tree) if is_block else space.tree_leaves(tree)
    leaves = [leaf.detach() if is_block else leaf.detach()[None] for leaf in checked]
    if not len(leaves[0]):
        raise ValueError(f"{what} is a block of no vectors: pass at least one")
    rows = space.ravel_leaves(leaves, dtype=rows_dtype(space))
    refuse_infinite(space, rows, what)
    largest = float(space.norms(rows).max())
    remedy = "multiply it by {}, and divide the solution by this number"
    refuse_scale(largest, LIMITS, what, remedy)
    return rows
