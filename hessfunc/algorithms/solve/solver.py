"""Common part of the methods for ``(A + damping I) x = b``: iterate, measure, restart.

Each right-hand side is a column with its own recurrence. A column is a coroutine that yields the
vectors that it needs products with, so that one call of the matvec serves all columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Columns
from hessfunc.algorithms.driver import Method
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Solution
from hessfunc.algorithms.solve.system import AnyIterate, Iterate, Steps, System, finite_rows
from hessfunc.algorithms.symmetry import asymmetry_named
from hessfunc.numerics import rounding
from hessfunc.spaces.space import Space
from hessfunc.trees import Made, Tree

# Largest number of products in a round of a column.
_STEPS_A_ROUND = 4


@dataclass(frozen=True, kw_only=True)
class Solver(Method[tuple[AnyIterate, ...], Solution]):
    """Method for linear systems with one matrix that iterates, measures and restarts.

    The state is a tuple with the state of each column.

    Attributes:
        systems: Systems to be solved, one per column, with the products of the run.
        start: Start vectors, a tree like the right-hand sides; None for zero.
        is_block: Whether the right-hand sides are a block, and not one vector.
    """

    systems: tuple[System, ...]
    start: Tree | None = None
    is_block: bool = False

    is_random: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        system = self.systems[0]
        return {
            "b": Columns(torch.cat([each.b for each in self.systems])),
            "damping": system.damping,
            "preconditioned": system.preconditioner is not None,
            "measure": system.measure,
            "start": self.start,
        }

    @abstractmethod
    def first(self, begun: Iterate, /) -> AnyIterate:
        """Return the state of a column that begins at this iterate."""

    @abstractmethod
    def iterate(self, system: System, state: AnyIterate, /) -> Steps[AnyIterate]:
        """Return the state after one product, restarted if the residual was measured."""

    @abstractmethod
    def obstacle(self, system: System, state: AnyIterate, /) -> str:
        """Return the reason why a stopped state allows no further step."""

    def direction(self, state: tuple[AnyIterate, ...], /) -> Tensor | None:
        """Return a row p with p'(A + damping I)p <= 0 that a column has met, or None."""
        return None

    def init(self, products: Products, seed: int, /) -> tuple[AnyIterate, ...]:
        starts: list[Tensor | None] = [None] * len(self.systems)
        if self.start is not None:
            rows = finite_rows(products.space, self.start, "start", is_block=self.is_block)
            if len(rows) != len(starts):
                raise ValueError(
                    f"start is a block of {len(rows)} vectors, and b a block of {len(starts)}: "
                    "pass one start vector per right-hand side"
                )
            starts = list(rows.split(1))
        columns = zip(self.systems, starts, strict=True)
        begun = together((system.begin(start) for system, start in columns), products)
        return tuple(map(self.first, begun))

    def step(
        self, state: tuple[AnyIterate, ...], products: Products, room: int, /
    ) -> tuple[AnyIterate, ...]:
        active = [i for i, column in enumerate(state) if self._verdict(i, column) is None]
        # Columns that need a product for their measurement come first if some get none.
        active.sort(key=lambda i: state[i].measured)
        shares = [(room + place) // len(active) for place in reversed(range(len(active)))]
        columns = (self._round(i, state[i], share) for i, share in zip(active, shares, strict=True))
        after = dict(zip(active, together(columns, products), strict=True))
        return tuple(after.get(i, column) for i, column in enumerate(state))

    def _round(self, i: int, state: AnyIterate, room: int) -> Steps[AnyIterate]:
        """Return the state of a column after at most ``room`` products."""
        system = self.systems[i]
        for left in range(room, max(room - _STEPS_A_ROUND, 0), -1):
            # The last product is reserved for the measurement.
            over = left == 1 or state.inexact or state.stopped
            if over or state.length <= system.target:
                if state.measured or system.settled(state):
                    return state
                return (yield from _measure(system, state))
            state = yield from self.iterate(system, state)
        return state

    def verdict(
        self, state: tuple[AnyIterate, ...], products: Products, room: int, /
    ) -> str | None:
        reasons = [self._verdict(i, column) for i, column in enumerate(state)]
        known = [reason for reason in reasons if reason is not None]
        return _of_all(known) if len(known) == len(reasons) else None

    def _verdict(self, i: int, state: AnyIterate) -> str | None:
        """Return the reason to stop a column, or None to continue."""
        system = self.systems[i]
        if system.settled(state):
            residual = "residual" if state.measured else "residual of the recurrence"
            return f"converged: the {residual} is within the tolerance"
        if not state.measured:
            return None
        if state.hidden:
            return _rounding_hides(system, state)
        return self.obstacle(system, state) if state.stopped else None

    def finish(
        self, state: tuple[AnyIterate, ...], products: Products, reason: str, room: int, /
    ) -> tuple[tuple[AnyIterate, ...], str]:
        columns = (self._finished(i, column, reason) for i, column in enumerate(state))
        state = together(columns, products)
        return state, _of_all([column.reason for column in state])

    def _finished(self, i: int, state: AnyIterate, reason: str) -> Steps[AnyIterate]:
        """Return the state of a column with its reason, after a measurement if necessary."""
        system = self.systems[i]
        reason = self._verdict(i, state) or reason
        if not (state.measured or system.settled(state)):
            state = yield from _measure(system, state)
        if system.settled(state):
            reason = self._verdict(i, state) or reason
        elif cause := _cause(system, state):
            reason = cause if state.hidden else f"{reason}; {cause}"
        return replace(state, reason=reason)

    def result(self, state: tuple[AnyIterate, ...], space: Space, cost: Cost, /) -> Solution:
        columns = list(zip(self.systems, state, strict=True))
        rows, direction = torch.cat([column.x for column in state]), self.direction(state)
        return Solution(
            x=space.unravel(rows if self.is_block else rows[0]),
            residuals=torch.tensor(
                [system.bound(column) for system, column in columns],
                dtype=torch.float64,
                device="cpu",
            ),
            solved=torch.tensor(
                [system.settled(column) for system, column in columns],
                dtype=torch.bool,
                device="cpu",
            ),
            reasons=tuple(
                column.reason or self._verdict(i, column) or cost["reason"]
                for i, column in enumerate(state)
            ),
            negative_curvature=None if direction is None else space.unravel(direction[0]),
            **cost,
        )


def _of_all(reasons: list[str]) -> str:
    """Return the reason of a run from those of its columns."""
    if len(reasons) == 1:
        return reasons[0]
    other = next((i for i, each in enumerate(reasons) if not each.startswith("converged")), None)
    if other is None:
        return f"converged: all {len(reasons)} residuals are within their tolerances"
    count = sum(each.startswith("converged") for each in reasons)
    return f"{count} of {len(reasons)} columns converged; column {other}: {reasons[other]}"


def _cause(system: System, state: Iterate) -> str | None:
    """Return why the products are not those of a symmetric matrix, or None if they are."""
    if not system.last:
        return None
    return asymmetry_named(
        system.products,
        system.last[0][0],
        state.asymmetry,
        state.largest,
        eps=system.eps,
        rtol=system.tolerance / float(system.space.norms(system.b)),
    )


def _measure(system: System, state: AnyIterate) -> Steps[AnyIterate]:
    """Return the state with a measured residual, from which the run stops or restarts."""
    x, residual, length = yield from system.measured(state.x)
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


def together(columns: Iterable[Steps[Made]], products: Products, /) -> tuple[Made, ...]:
    """Run the coroutines of all columns, with common products, and return their results.

    Args:
        columns: Coroutines, one per column.
        products: Products with A. Columns that wait for a preconditioner are served first, so that
            all columns wait when A is multiplied.
    """
    running = list(columns)
    made: dict[int, Made] = {}
    waiting: dict[int, tuple[Products, Tensor]] = {}

    def advance(i: int, image: Tensor | None) -> None:
        try:
            # A coroutine is started by sending None.
            waiting[i] = running[i].send(image)  # type: ignore[arg-type]
        except StopIteration as end:
            made[i] = end.value

    for i in range(len(running)):
        advance(i, None)
    while waiting:
        matrices = [matrix for matrix, _ in waiting.values()]
        turn = next((matrix for matrix in matrices if matrix is not products), products)
        served = [i for i, (matrix, _) in waiting.items() if matrix is turn]
        rows = [waiting.pop(i)[1] for i in served]
        images = turn(rows[0] if len(rows) == 1 else torch.cat(rows)).split(1)
        for i, image in zip(served, images, strict=True):
            advance(i, image)
    return tuple(made[i] for i in range(len(running)))
