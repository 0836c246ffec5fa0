"""Power iteration with momentum and deflation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis
from hessfunc.algorithms.driver import Method, RunOptions, run_method
from hessfunc.algorithms.eigen.power_step import (
    PowerState,
    iterated,
    longest_product,
    outside,
    quotient,
)
from hessfunc.algorithms.eigen.ritz import Which, have_converged, preferred, rayleigh_ritz, wanted
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.starts import of_starts, unit_start
from hessfunc.algorithms.symmetry import SYMMETRIC, asymmetry_named
from hessfunc.numerics import rounding
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Space, products_eps
from hessfunc.trees import Matvec, Tree

# Largest number of products in a round.
_STEPS_A_ROUND = 4
# The 1 % quantile of chi2_1.
_UNLIKELY = 1.57e-4


@validated
def power_iteration(
    matvec: Matvec,
    like: Tree,
    *,
    k: int = 1,
    which: Literal["LM", "LA", "SA"] = "LM",
    momentum: float = 0.0,
    rtol: float = 1e-3,
    max_matvecs: int = 1000,
    start: Tree | None = None,
    **run: Unpack[RunOptions],
) -> Eigenpairs:
    """Compute the largest eigenpairs of a symmetric matrix, one by one, by power iteration.

    With momentum b, and with both vectors rescaled together,

        w_{t+1} = A w_t - b w_{t-1},        value = w'Aw / w'w.

    A pair is accepted when |A w - value w| <= rtol |value|. The iteration for the next pair is
    orthogonal to the accepted ones. At the end the pairs are rotated within their span
    (Rayleigh-Ritz), without a product. `lanczos` needs far fewer products. This method is the
    baseline, needs little memory, and is the basis of stochastic variants.

    A given start may lie in an invariant subspace. Once all pairs have converged from it, steps
    from a random unit vector u outside of the pairs follow. If A has an eigenvalue x there that is
    as large as the wanted ones, the part w of u along its eigenvector satisfies

        w^2 <= |A^s u|^2 / x^(2 s)

    after s steps. The steps end when this bound is smaller than w^2 in 99 of 100 runs. If the
    quotient of u exceeds a wanted value, the iteration continues with u.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> top = hf.power_iteration(matvec, like, k=1, rtol=1e-3, max_matvecs=500, seed=0)
        >>> top.values.round(decimals=2)
        tensor([10.], dtype=torch.float64)

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric.
        like: Tree that shows the structure of a vector.
        k: Number of pairs, at most n.
        which: Wanted eigenvalues. ``"LM"`` takes the largest in absolute value, ``"LA"`` the
            largest, and ``"SA"`` the smallest. For the last two the matrix is shifted by its
            dominant eigenvalue, which is computed first.
        momentum: Momentum b, in units of the squared eigenvalue. The best value is near
            (lambda_2 / 2)^2.
        rtol: Relative tolerance: a pair is accepted when its residual is at most rtol |value|.
        max_matvecs: Budget, the largest number of matvecs.
        start: Start vector as a tree. The default is random, and needs no steps outside of the
            pairs.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Eigenpairs`. If the budget is exhausted early, there are fewer than k pairs, and the last
        one has not converged. Residuals are computed from actual products and never extrapolated.
        A dominant pair +a, -a does not converge, and is reported so.

    Raises:
        ValueError: If an option is out of range, or if the matvec is not symmetric or not
            deterministic.
        FloatingPointError: If a product is not finite.

    Cost: one matvec an iteration; three more, uncounted, if inner products show that the matvec
    may not be symmetric. Memory: 2 k + 3 vectors, 3 k + 1 at the end, besides those of a product.

    Source: De Sa, He, Mitliagkas, Re and Xu 2017, arXiv 1707.02670.
    """
    at_least(1, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    n = products.space.n
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: the matrix has {n} eigenvalues, choose 1 to {n}")
    method = Power(k=k, which=which, momentum=momentum, rtol=rtol, start=start)
    return run_method(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class Power(Method[PowerState, Eigenpairs]):
    """Power iteration with deflation.

    Attributes:
        k: Number of pairs.
        which: Wanted eigenvalues.
        momentum: Momentum b.
        rtol: Relative tolerance of residuals.
        start: Vector at which the run begins; a random one by default.
    """

    k: int
    which: Literal["LM", "LA", "SA"]
    momentum: float
    rtol: float
    start: Tree | None = None

    def __post_init__(self) -> None:
        if self.which not in ("LM", "LA", "SA"):
            raise ValueError(
                f"which={self.which!r}: choose 'LM', 'LA' or 'SA', or use `lanczos` for 'BE'"
            )
        at_least(0, rtol=self.rtol, momentum=self.momentum)

    def init(self, products: Products, seed: int, /) -> PowerState:
        space, start = products.space, self.start
        current = unit_start(space, start, seed)
        if start is not None and self.which != "LM":
            # A random part is added, since the shift needs the dominant eigenvalue, which the start
            # may have no part in.
            current = current + unit_start(space, None, seed)
            current /= space.norms(current).to(current.dtype)[:, None]
        return PowerState(
            current=current,
            previous=torch.zeros_like(current) if self.momentum else current[:0],
            image=None,
            vectors=current[:0],
            images=current[:0],
            shift=0.0 if self.which == "LM" else None,
            trusted=start is None,
            seed=seed,
        )

    def step(self, state: PowerState, products: Products, room: int, /) -> PowerState:
        space, which, k = products.space, self.which, self.k
        symmetric = max(SYMMETRIC, 10 * products_eps(space), 2 * self.rtol)
        for _ in range(min(room, _STEPS_A_ROUND)):
            state = iterated(space, products, state, self.momentum, symmetric)
            value, residual = quotient(space, state)
            if residual <= self._tolerance(space, value, longest_product(space, state)):
                return _accept(space, state, which, k, value, state.seed)
            if len(state.vectors) >= k and _is_surely_complete(space, state, which, k):
                return replace(state, trusted=True)
        return state

    def _tolerance(self, space: Space, value: float, largest: float) -> float:
        """Return the residual at which a pair with this value has converged."""
        # If a value is zero up to rounding, its residual need only be zero up to rounding.
        floor = rounding(products_eps(space), largest)
        return max(self.rtol * abs(value), floor if abs(value) <= floor else 0.0)

    def verdict(self, state: PowerState, products: Products, room: int, /) -> str | None:
        count = len(state.vectors)
        done = count >= self.k and (state.trusted or count == products.space.n)
        return "converged: all residuals are within the tolerance" if done else None

    def finish(
        self, state: PowerState, products: Products, reason: str, room: int, /
    ) -> tuple[PowerState, str]:
        space = products.space
        if state.image is None:
            # All pairs are accepted.
            return state, reason
        if bool(self.result(state, space, products.cost(reason, None)).converged.all()):
            return state, reason
        cause = asymmetry_named(
            products,
            state.current,
            state.asymmetry,
            state.longest,
            eps=products_eps(space),
            rtol=self.rtol,
        )
        return state, reason if cause is None else f"{reason}; {cause}"

    def result(self, state: PowerState, space: Space, cost: Cost, /) -> Eigenpairs:
        values, vectors, residuals = _ritz(space, state, self.which, self.k)
        largest = longest_product(space, state)
        floor = rounding(products_eps(space), largest)
        return Eigenpairs(
            values=values,
            vectors=space.vectors(vectors),
            residuals=residuals,
            converged=have_converged(values, residuals, rtol=self.rtol, atol=0.0, floor=floor),
            largest=largest,
            **cost,
        )


def _is_surely_complete(space: Space, state: PowerState, which: Which, k: int) -> bool:
    """Return whether an outside eigenvalue as large as the k-th would have been met by now.

    The squared part of its eigenvector in u is w^2 <= |A^s u|^2 / x^(2 s), and n w^2 is nearly
    chi2_1. With momentum the iterate is another polynomial of A, and only convergence decides.
    """
    if len(state.previous) or not state.steps:
        return False
    values = space.gram(state.vectors, state.images).diagonal().cpu()
    least = float(_ordered(values, which)[k - 1]) + (state.shift or 0.0)
    if least == 0:
        return False
    part = 2 * (state.growth - state.steps * math.log(abs(least)))
    return part + math.log(space.n) < math.log(_UNLIKELY)


def _ordered(values: Tensor, which: Which) -> Tensor:
    ascending = values.sort().values
    return ascending[preferred(which, ascending)]


def _accept(
    space: Space, state: PowerState, which: Which, k: int, value: float, seed: int
) -> PowerState:
    assert state.image is not None
    keeps, shift = True, state.shift
    if shift is None:
        shift = abs(value) if which == "LA" else -abs(value)
        keeps = value >= 0 if which == "LA" else value <= 0
    none = state.current[:0]
    if len(state.vectors) >= k:
        values = space.gram(state.vectors, state.images).diagonal().cpu()
        among = torch.cat([values, torch.tensor([value], dtype=values.dtype, device="cpu")])
        if value not in _ordered(among, which)[:k].tolist():
            # The random vector has led to an unwanted pair, as in a run without a start.
            return replace(state, trusted=True, current=none, previous=none, image=None)
    vectors, images = state.vectors, state.images
    if keeps:
        room = k + (not state.trusted)
        vectors = Basis(vectors).append(state.current, room).rows
        images = Basis(images).append(state.image, room).rows
    state = replace(state, vectors=vectors, images=images, shift=shift)
    if len(vectors) == space.n or (len(vectors) >= k and state.trusted):
        return replace(state, current=none, previous=none, image=None)
    # Each pair has its own probe. Probe 1 follows a dominant pair that was dropped, since it was at
    # the wrong end.
    index = len(state.vectors) + 1
    fresh = space.probes([index], kind="normal", seed=of_starts(seed), dtype=vectors.dtype)
    fresh = outside(space, fresh, state.vectors)
    fresh /= space.norms(fresh).to(fresh.dtype)[:, None]
    previous = torch.zeros_like(fresh) if len(state.previous) else none
    return replace(state, current=fresh, previous=previous, image=None, steps=0, growth=0.0)


def _ritz(space: Space, state: PowerState, which: Which, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Ritz pairs in the span of all vectors with a known product, with residuals."""
    rows, images = state.vectors, state.images
    if state.image is not None and len(rows) < k:
        has_pairs = len(rows) > 0
        rows = torch.cat([rows, state.current]) if has_pairs else state.current
        images = torch.cat([images, state.image]) if has_pairs else state.image
    values, rotation = rayleigh_ritz(space.gram(rows, images))
    order = wanted(which, values, k)
    values, rotation = values[order], rotation[:, order]
    rows = space.combine(rotation.mT, rows)
    # For v = V'y with products A V', the residual is A v - value v = (A V') y - value v.
    residuals = []
    for value, row, column in zip(
        values.tolist(), rows.split(1), rotation.mT.split(1), strict=True
    ):
        residuals.append(space.norms(space.combine(column, images).add_(row, alpha=-value)))
    return values, rows, torch.cat(residuals).cpu()
