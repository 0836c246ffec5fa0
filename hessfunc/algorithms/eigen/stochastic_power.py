"""Power iteration on random batches, with momentum and variance reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RUNNING, Method, RunOptions, run_method
from hessfunc.algorithms.eigen.ritz import have_converged
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.starts import unit_start
from hessfunc.numerics import rounding
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps
from hessfunc.trees import Matvec, Tree


@validated
def stochastic_power_iteration(
    matvec: Matvec,
    draws: Callable[[int], Matvec],
    like: Tree,
    *,
    momentum: float = 0.0,
    steps_per_epoch: int = 10,
    rtol: float = 1e-3,
    max_matvecs: int = 1000,
    start: Tree | None = None,
    **run: Unpack[RunOptions],
) -> Eigenpairs:
    """Compute the dominant eigenpair of a data set's matrix, mostly from random batches.

    The method is VR Power+M. An epoch starts with one exact product v = A u of a unit vector u, and
    continues with products of independent draws, E[A_t] = A. With momentum b, and with both vectors
    rescaled together,

        w_{t+1} = A_t (w_t - a u) + a v - b w_{t-1},    a = u'w_t,    w_0 = u.

    A random batch multiplies only the difference from u, so that the noise vanishes as u converges.
    The pair is that of A to any precision, while w_{t+1} = A_t w_t stalls at the noise of a batch.
    The last w, at unit length, is the next u. Values and residuals come from exact products, and
    the run stops when |A u - value u| <= rtol |value|. An epoch is rejected if its noise outweighs
    its progress. The next epoch then has half the random products, and each success adds one.
    Without random products the method is power iteration.

    The table shows the cost of a residual of 1e-3 for a perceptron of 2,410 parameters and 1,797
    shuffled digits, in gradients of one batch (``python -m bench.draws``):

        net, batches            power_iteration    lanczos    this
        untrained, 50 of 36               6,300      3,825    2,655
        trained, 50 of 36                 5,400      2,925    2,115
        untrained, 150 of 12             18,900     11,475   19,539
        trained, 150 of 12               16,200      8,775    6,435

    Exact products, by `lanczos` before `power_iteration`, are the better choice if batches are
    small or sorted by class, so that a batch does not represent the data, and for several pairs.

    Args:
        matvec: Function from a block of vectors to the block of their products, with the exact
            matrix A. The matrix must be symmetric.
        draws: Function from i to the matvec of the i-th random batch, as `hessfunc.draws` makes it.
        like: Tree that shows the structure of a vector.
        momentum: Momentum b, in units of the squared eigenvalue. The best value is near
            (lambda_2 / 2)^2 if the noise of a batch is small. Otherwise momentum is harmful.
        steps_per_epoch: Largest number of random products between two exact ones.
        rtol: Relative tolerance: the run stops when the residual is at most rtol |value|.
        max_matvecs: Budget, the largest number of matvecs, exact and random ones together.
        start: Start vector as a tree. The default is random.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Eigenpairs` with one pair. ``matvecs`` counts exact and random products together;
        ``reason`` states the number of random ones.

    Raises:
        ValueError: If an option is out of range.
        FloatingPointError: If a product is not finite.

    Cost: an epoch takes one product with A and ``steps_per_epoch`` products with one batch each.
    Memory: 7 vectors, besides those of a product.

    Source: De Sa, He, Mitliagkas, Re and Xu 2017, arXiv 1707.02670, algorithm VR Power+M, which
    does not reject epochs.
    """
    at_least(1, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    method = StochasticPower(
        draws=draws, momentum=momentum, steps_per_epoch=steps_per_epoch, rtol=rtol, start=start
    )
    return run_method(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class StochasticPower(Method["_State", Eigenpairs]):
    """Power iteration with random batches, corrected by exact products.

    Attributes:
        draws: Function from the number of a draw to the matvec of its batch.
        momentum: Momentum b.
        steps_per_epoch: Largest number of random products between two exact ones.
        rtol: Relative tolerance of the residual.
        start: Vector at which the run begins; a random one by default.
    """

    draws: Callable[[int], Matvec]
    momentum: float
    steps_per_epoch: int
    rtol: float
    start: Tree | None = None

    def __post_init__(self) -> None:
        at_least(0, rtol=self.rtol, momentum=self.momentum, steps_per_epoch=self.steps_per_epoch)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "draws": getattr(self.draws, "seed", None)}

    def init(self, products: Products, seed: int, /) -> _State:
        first = unit_start(products.space, self.start, seed)
        return _State(first, torch.zeros_like(first), None, 0, self.steps_per_epoch)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        if state.image is None:
            return replace(state, image=products(state.current))
        space, steps = products.space, min(state.steps, room - 1)
        random = partial(self._random_product, products)
        moved = _epoch(space, random, state, state.image, self.momentum, steps)
        moved = replace(moved, image=products(moved.current))
        if steps and _is_worse(space, moved, state, products_eps(space)):
            return replace(state, drawn=moved.drawn, steps=steps // 2)
        return replace(moved, steps=min(state.steps + 1, self.steps_per_epoch))

    def _random_product(self, products: Products, draw: int, rows: Tensor) -> Tensor:
        of_batch = Products(self.draws(draw), products.space)
        image = of_batch(rows)
        products.matvecs += of_batch.matvecs
        products.passes += of_batch.passes
        return image

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        if state.image is None:
            return None
        pairs = self.result(state, products.space, products.cost(RUNNING, None))
        return "converged: the residual is within the tolerance" if pairs.converged.all() else None

    def result(self, state: _State, space: Space, cost: Cost, /) -> Eigenpairs:
        value, residual, largest = _quotient(space, state)
        numbers = torch.tensor([value, residual], dtype=torch.float64, device="cpu")
        values, residuals = numbers.split(1)
        floor = rounding(products_eps(space), largest)
        split = f"{state.drawn} of the {cost['matvecs']} products were with one batch"
        return Eigenpairs(
            values=values,
            vectors=space.vectors(state.current),
            residuals=residuals,
            converged=have_converged(values, residuals, rtol=self.rtol, atol=0.0, floor=floor),
            largest=largest,
            **Cost(**{**cost, "reason": f"{cost['reason']}; {split}"}),
        )


@dataclass(frozen=True)
class _State:
    """State between two epochs.

    Attributes:
        current: Iterate u of unit length.
        previous: Predecessor, scaled with the iterate.
        image: Exact product A u; None before it is computed.
        drawn: Number of random products so far.
        steps: Number of random products in the next epoch.
    """

    current: Rows = field(metadata=DIVIDED)
    previous: Rows = field(metadata=DIVIDED)
    image: Rows | None = field(metadata=DIVIDED)
    drawn: int
    steps: int


def _epoch(
    space: Space,
    product: Callable[[int, Tensor], Tensor],
    state: _State,
    image: Tensor,
    momentum: float,
    steps: int,
) -> _State:
    """Return the state after one exact step, with the known product, and random steps."""
    anchor = state.current
    # At w_0 = u the recurrence is w_1 = v - b w_{-1}, since a = 1 and w_0 - a u = 0.
    moved = image - momentum * state.previous
    state = _moved(space, state, moved, state.drawn)
    for _ in range(steps):
        # w_{t+1} = A_t (w_t - a u) + a v - b w_{t-1}, with a = u'w_t.
        along = space.gram(state.current, anchor).to(anchor.dtype)
        moved = product(state.drawn, state.current - along * anchor)
        moved = moved + along * image - momentum * state.previous
        state = _moved(space, state, moved, state.drawn + 1)
    return state


def _moved(space: Space, state: _State, moved: Tensor, drawn: int) -> _State:
    length = space.norms(moved).to(moved.dtype)[:, None]
    if not bool(length > 0):
        # A w = 0 exactly: w is an eigenvector of value 0, and is kept.
        moved, length = state.current, torch.ones_like(length)
    return _State(moved / length, state.current / length, None, drawn, state.steps)


def _is_worse(space: Space, moved: _State, before: _State, eps: float) -> bool:
    """Return whether the noise of an epoch outweighs its progress.

    Exact steps increase |A w|. Near the eigenvector the increase is below rounding, but there the
    residual falls. Far from the eigenvector the residual may rise.
    """
    _, residual, length = _quotient(space, moved)
    _, residual_before, length_before = _quotient(space, before)
    if abs(length - length_before) > rounding(eps, length_before):
        return length < length_before
    return residual >= residual_before


def _quotient(space: Space, state: _State) -> tuple[float, float, float]:
    """Return the Rayleigh quotient, its residual, and the length of the product."""
    assert state.image is not None
    value = float(space.gram(state.current, state.image))
    residual = state.image - value * state.current
    return value, float(space.norms(residual)), float(space.norms(state.image))
