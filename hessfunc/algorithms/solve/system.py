"""Common part of the methods for ``(A + damping I) x = b``: iterate, measure, restart."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hessfunc.algorithms.driver import Method
from hessfunc.algorithms.products import Cost, Products, refuse_infinite
from hessfunc.algorithms.results import Solution
from hessfunc.algorithms.symmetry import SYMMETRIC, asymmetry_named, refuse_unless_rounding
from hessfunc.numerics import rounding
from hessfunc.options import at_least
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Largest number of products in a round.
_STEPS_A_ROUND = 4


@dataclass(frozen=True, kw_only=True)
class System:
    """Linear system ``(A + damping I) x = b`` in flat rows.

    Attributes:
        products: Counted products with A.
        preconditioner: Products with a matrix close to the inverse of A + damping I; None for I.
        b: Right-hand side, ``(1, n)``.
        damping: Number that is added to the diagonal of A.
        tolerance: Largest 2-norm of the residual of a solution.
        target: Residual at which a recurrence stops, at least eps |b|.
        eps: Relative rounding of the products.
        measure: Whether a product always measures the residual of a solution.
        symmetric: Largest difference of u'Av and v'Au that is let through, in units of |A|.
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

    @classmethod
    def of(
        cls,
        matvec: Matvec,
        b: Tree,
        damping: float,
        preconditioner: Matvec | None,
        rtol: float,
        atol: float,
        *,
        space: Space | None = None,
        measure: bool = True,
    ) -> System:
        at_least(0, rtol=rtol, atol=atol)
        if not math.isfinite(damping):
            raise ValueError(f"damping={damping}: it must be finite")
        products = Products.of(matvec, b, space)
        space = products.space
        row = _finite_row(space, b, "b")
        length = float(space.norms(row))
        eps = products_eps(space, row.dtype)
        tolerance = max(rtol * length, atol)
        return cls(
            products=products,
            preconditioner=None if preconditioner is None else Products(preconditioner, space),
            b=row,
            damping=damping,
            tolerance=tolerance,
            target=max(tolerance, eps * length),
            eps=eps,
            measure=measure,
            # The residual is measured, so that a loose tolerance allows less accurate products.
            symmetric=max(SYMMETRIC, 10 * eps, tolerance / length if length else 0.0),
        )

    @property
    def space(self) -> Space:
        return self.products.space

    def product(self, rows: Tensor, /) -> Tensor:
        """Return the products of rows with A + damping I."""
        return self.products(rows) + self.damping * rows

    def preconditioned(self, row: Tensor, /) -> tuple[Tensor, float]:
        """Return ``M r`` and ``r'Mr``, with M the preconditioner."""
        if self.preconditioner is None:
            return row, float(self.space.norms(row)) ** 2
        image = self.preconditioner(row)
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
        before, self.products.last = self.products.last, (row, image, length)
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
        return replace(state, asymmetry=max(state.asymmetry, difference), rounded=tolerance)

    def begin(self, start: Tree | None, /) -> Iterate:
        """Return the start and its residual."""
        x, residual = torch.zeros_like(self.b), self.b
        # For b = 0 the solution is zero, without a product.
        if start is not None and bool(self.space.norms(self.b) > 0):
            x = _finite_row(self.space, start, "start")
            if bool(self.space.norms(x) > 0):
                x, residual, _ = self.measured(x)
        length, path = self.space.norms(torch.cat([residual, x])).tolist()
        origin = (x, residual)
        return Iterate(
            x=x, residual=residual, length=length, first=length, origin=origin, path=path
        )

    def measured(self, x: Tensor, /) -> tuple[Tensor, Tensor, float]:
        """Return x rounded to the dtypes of the result, its measured residual, and the length."""
        x = self.space.ravel(self.space.unravel(x), dtype=x.dtype)
        residual = self.b - self.product(x)
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

    def solution(self, state: Iterate, cost: Cost, direction: Tensor | None = None) -> Solution:
        """Return the result, with a direction of negative curvature if there is one."""
        return Solution(
            x=self.space.unravel(state.x[0]),
            residual=self.bound(state),
            converged=self.settled(state),
            negative_curvature=None if direction is None else self.space.unravel(direction[0]),
            **cost,
        )


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


AnyIterate = TypeVar("AnyIterate", bound=Iterate)


@dataclass(frozen=True, kw_only=True)
class Solver(Method[AnyIterate, Solution]):
    """Method for a linear system that iterates, measures and restarts.

    Attributes:
        system: System to be solved, with the products of the run.
        start: Start vector as a tree; None for zero.
    """

    system: System
    start: Tree | None = None

    is_random: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        system = self.system
        return {
            "b": system.space.unravel(system.b[0]),
            "damping": system.damping,
            "preconditioned": system.preconditioner is not None,
            "measure": system.measure,
            "start": self.start,
        }

    @abstractmethod
    def iterate(self, state: AnyIterate, /) -> AnyIterate:
        """Return the state after one product, restarted if the residual was measured."""

    @abstractmethod
    def obstacle(self, state: AnyIterate, /) -> str:
        """Return the reason why a stopped state allows no further step."""

    def step(self, state: AnyIterate, products: Products, room: int, /) -> AnyIterate:
        system = self.system
        for left in range(room, max(room - _STEPS_A_ROUND, 0), -1):
            # The last product is reserved for the measurement.
            over = left == 1 or state.inexact or state.stopped
            if over or state.length <= system.target:
                return state if state.measured or system.settled(state) else _measure(system, state)
            state = self.iterate(state)
        return state

    def verdict(self, state: AnyIterate, products: Products, room: int, /) -> str | None:
        system = self.system
        if system.settled(state):
            residual = "residual" if state.measured else "residual of the recurrence"
            return f"converged: the {residual} is within the tolerance"
        if not state.measured:
            return None
        if state.hidden:
            return _rounding_hides(system, state)
        return self.obstacle(state) if state.stopped else None

    def finish(
        self, state: AnyIterate, products: Products, reason: str, room: int, /
    ) -> tuple[AnyIterate, str]:
        system = self.system
        if not (state.measured or system.settled(state)):
            state = _measure(system, state)
        if not system.settled(state) and (cause := _cause(system, state)):
            reason = cause if state.hidden else f"{reason}; {cause}"
        return state, reason

    def result(self, state: AnyIterate, space: Space, cost: Cost, /) -> Solution:
        return self.system.solution(state, cost)


def _cause(system: System, state: Iterate) -> str | None:
    """Return why the products are not those of a symmetric matrix, or None if they are."""
    if system.products.last is None:
        return None
    return asymmetry_named(
        system.products,
        system.products.last[0],
        state.asymmetry,
        state.largest,
        eps=system.eps,
        rtol=system.tolerance / float(system.space.norms(system.b)),
    )


def _measure(system: System, state: AnyIterate) -> AnyIterate:
    """Return the state with a measured residual, from which the run stops or restarts."""
    x, residual, length = system.measured(state.x)
    excess = length - system.tolerance
    stuck = state.length <= system.target and excess > (state.first - system.tolerance) / 2
    stopped = state.stopped
    if state.again and length > state.first:
        (x, residual), length = state.origin, state.first
        stopped = stopped or state.inexact
    sizes = system.space.norms(torch.cat([system.b, state.largest * x]))
    alone = stopped and length <= rounding(system.eps, float(sizes.sum()))
    return replace(
        state,
        x=x,
        residual=residual,
        length=length,
        first=length,
        measured=True,
        inexact=False,
        stopped=stopped,
        hidden=excess > 0 and (stuck or alone or length <= system.target),
        origin=(x, residual),
        again=True,
    )


def _rounding_hides(system: System, state: Iterate) -> str:
    # The remaining residual is the rounding of the products, which may be in low precision.
    sizes = system.space.norms(torch.cat([system.b, state.largest * state.x]))
    eps = max(system.eps, state.length / float(sizes.sum()))
    return (
        f"the rounding of the products hides the tolerance: the residual is {state.length:.1e}, "
        f"and cannot reach {system.tolerance:.1e} with products rounded to {eps:.0e}; "
        "take a looser rtol, or float64"
    )


def _finite_row(space: Space, tree: Tree, what: str) -> Tensor:
    leaves = [leaf.detach()[None] for leaf in space.tree_leaves(tree)]
    row = space.ravel_leaves(leaves, dtype=rows_dtype(space))
    refuse_infinite(space, row, what, ValueError)
    return row
