"""The diagonal by independent probes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Checkpoint, Directory
from hessfunc.algorithms.driver import Callback, drive
from hessfunc.algorithms.exact import exact_diagonal, random_budget, unit_vectors_left
from hessfunc.algorithms.norms import squared_row_norms
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import DiagonalEstimate, close_enough, settled
from hessfunc.algorithms.statistics import FEWEST_SAMPLES, STOPPED, rounding_of_sum
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Of fewer probes of random signs, all samples of an entry may be the same by chance.
_FEWEST_SIGNS = 8


@validated
def hutchinson_diagonal(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    max_matvecs: int = 100,
    block_size: int = 10,
    seed: int | None = None,
    space: Space | None = None,
    callback: Callback[DiagonalEstimate] | None = None,
    checkpoint: Directory = None,
) -> DiagonalEstimate:
    """The diagonal of a matrix, by random signs.

        diag A = E[w * Aw],  entries of w are +1 or -1

    estimated by the mean over probes. The variance of entry j is the sum of a_jk^2 over k != j,
    for a symmetric A; its standard error is that of the samples.

    Args:
        matvec: block -> block.
        like: a tree that says what vectors look like.
        rtol: stop when a bound of the error is below rtol times the values, both in the 2-norm
            over all entries, with 95 % confidence. Without it the whole budget is used.
        max_matvecs: the budget: so many probes at the most.
        block_size: how many probes are multiplied at once.
        seed: of the probes.
        space: in which every rank holds a part of each vector, made by `sharded`; by default
            every rank holds the whole.
        callback: called with the running `DiagonalEstimate` after each round; returning True
            stops.
        checkpoint: a directory that keeps the state, for a run that was killed to go on from.

    Returns:
        `DiagonalEstimate`, with ``squared_row_norms`` from the same products.

    Raises:
        ValueError: an option is out of range.
        FloatingPointError: a product is not finite.

    Cost: one matvec a probe; 4 block_size + 12 vectors of memory in float64, and block_size more.

    Source: Bekas, Kokiopoulou and Saad 2007.
    """
    products = Products.of(matvec, like, space)
    space = products.space
    at_least(0, rtol=rtol)
    at_least(2, max_matvecs=max_matvecs)
    at_least(1, block_size=block_size)
    store = Checkpoint.of(checkpoint, "hutchinson_diagonal", products, seed, block_size=block_size)
    seed = store.seed
    random = random_budget(products, max_matvecs, tolerance=rtol is not None)

    def exact() -> DiagonalEstimate:
        return exact_diagonal(products, seed, max_matvecs=max_matvecs, block_size=block_size)

    if not random:
        return settled(exact(), rtol)

    def step(state: _State, room: int) -> _State:
        first = state.diagonal.count
        indices = range(first, first + min(room, block_size))
        probes = space.probes(indices, kind="signs", seed=seed, dtype=rows_dtype(space))
        images = products(probes)
        return _State(
            state.diagonal.extended(probes * images),
            state.squares.extended(images.square()),
        )

    def found(state: _State, reason: str) -> DiagonalEstimate:
        diagonal, squares, count = state.diagonal, state.squares, state.diagonal.count
        rounding = rounding_of_sum(products_eps(space, rows_dtype(space))) * (
            diagonal.mean.abs() + diagonal.spread
        )
        spread = diagonal.spread
        if count < _FEWEST_SIGNS:
            typical = space.summed(spread.square().sum()).div(space.n).sqrt()
            spread = torch.where(spread * math.sqrt(count) <= rounding, typical, spread)
        stderr = (spread / math.sqrt(count) + rounding) * (1.0 if rtol is None else STOPPED)
        return DiagonalEstimate(
            value=space.unravel(diagonal.mean),
            stderr=space.unravel(stderr),
            degrees=count - 1,
            squared_row_norms=squared_row_norms(
                squares.mean, squares.spread, count, products, seed
            ),
            **products.cost(reason, seed),
        )

    def verdict(state: _State) -> str | None:
        if state.diagonal.count < FEWEST_SAMPLES:
            return None
        return close_enough(found(state, "running"), rtol)

    none = space.zeros(1, wide_dtype(space.device))[0]
    state, reason = drive(
        _State(_Moments(0, none, none), _Moments(0, none, none)),
        products=products,
        step=step,
        verdict=verdict,
        running=lambda state: found(state, "running"),
        max_matvecs=random,
        callback=callback,
        storage=store,
    )
    estimate = settled(found(state, reason), rtol)
    if unit_vectors_left(products, max_matvecs, random, estimate.reason):
        return settled(exact(), rtol)
    return estimate


@dataclass(frozen=True)
class _Moments:
    """The mean and the sum of squared deviations of samples, entry by entry."""

    count: int
    mean: Rows
    deviations: Rows

    def extended(self, samples: Tensor) -> _Moments:
        """With more samples, as rows (Chan, Golub and LeVeque 1979)."""
        samples = samples.to(self.mean)
        k, count = len(samples), self.count + len(samples)
        mean = samples.mean(0)
        shift = mean - self.mean
        deviations = (samples - mean).square().sum(0)
        return _Moments(
            count,
            self.mean + shift * (k / count),
            self.deviations + deviations + shift.square() * (self.count * k / count),
        )

    @property
    def spread(self) -> Tensor:
        """The standard deviation; infinite for a single sample."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.inf)
        return (self.deviations / (self.count - 1)).sqrt()


@dataclass(frozen=True)
class _State:
    """Of the samples ``w * Aw`` and ``(Aw)^2``."""

    diagonal: _Moments
    squares: _Moments
