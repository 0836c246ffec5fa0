"""Generalized sharpness: the maximum of a quadratic form over the unit ball of a norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import Method, RunOptions, run_method
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import GeneralizedSharpness
from hessfunc.algorithms.starts import of_starts
from hessfunc.numerics import rounding
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree, tree_map

# Function from a block of k vectors y to the dual norms max <y, d> over the unit ball, (k,), and
# the block of the maximisers d.
Norm: TypeAlias = Callable[[Tree], tuple[Tensor, Tree]]


@validated
def generalized_sharpness(
    matvec: Matvec,
    like: Tree,
    norm: Norm,
    /,
    *,
    restarts: int = 4,
    rtol: float = 1e-3,
    max_matvecs: int = 400,
    start: Tree | None = None,
    **run: Unpack[RunOptions],
) -> GeneralizedSharpness:
    """Maximise a quadratic form over the unit ball of a norm.

        S = max d'Ad  over  |d| <= 1

    With the norm of an optimiser, S is the sharpness that limits its steps: 2 / lr for a step
    ``-lr |g|* argmax <g, d>``. For the Euclidean norm, S is the largest eigenvalue. For the largest
    entry (sign descent) and the spectral norm (Muon), the maximum is NP-hard to find, and the value
    is a lower bound: the largest of the local maxima that the restarts have reached.

    Each run is a Frank-Wolfe ascent with exact line search. It multiplies the maximiser s of
    <Ad, s>, and moves to the best point of the segment from d to s, whose product is known by
    linearity. For a positive semi-definite A, the best point is s itself, and the ascent is the
    generalised power method.

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric.
        like: Tree that shows the structure of a vector.
        norm: Function from a block of k vectors y to their dual norms max <y, d> over |d| <= 1,
            ``(k,)``, and the block of the maximisers d, such as the ``norm`` of `stability`.
        restarts: Number of runs from random directions, made in one block.
        rtol: Relative tolerance: a run stops when its gap 2 (|Ad|* - d'Ad) is at most
            ``rtol |d'Ad|``.
        max_matvecs: Budget, the largest number of matvecs.
        start: Direction of one more run, such as the ``direction`` of an earlier result, of any
            length. The run begins at the maximiser of its product.
        run: Options of `RunOptions`. Vectors that are divided among ranks are refused.

    Raises:
        ValueError: If an option is out of range, or if the vectors are divided among ranks.
        FloatingPointError: If a product is not finite.

    Cost: one product for each run and iteration, about 10 iterations. Memory: for each run, a
    vector and 4 vectors in float64.

    Source: Islamov et al. 2026, arXiv 2603.05002; ascent: Frank and Wolfe 1956; convergence of its
    full steps: Journée et al. 2010, arXiv 0811.4724.
    """
    at_least(0 if start is not None else 1, restarts=restarts)
    at_least(0, rtol=rtol)
    runs = restarts + (start is not None)
    at_least(2 * runs + (start is not None), max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    if products.space.distributed:
        raise ValueError(
            "the vectors are divided among ranks, but a norm needs whole leaves: gather the "
            "parameters with `hessfunc.unsharded(model)`"
        )
    ones = tree_map(lambda leaf: torch.ones_like(leaf)[None], like)
    method = FrankWolfe(norm, norm(ones)[0], restarts, rtol, start)
    return run_method(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True)
class _State:
    """Direction of each run with its product, and where it goes.

    Attributes:
        directions: Directions d.
        images: Products A d; empty before the first round.
        targets: Maximisers s of <A d, s>.
        values: Values d'Ad, float64.
        gaps: Gaps 2 (|A d|* - d'Ad), float64.
    """

    directions: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    targets: Rows = field(metadata=DIVIDED)
    values: Tensor
    gaps: Tensor


@dataclass(frozen=True)
class FrankWolfe(Method[_State, GeneralizedSharpness]):
    """Frank-Wolfe ascent from several directions; the options are those of the function.

    Attributes:
        norm: Linear maximisation over the unit ball.
        length: Dual norm of a vector of ones, by which a checkpoint recognises the norm.
        restarts: Number of runs from random directions.
        rtol: Relative tolerance of the gaps.
        start: Direction of one more run, or None.
    """

    norm: Norm
    length: Tensor
    restarts: int
    rtol: float
    start: Tree | None

    changeable: ClassVar = frozenset({"rtol", "norm"})

    def init(self, products: Products, seed: int, /) -> _State:
        space, dtype = products.space, rows_dtype(products.space)
        draws = space.probes(range(self.restarts), kind="normal", seed=of_starts(seed), dtype=dtype)
        if self.start is not None:
            # The start may be longer than 1 in this norm. The maximiser of its product is not.
            row = space.ravel(tree_map(lambda leaf: leaf[None], self.start), dtype=dtype)
            draws = torch.cat([products(row), draws])
        none = draws[:0]
        directions = _best(space, self.norm, draws)[1]
        numbers = torch.zeros(0, dtype=torch.float64, device="cpu")
        return _State(directions, none, none, numbers, numbers)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        d, image, values = state.directions, state.images, state.values
        if not len(image):
            if len(d) > room:
                return state
            image = products(d)
            return self._measured(products.space, d, image, _dots(d, image))
        open_ = torch.nonzero(~self._converged(state, products.space)).flatten().to(d.device)
        if len(open_) > room:
            return state
        step = state.targets[open_] - d[open_]
        moved = products(state.targets[open_]) - image[open_]
        # f(d + t (s - d)) = f(d) + 2 t slope + t^2 bend, with its maximum on [0, 1].
        slope, bend = _dots(step, image[open_]), _dots(step, moved)
        t = torch.where(bend < 0, (slope / -bend).clamp(0, 1), torch.ones_like(bend))
        along = t.to(d)[:, None]
        return self._measured(
            products.space,
            d.index_add(0, open_, along * step),
            image.index_add(0, open_, along * moved),
            values.index_add(0, open_.cpu(), 2 * t * slope + t * t * bend),
        )

    def _measured(self, space: Space, d: Rows, image: Rows, values: Tensor) -> _State:
        dual, targets = _best(space, self.norm, image)
        # f(d) = d'Ad has gradient 2 Ad, so that max <grad f(d), s - d> = 2 (|Ad|* - d'Ad).
        return _State(d, image, targets, values, 2 * (dual - values))

    def _converged(self, state: _State, space: Space) -> Tensor:
        floor = rounding(products_eps(space), float(state.values.abs().max()))
        return state.gaps <= (self.rtol * state.values.abs()).clamp_min(floor)

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        if len(state.values) and bool(self._converged(state, products.space).all()):
            return "converged: the gap of each run is within the tolerance"
        return None

    def result(self, state: _State, space: Space, cost: Cost, /) -> GeneralizedSharpness:
        best = int(state.values.argmax())
        return GeneralizedSharpness(
            value=float(state.values[best]),
            gap=max(float(state.gaps[best]), 0.0),
            direction=space.unravel(state.directions[best]),
            values=state.values,
            **cost,
        )


def _best(space: Space, norm: Norm, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dual norms of rows, float64 ``(k,)``, and their maximisers as rows."""
    dual, maximisers = norm(space.unravel(rows))
    return dual.double().cpu(), space.ravel(maximisers, dtype=rows.dtype)


def _dots(rows: Tensor, others: Tensor) -> Tensor:
    return (rows.double() * others.double()).sum(dim=1).cpu()
