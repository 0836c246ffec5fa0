"""Traces of functions of a matrix to a tolerance, with steps and probes chosen during the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.density import quadrature
from hessfunc.algorithms.driver import RUNNING, Method, RunOptions, run_method
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.recurrences import WORKSPACE, Recurrence, Recurrences, extended
from hessfunc.algorithms.results import Density, Estimate
from hessfunc.algorithms.results.estimate import narrow_enough, scaled
from hessfunc.algorithms.results.result import judged
from hessfunc.algorithms.statistics import STOPPED, student_quantile
from hessfunc.options import at_least, finite, real, validated
from hessfunc.spaces.space import Space, available_to, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of steps after which the estimate is looked at again, as a share of the steps so far.
_PACE = 0.1
# Share of the tolerance that the bounds of the quadrature may take; the probes have the rest.
_QUADRATURE = 0.2
# Share of the half-width of the last round below which further steps still make it smaller.
_SETTLED = 0.9


@validated(smallest=real, largest=real)
def trace_of_function(
    matvec: Matvec,
    f: Callable[[Tensor], Tensor],
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    smallest: float | None = None,
    largest: float | None = None,
    max_matvecs: int = 200,
    **run: Unpack[RunOptions],
) -> Estimate:
    """Estimate tr f(A) of a symmetric matrix by stochastic Lanczos quadrature, to a tolerance.

        tr f(A) ~ n mean over probes of sum_j weights_j f(nodes_j)

    The first probe takes Lanczos steps until the bounds of its quadrature are a fifth of the
    tolerance, or of the error that the budget permits. The next probes, in blocks, take the same
    number of steps, and as many probes follow as the tolerance requires. If these would cost more
    than n products, the first probe continues to n steps instead, which give all eigenvalues.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> root = hf.trace_of_function(matvec, torch.sqrt, like, rtol=0.1, seed=0)
        >>> low, high = root.interval(0.95)
        >>> low <= A.diagonal().sqrt().sum() <= high
        tensor(True)

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric.
        f: Function of the eigenvalues, element by element, on float64 tensors of any shape.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        smallest: Lower bound of the eigenvalues, such as 0 for a Gauss-Newton matrix. By default it
            is estimated from the Ritz pairs, as in `Density.mean`.
        largest: Upper bound of the eigenvalues, by default estimated.
        max_matvecs: Budget, the largest number of matvecs.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate` with the ``bounds`` of the quadrature, as of `Density.mean`. Its reason is
        "converged" if and only if its 95 % interval is within the tolerance. Standard errors of a
        run with a tolerance are multiplied by 1.1, since such a run stops where its error happens
        to look small.

    Raises:
        ValueError: If an option is out of range, if f is not finite at a Ritz value, if a Ritz
            value lies outside of ``smallest`` and ``largest``, or if the matvec is not symmetric.
        FloatingPointError: If a product is not finite.

    Cost: at most ``max_matvecs`` matvecs. Memory: 3 steps + 3 vectors for the first probe, or 35 up
    to 32 steps. Later probes run in blocks, and their bases of ``steps`` vectors take at most a
    quarter of the memory.

    Source: Ubaru, Chen and Saad 2017; bounds: Golub and Meurant 2010; steps and probes: Chen,
    Trogdon and Ubaru 2021, arXiv 2105.06595.
    """
    return _sum(matvec, f, like, rtol, atol, (smallest, largest), False, max_matvecs, run)


@validated(smallest=real, damping=finite)
def logdet(
    matvec: Matvec,
    like: Tree,
    *,
    damping: float = 0.0,
    rtol: float | None = None,
    atol: float | None = None,
    smallest: float | None = None,
    max_matvecs: int = 200,
    **run: Unpack[RunOptions],
) -> Estimate:
    """Estimate log det(A + damping I) of a positive definite matrix, to a tolerance.

        log det(A + damping I) = tr log(A + damping I)

    The run chooses Lanczos steps and probes like `trace_of_function`. The quadrature is bounded by
    Gauss and Gauss-Radau rules (Golub and Meurant 2010), which need a lower bound of the
    eigenvalues: pass ``smallest=0`` with a damping for a Gauss-Newton matrix.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> result = hf.logdet(matvec, like, damping=0.0, smallest=1.0, rtol=0.1, seed=0)
        >>> low, high = result.interval(0.95)
        >>> low <= torch.linalg.slogdet(A).logabsdet <= high
        tensor(True)

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric, and A + damping I positive definite.
        like: Tree that shows the structure of a vector.
        damping: Number that is added to the eigenvalues.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        smallest: Lower bound of the eigenvalues of A. By default it is estimated from the Ritz
            pairs. The bounds are infinite while smallest + damping is not positive.
        max_matvecs: Budget, the largest number of matvecs.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate` with the ``bounds`` of the quadrature, as of `trace_of_function`.

    Raises:
        ValueError: If an option is out of range, if A + damping I has a Ritz value that is not
            positive, or if the matvec is not symmetric.
        FloatingPointError: If a product is not finite.

    Cost: as `trace_of_function`. Memory: as `trace_of_function`.

    Source: Ubaru, Chen and Saad 2017.
    """

    def log(values: Tensor) -> Tensor:
        return torch.log(values + damping)

    return _sum(matvec, log, like, rtol, atol, (smallest, None), True, max_matvecs, run)


def _sum(
    matvec: Matvec,
    f: Callable[[Tensor], Tensor],
    like: Tree,
    rtol: float | None,
    atol: float | None,
    ends: tuple[float | None, float | None],
    regular: bool,
    max_matvecs: int,
    run: RunOptions,
) -> Estimate:
    at_least(0, rtol=rtol, atol=atol)
    at_least(1, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    method = SpectralSum(
        f=f, rtol=rtol, atol=atol, ends=ends, regular=regular, max_matvecs=max_matvecs
    )
    return run_method(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class SpectralSum(Method["_State", Estimate]):
    """Stochastic Lanczos quadrature of tr f(A), to a tolerance.

    Attributes:
        f: Function of the eigenvalues.
        rtol: Relative tolerance, or None.
        atol: Absolute tolerance, or None.
        ends: Lower and upper bound of the eigenvalues, or None.
        regular: Whether the derivatives of f are known to keep their signs.
        max_matvecs: Budget.
    """

    f: Callable[[Tensor], Tensor]
    rtol: float | None
    atol: float | None
    ends: tuple[float | None, float | None]
    regular: bool
    max_matvecs: int

    changeable: ClassVar = frozenset({"f", "rtol", "atol", "ends", "regular", "max_matvecs"})

    def options(self) -> dict[str, Any]:
        return {}

    def init(self, products: Products, seed: int, /) -> _State:
        return _State(_begun(products.space, range(1), seed), (), seed)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, runs = products.space, state.runs
        if not runs.active:
            first = len(state.done) + len(runs.taken)
            count = self._probes(state, space, room)
            done = state.complete
            room_of_steps = 1 + max(len(alphas) for alphas, _ in done)
            indices = range(first, first + count)
            runs = _begun(space, indices, state.seed, workspace=room_of_steps)
            # The first probe has settled the spread of f for all.
            state = _State(runs, done, state.seed, before=0.0)
        # Later probes take as many steps as earlier ones before they are looked at.
        steps = max(1 + int(_PACE * len(runs)), state.known - len(runs))
        most = _most_steps(space)
        for _ in range(steps):
            if not runs.active or len(runs.active) > room:
                break
            room -= len(runs.active)
            runs = extended(products, runs, min(most, space.n))
        state = replace(state, runs=runs)
        if not runs.active:
            return state
        estimate = self._estimate(state, space)
        half = _half(estimate)
        # With few steps the range of the eigenvalues is uncertain, and with it the spread of f.
        settled = half >= _SETTLED * state.before
        if settled and self._resolved(state, estimate, space):
            runs = runs.ended(dict.fromkeys(runs.active, len(runs)))
        return replace(state, runs=runs, before=half)

    def _target(self, estimate: Estimate, steps: int) -> float:
        """Return the half-width to be reached, or the one that the budget permits."""
        if self.rtol is not None or self.atol is not None:
            return max((self.rtol or 0.0) * abs(estimate.value), self.atol or 0.0)
        # The budget pays for so many probes, whose half-width falls like their number to the -1/2.
        probes = max(1.0, self.max_matvecs / steps)
        return _half(estimate) * math.sqrt(len(estimate.samples) / probes)

    def _resolved(self, state: _State, estimate: Estimate, space: Space) -> bool:
        """Return whether the quadrature is accurate enough, and no more steps are the better way.

        All eigenvalues take n steps of the first probe. It continues to them if the probes that the
        tolerance requires would cost more.
        """
        steps = len(state.runs)
        target = self._target(estimate, steps)
        low, high = estimate.bounds or (estimate.value, estimate.value)
        if not (high - low) / 2 <= _QUADRATURE * target:
            return False
        half = _half(estimate)
        # The half-width of p probes is about half / p^1/2, and the quadrature has its own share.
        probes = (half / max((1 - _QUADRATURE) * target, torch.finfo(torch.float64).tiny)) ** 2
        whole = min(space.n, _most_steps(space)) == space.n <= self.max_matvecs
        return bool(state.done) or not (whole and probes * steps > space.n)

    def _probes(self, state: _State, space: Space, room: int) -> int:
        """Return the number of probes of the next block."""
        steps = max(len(alphas) for alphas, _ in state.complete)
        estimate = self._estimate(state, space)
        low, high = estimate.bounds or (estimate.value, estimate.value)
        left = self._target(estimate, steps) - (high - low) / 2
        have = len(state.complete)
        # half(have) (have / p)^1/2 = left for p probes in all.
        needed = math.inf if left <= 0 else have * (_half(estimate) / left) ** 2 - have
        basis = steps * space.widest * rows_dtype(space).itemsize
        fits = available_to(space) // 4 // max(basis, 1)
        # Some probes take more steps than the first one, for which a quarter of the room is left.
        # The number of probes doubles, since few of them tell little about the number that is
        # needed.
        room = max(room // (steps + steps // 4), room // steps if room < 2 * steps else 0)
        return int(max(1, min(math.ceil(min(needed, room)), room, fits, 2 * have)))

    def _estimate(self, state: _State, space: Space, cost: Cost | None = None) -> Estimate:
        """Return the estimate from the probes so far."""
        runs = state.runs
        # An unfinished block is left out while it has fewer steps than earlier probes.
        recurrences = state.complete if len(runs) < state.known else state.recurrences
        nodes, weights, residuals = quadrature(recurrences)
        density = Density(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            n=space.n,
            eps=max(products_eps(space), runs.asymmetry),
            **(cost or Cost(matvecs=0, passes=0, reason=RUNNING, seed=None)),
        )
        mean = scaled(density._mean(self.f, *self.ends, regular=self.regular), space.n)
        bounded = self.rtol is not None or self.atol is not None
        return replace(mean, stderr=mean.stderr * (STOPPED if bounded else 1.0), n=space.n)

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        if state.runs.active or not state.recurrences:
            return None
        estimate = self._estimate(state, products.space)
        if estimate.reason.startswith("exact"):
            return estimate.reason
        if reason := narrow_enough(estimate, self.rtol, self.atol):
            return reason
        fewest = min(len(alphas) for alphas, _ in state.recurrences)
        if room < fewest:
            return f"budget exhausted after {products.matvecs} matvecs (a probe takes {fewest})"
        return None

    def result(self, state: _State, space: Space, cost: Cost, /) -> Estimate:
        estimate = replace(self._estimate(state, space, cost), reason=cost["reason"])
        low, high = estimate.bounds or (estimate.value, estimate.value)
        if not math.isfinite(high - low):
            reason = (
                f"{cost['reason']}; eigenvalues may lie where f is not bounded: take more matvecs, "
                "pass `smallest=`, or raise the damping"
            )
            return replace(estimate, reason=reason)
        return judged(estimate, narrow_enough(estimate, self.rtol, self.atol))


@dataclass(frozen=True)
class _State:
    """Lanczos recurrences of the current probes, and those of earlier ones.

    Attributes:
        runs: Recurrences of the current probes.
        done: Recurrences of earlier probes.
        seed: Seed of the probes.
        before: Half-width of the interval of the probes after the last round.
    """

    runs: Recurrences
    done: tuple[Recurrence, ...]
    seed: int
    before: float = math.inf

    @property
    def known(self) -> int:
        """Largest number of steps of an earlier probe, 0 for the first one."""
        return max((len(alphas) for alphas, _ in self.done), default=0)

    @property
    def complete(self) -> tuple[Recurrence, ...]:
        return (*self.done, *self.runs.complete)

    @property
    def recurrences(self) -> tuple[Recurrence, ...]:
        return (*self.done, *self.runs.begun)


def _begun(space: Space, indices: range, seed: int, *, workspace: int = WORKSPACE) -> Recurrences:
    """Return the recurrences of new probes."""
    probes = space.probes(indices, kind="sphere", seed=seed, dtype=rows_dtype(space))
    return Recurrences.begin(probes / math.sqrt(space.n), space.n, workspace=workspace)


def _half(estimate: Estimate) -> float:
    """Return the half-width of the 95 % interval of the probes alone."""
    quantile = student_quantile(0.975, estimate.degrees)
    return quantile * estimate.stderr if estimate.stderr else 0.0


def _most_steps(space: Space) -> int:
    """Return the largest number of steps of a probe whose basis fits in memory."""
    vector = space.widest * rows_dtype(space).itemsize
    return int(max(2, min(space.n, available_to(space) // 4 // max(vector, 1))))
