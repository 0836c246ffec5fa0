"""Estimators by random probes, with all unit vectors in their place where these cost less."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from hessfunc.algorithms.driver import RUNNING, Method, RunOptions, run_method, store_of
from hessfunc.algorithms.exact import exact_diagonal, exact_trace, random_budget, unit_vectors_left
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import (
    DiagonalEstimate,
    Estimate,
    Result,
    close_enough,
    judged,
    narrow_enough,
    settled,
)
from hessfunc.algorithms.statistics import STOPPED
from hessfunc.options import at_least
from hessfunc.spaces.space import Space

State = TypeVar("State")
AnyResult = TypeVar("AnyResult", bound=Result)
Exact_co = TypeVar("Exact_co", bound=Result, covariant=True)


class _Exact(Protocol[Exact_co]):
    """Estimator from all unit vectors, as `exact_trace`."""

    def __call__(
        self, products: Products, seed: int, /, *, max_matvecs: int, block_size: int
    ) -> Exact_co: ...


@dataclass(frozen=True, kw_only=True)
class Probing(Method[State, AnyResult]):
    """Estimator from random probes.

    Attributes:
        block_size: Number of vectors that are multiplied at once.
        rtol: Relative tolerance at which the run stops.
        most: Number of probes for which memory suffices, or None for a method that keeps none.
        fewest: Number of probes below which an interval does not stop a run.
    """

    block_size: int
    rtol: float | None
    most: int | None = None

    changeable: ClassVar = frozenset({"rtol", "atol", "most"})
    fewest: ClassVar[int] = 10
    keeps_none: ClassVar[str]

    def __post_init__(self) -> None:
        at_least(0, rtol=self.rtol)
        at_least(1, block_size=self.block_size)

    @property
    def has_tolerance(self) -> bool:
        """Whether the run stops before its budget is exhausted."""
        return self.rtol is not None

    @property
    def widening(self) -> float:
        """Factor of standard errors; a run with a tolerance stops where its error looks small."""
        return STOPPED if self.has_tolerance else 1.0

    @abstractmethod
    def count(self, state: State, /) -> int:
        """Return the number of probes so far."""

    @abstractmethod
    def estimate(self, state: State, space: Space, cost: Cost, /) -> AnyResult:
        """Return the estimate, whether or not it is within the tolerance."""

    @abstractmethod
    def reached(self, estimate: AnyResult, /) -> str | None:
        """Return the reason for which an estimate need not be refined, or None."""

    @abstractmethod
    def judged(self, estimate: AnyResult, /) -> AnyResult:
        """Return the last estimate, which has converged if its own interval says so."""

    def verdict(self, state: State, products: Products, room: int, /) -> str | None:
        if self.most is not None and self.count(state) >= self.most:
            return f"no more than {self.most} probes fit in memory: `{self.keeps_none}` keeps none"
        if self.count(state) < self.fewest or not self.has_tolerance:
            return None
        return self.reached(self.estimate(state, products.space, products.cost(RUNNING, None)))

    def result(self, state: State, space: Space, cost: Cost, /) -> AnyResult:
        estimate = self.estimate(state, space, cost)
        return estimate if cost["reason"] == RUNNING else self.judged(estimate)


@dataclass(frozen=True, kw_only=True)
class TraceProbing(Probing[State, Estimate]):
    """Estimator of a trace.

    Attributes:
        atol: Absolute tolerance at which the run stops.
    """

    atol: float | None

    keeps_none: ClassVar[str] = "hutchinson"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, atol=self.atol)

    @property
    def has_tolerance(self) -> bool:
        return self.rtol is not None or self.atol is not None

    def reached(self, estimate: Estimate, /) -> str | None:
        return narrow_enough(estimate, self.rtol, self.atol)

    def judged(self, estimate: Estimate, /) -> Estimate:
        return judged(estimate, self.rtol, self.atol)


@dataclass(frozen=True, kw_only=True)
class DiagonalProbing(Probing[State, DiagonalEstimate]):
    """Estimator of a diagonal."""

    keeps_none: ClassVar[str] = "hutchinson_diagonal"

    def reached(self, estimate: DiagonalEstimate, /) -> str | None:
        return close_enough(estimate, self.rtol)

    def judged(self, estimate: DiagonalEstimate, /) -> DiagonalEstimate:
        return settled(estimate, self.rtol)


def run_trace(
    method: TraceProbing[State],
    products: Products,
    run: RunOptions,
    /,
    *,
    max_matvecs: int,
    exact: _Exact[Estimate] = exact_trace,
) -> Estimate:
    """Run an estimator of a trace, or multiply all unit vectors where these cost less."""
    return _run(method, products, run, max_matvecs, exact)


def run_diagonal(
    method: DiagonalProbing[State], products: Products, run: RunOptions, /, *, max_matvecs: int
) -> DiagonalEstimate:
    """Run an estimator of a diagonal, or multiply all unit vectors where these cost less."""
    return _run(method, products, run, max_matvecs, exact_diagonal)


def _run(
    method: Probing[State, AnyResult],
    products: Products,
    run: RunOptions,
    max_matvecs: int,
    exact: _Exact[AnyResult],
) -> AnyResult:
    random = random_budget(products, max_matvecs, tolerance=method.has_tolerance)
    if random:
        estimate = run_method(method, products, run, max_matvecs=random)
        if not unit_vectors_left(products, max_matvecs, random, estimate.reason):
            return estimate
        seed = estimate.seed
    else:
        seed = store_of(method, products, run).seed
    assert seed is not None
    return method.judged(
        exact(products, seed, max_matvecs=max_matvecs, block_size=method.block_size)
    )
