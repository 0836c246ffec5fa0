"""Estimators from random probes, replaced by all unit vectors if these cost less."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar, get_args

from torch import Tensor

from hessfunc.algorithms.driver import RUNNING, Method, RunOptions, reported, run_method, store_of
from hessfunc.algorithms.exact import exact_diagonal, exact_trace, random_budget, unit_vectors_left
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import DiagonalEstimate, Estimate, Result
from hessfunc.algorithms.results.diagonal import close_enough
from hessfunc.algorithms.results.estimate import Confidence, leaf_fields, narrow_enough
from hessfunc.algorithms.results.result import judged
from hessfunc.algorithms.statistics import STOPPED, leaf_errors, rounding_of_sum
from hessfunc.algorithms.symmetry import refuse_asymmetric_forms
from hessfunc.display import Report
from hessfunc.options import at_least
from hessfunc.spaces.space import Rows, Space, products_eps

State = TypeVar("State")
AnyResult = TypeVar("AnyResult", bound=Result)
AnyKept = TypeVar("AnyKept", bound="_Kept")
Exact_co = TypeVar("Exact_co", bound=Result, covariant=True)


class _Exact(Protocol[Exact_co]):
    """Exact function of a matrix from all unit vectors, such as `exact_trace`."""

    def __call__(
        self,
        products: Products,
        seed: int,
        /,
        *,
        max_matvecs: int,
        block_size: int,
        report: Report | None,
    ) -> Exact_co: ...


@dataclass(frozen=True, kw_only=True)
class Probing(Method[State, AnyResult]):
    """Estimator from random probes.

    Attributes:
        block_size: Number of vectors that are multiplied at once.
        rtol: Relative tolerance at which the run stops.
        most: Largest number of probes that fit in memory, or None for a method that keeps none.
        fewest: Number of probes below which an interval does not stop a run.
        keeps_none: Name of the function that estimates the same number without keeping probes.
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
        """Whether the run may stop before its budget is exhausted."""
        return self.rtol is not None

    @property
    def widening(self) -> float:
        """Factor of standard errors: 1.1 for a run with a tolerance, else 1."""
        return STOPPED if self.has_tolerance else 1.0

    @abstractmethod
    def count(self, state: State, /) -> int:
        """Return the number of probes so far."""

    def kept(self, state: State, /) -> int:
        """Return the number of vectors in memory of which ``most`` is the limit."""
        return self.count(state)

    @abstractmethod
    def estimate(self, state: State, space: Space, cost: Cost, /) -> AnyResult:
        """Return the estimate, whether or not it is within the tolerance."""

    @abstractmethod
    def reached(self, estimate: AnyResult, /) -> str | None:
        """Return the reason to stop at an estimate that reaches the tolerance, or None."""

    def verdict(self, state: State, products: Products, room: int, /) -> str | None:
        if self.most is not None and self.kept(state) >= self.most:
            return (
                f"no more than {self.most} probes fit in memory: take `{self.keeps_none}`, which "
                "keeps none"
            )
        if self.count(state) < self.fewest or not self.has_tolerance:
            return None
        return self.reached(self.estimate(state, products.space, products.cost(RUNNING, None)))

    def result(self, state: State, space: Space, cost: Cost, /) -> AnyResult:
        estimate = self.estimate(state, space, cost)
        return estimate if cost["reason"] == RUNNING else judged(estimate, self.reached(estimate))


class _Kept(Protocol):
    """State with all probes and their products."""

    @property
    def probes(self) -> Rows: ...

    @property
    def images(self) -> Rows: ...


class KeepsProbes:
    """Part of an estimator that keeps its probes, which shows whether the matrix is symmetric."""

    def count(self, state: _Kept, /) -> int:
        """Return the number of probes so far."""
        return len(state.probes)

    def finish(
        self, state: AnyKept, products: Products, reason: str, room: int, /
    ) -> tuple[AnyKept, str]:
        """Return the last state and the reason, after a check of the symmetry of the matvec.

        Raises:
            ValueError: If the matvec is not symmetric or not deterministic.
        """
        refuse_asymmetric_forms(products, state.probes, state.images)
        return state, reason


@dataclass(frozen=True, kw_only=True)
class TraceProbing(Probing[State, Estimate]):
    """Estimator of a trace.

    Attributes:
        atol: Absolute tolerance at which the run stops.
        confidence: Whether intervals hold at a fixed number of probes, or at all numbers together.
    """

    atol: float | None
    confidence: Confidence = "fixed"

    changeable: ClassVar = Probing.changeable | {"confidence"}
    keeps_none: ClassVar[str] = "hutchinson"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, atol=self.atol)
        if self.confidence not in get_args(Confidence):
            raise ValueError(
                f"confidence={self.confidence!r}: choose 'fixed', or 'anytime' for intervals that "
                "hold at all stops together"
            )

    @property
    def widening(self) -> float:
        # A confidence sequence holds wherever a run stops.
        return 1.0 if self.confidence == "anytime" else super().widening

    @property
    def has_tolerance(self) -> bool:
        return self.rtol is not None or self.atol is not None

    def reached(self, estimate: Estimate, /) -> str | None:
        return narrow_enough(estimate, self.rtol, self.atol)

    def mean_of(
        self,
        parts: Tensor,
        stderr: float,
        images: Rows,
        space: Space,
        cost: Cost,
        *,
        halves: float = 0.5,
    ) -> Estimate:
        """Return the mean of the estimates of single probes.

        Args:
            parts: Estimates of each probe by leaf, float64 ``(p, leaves)``.
            stderr: Standard error of the mean, without the rounding of the products.
            images: Products with random vectors, which give the Frobenius norm.
            space: Space of the vectors.
            cost: Cost of the run.
            halves: Factor of the rounding of products in 16 bits.
        """
        samples, squares = parts.sum(1), space.norms(images).cpu().double().square()
        rounding = rounding_of_sum(products_eps(space), halves=halves)
        stderr = (stderr + rounding * float(parts.abs().sum(1).mean())) * self.widening
        return Estimate(
            value=float(samples.mean()),
            stderr=stderr,
            degrees=len(samples),
            samples=samples,
            **leaf_fields(space, parts.mean(0), leaf_errors(parts, stderr)),
            squared_frobenius=squared_frobenius(squares, space, cost),
            **cost,
        )


@dataclass(frozen=True, kw_only=True)
class DiagonalProbing(Probing[State, DiagonalEstimate]):
    """Estimator of a diagonal."""

    keeps_none: ClassVar[str] = "hutchinson_diagonal"

    def reached(self, estimate: DiagonalEstimate, /) -> str | None:
        return close_enough(estimate, self.rtol)


def run_trace(
    method: TraceProbing[State],
    products: Products,
    run: RunOptions,
    /,
    *,
    max_matvecs: int,
    exact: _Exact[Estimate] = exact_trace,
) -> Estimate:
    """Run an estimator of a trace, or multiply all unit vectors if they cost less.

    Args:
        method: Estimator with its options.
        products: Products of the run.
        run: Options of the run.
        max_matvecs: Budget of matvecs.
        exact: Function that computes the trace from all unit vectors.
    """
    return _run(method, products, run, max_matvecs, exact)


def run_diagonal(
    method: DiagonalProbing[State], products: Products, run: RunOptions, /, *, max_matvecs: int
) -> DiagonalEstimate:
    """Run an estimator of a diagonal, or multiply all unit vectors if they cost less."""
    return _run(method, products, run, max_matvecs, exact_diagonal)


def _run(
    method: Probing[State, AnyResult],
    products: Products,
    run: RunOptions,
    max_matvecs: int,
    exact: _Exact[AnyResult],
) -> AnyResult:
    """Run random probes, all unit vectors, or first random probes and then all unit vectors."""
    random = random_budget(products, max_matvecs, tolerance=method.has_tolerance)
    if random:
        estimate = run_method(method, products, run, max_matvecs=random)
        if not unit_vectors_left(products, max_matvecs, random, estimate.reason):
            return estimate
        seed = estimate.seed
    else:
        seed = store_of(method, products, run).seed
    assert seed is not None
    total = products.matvecs + products.space.n
    with reported(products, run, "all unit vectors", total) as report:
        estimate = exact(
            products,
            seed,
            max_matvecs=max_matvecs,
            block_size=method.block_size,
            report=report,
        )
    return judged(estimate, method.reached(estimate))
