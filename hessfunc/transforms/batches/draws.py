"""Curvature of random batches, as unbiased estimates of the curvature of a data set."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hessfunc.changes import Rereads
from hessfunc.options import validated
from hessfunc.options.scalars import refused, scalar
from hessfunc.randomness import of_matrix, uniforms
from hessfunc.spaces.of import space_of
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.batches.reductions import Average, Inner, watching
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.matvecs.arithmetic import scale
from hessfunc.trees import Matvec, Tree, tree_map

# Negative numbers in keys, so that they differ from the keys (seed, index, leaf) of probes.
_BATCH_OF_DRAW = -1
_ORDER_OF_PASS = -3
# Share of the probability that a proxy distributes. The rest is equal for all batches, so that no
# draw counts more than 1 / (1 - share) times as much as a draw without a proxy.
_BY_PROXY = 0.8


@dataclass(frozen=True, eq=False)
class Draws:
    """Curvature of random batches: ``draws(i)`` is the matvec of the i-th drawn batch.

    Attributes:
        full: Matvec of all batches, which is the expectation of a draw.
        batches: Number of batches, including batches of weight 0.
        seed: Seed of the draws.
        ends: Cumulative sum of the weights of the batches.
        of_batch: Function that returns the matvec of the batch with a given index.
        places: Indices of the batches with a positive weight.
        replace: Whether batches are drawn with replacement.
        chances: Cumulative sum of the probabilities of the batches, or None if they are drawn in
            proportion to their weights, or without replacement.
    """

    full: Matvec
    batches: int
    seed: int
    ends: tuple[float, ...] = field(repr=False)
    of_batch: Callable[[int], Matvec] = field(repr=False)
    places: tuple[int, ...] = field(repr=False)
    replace: bool = False
    chances: tuple[float, ...] | None = field(default=None, repr=False)

    @property
    def population(self) -> int | None:
        """Number of draws in a full pass; None for draws with replacement."""
        return None if self.replace else len(self.places)

    def batch(self, i: int, /) -> int:
        """Return the index of the i-th drawn batch, which depends only on (seed, i)."""
        if not self.replace:
            turn, at = divmod(i, len(self.places))
            return self.places[_order(self.seed, len(self.places), turn)[at]]
        # Inverse transform sampling: batch b has the interval [ends[b-1], ends[b]).
        ends = self.chances or self.ends
        point = float(uniforms(1, self.seed, _BATCH_OF_DRAW, i, device=torch.device("cpu")))
        place = bisect_right(ends, point * ends[-1])
        # A point that rounds up to the end belongs to the last batch with a positive weight.
        return min(place, ends.index(ends[-1]))

    def __call__(self, i: int, /) -> Matvec:
        place = self.batch(i)
        matvec = self.of_batch(place)
        if self.replace and self.chances is None:
            return matvec
        # A batch counts its share of the weights, divided by the probability of drawing it.
        chance = 1 / len(self.places) if self.chances is None else _share(self.chances, place)
        factor = _share(self.ends, place) / chance
        return matvec if abs(factor - 1) < 1e-12 else scale(matvec, factor)


def _share(ends: Sequence[float], place: int) -> float:
    """Return the share of one entry in the total, given the cumulative sum."""
    return (ends[place] - (ends[place - 1] if place else 0.0)) / ends[-1]


@lru_cache(maxsize=8)
def _order(seed: int, count: int, turn: int) -> list[int]:
    """Return a random order of ``count`` batches, which differs between passes."""
    points = uniforms(count, seed, _ORDER_OF_PASS, turn, device=torch.device("cpu"))
    return points.argsort(stable=True).tolist()


@validated
def draws(
    curvature: Curvature,
    /,
    *,
    weight: Callable[[Any], float] | None = None,
    replace: bool = False,
    proxy: Callable[[Tree, Any], float] | None = None,
    seed: int | None = None,
) -> Callable[[Tree, Sequence[Any]], Draws]:
    """Draw random batches of a data set, as a function ``(params, batches) -> Draws``.

    The plain mean over draws is an unbiased estimate of the curvature of the data set, even if the
    batches differ in size:

        E[A_draw] = sum_b weight(b) A_b / sum_b weight(b).

    By default, the B batches are drawn without replacement in a random order, which is drawn again
    for each pass. The curvature of batch b is multiplied by B weight(b) / sum_b weight(b), so that
    the mean over a full pass is exact. With ``replace=True``, draws are independent, and batch b is
    drawn with probability weight(b) / sum_b weight(b). If the loss is a sum over examples and no
    weight is given, the curvature of the data set is the sum over batches, and the mean over draws
    estimates this sum.

    If a few batches dominate the curvature, equal draws rarely meet them. With a ``proxy`` of the
    curvature of a batch, such as its loss, batch b is drawn with replacement with the probability

        p_b = 0.8 proxy_b weight_b / sum (proxy weight) + 0.2 / B,

    and its curvature is multiplied by weight_b / (p_b sum weight). The mean stays unbiased whatever
    the proxy. Its variance is small if the proxy is nearly proportional to the curvature. For 40 of
    600 single digits and a trained perceptron, the relative standard error of the trace is 0.31
    without a proxy, 0.11 with the loss, and 0.09 with the norm of the gradient. For 40 of 57
    batches of 32 digits, draws without replacement and without a proxy are better: 0.036, against
    0.045 with the norm of the gradient.

    Examples:
        >>> loss = lambda w, x: (x * w.square()).mean()
        >>> batches = [torch.tensor([1.0]), torch.tensor([3.0])]
        >>> sample = hf.draws(hf.hvp(loss), seed=0)(torch.ones(()), batches)
        >>> sorted({float(sample(i)(torch.ones(1))) for i in range(4)})
        [2.0, 6.0]

    Args:
        curvature: Curvature function of one batch.
        weight: Weight of a batch; by default the number of its examples. A weight is required for
            a cross-entropy with ignored targets or class weights. Batches of weight 0 are never
            drawn.
        replace: Whether batches are drawn with replacement.
        proxy: Function of ``(params, batch)`` that returns a number of at least 0, about
            proportional to the curvature of the batch. Examples are the loss itself, the norm of a
            gradient, and the quadratic form of one probe.
        seed: Seed of the draws. Draw i depends only on (seed, i). None chooses a seed when `draws`
            is called.

    Returns:
        Function ``(params, batches) -> Draws``. Each draw reads its batch and makes its graph
        again; both live as long as the matvec of the draw.

    Raises:
        TypeError: If the batches have no length or cannot be indexed, or if a weight or proxy is
            no real number; raised by the function.
        ValueError: If the list has no batch, if a weight or proxy is negative or all are 0, or if a
            model uses batch statistics (BatchNorm in train mode) on several batches; raised by the
            function. Also if the loss divides by class weights or by the number of targets that
            are not ignored, their share differs between batches, and no weight is given; raised by
            a draw.
        RuntimeError: If params have changed in place since the draws were made; raised by a draw.

    Cost: each batch is read once to compute its weight, and its proxy. A draw costs the same as
    ``curvature`` of its batch.

    Source: Hansen and Hurwitz 1943; the mixture with equal probabilities: Hesterberg 1995.
    """
    seed = of_matrix(seed)

    def of_data(params: Tree, batches: Sequence[Any]) -> Draws:
        if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")):
            raise TypeError(
                f"batches is a {type(batches).__name__}, which cannot be indexed: pass "
                "list(loader), or microbatches(batch, size)"
            )
        full = over_batches(curvature, weight=weight)(params, batches)
        counted = [_number("weight", (weight or examples)(batches[b])) for b in range(len(batches))]
        ends = _running_sum(counted, "weight")
        chances = None if proxy is None else _chances(proxy, params, batches, counted)
        places = tuple(b for b, each in enumerate(counted) if each > 0)
        average = Average(weight, several=len(ends) > 1)
        space = space_of(params)
        rereads = Rereads.of(space.names, space.tree_leaves(params))

        def of_batch(place: int) -> Matvec:
            with (
                rereads.reading(),
                several_batches() if len(ends) > 1 else nullcontext(),
                watching() as seen,
            ):
                matvec = curvature(params, batches[place])
                # Test the reduction on the largest batch: one example has equal mean and sum.
                largest = batches[counted.index(max(counted))]
                average.decide(seen, batch=largest, counted=True)
            share = ends[-1] / counted[place]
            if weight is None and any(isinstance(noted, Inner) for noted in seen):
                return _of_inner(matvec, average, average.later(batches[place]), share, ends[-1])
            return scale(matvec, share) if average.is_sum else matvec

        with_replacement = replace or chances is not None
        return Draws(full, len(ends), seed, ends, of_batch, places, with_replacement, chances)

    return of_data


def _of_inner(
    matvec: Matvec, average: Average, own: Callable[[], float], share: float, total: float
) -> Matvec:
    """Scale the matvec of a drawn batch that is itself a mean or sum over batches.

    Args:
        matvec: Matvec of the drawn batch.
        average: Combination of the drawn batches, known after the first product.
        own: Function that returns the weight of the drawn batch after a product.
        share: Ratio of the total weight to the weight with which the batch is drawn.
        total: Total weight of the batches.
    """

    def drawn(block: Tree) -> Tree:
        product = matvec(block)
        weight = own()
        if average.is_sum:
            return tree_map(lambda leaf: share * leaf, product)
        if not math.isclose(weight * share, total, rel_tol=1e-6):
            raise ValueError(
                f"a batch was drawn with the weight {total / share:.6g}, but the batches inside it "
                f"have the total weight {weight:.6g}: pass their total, for instance "
                "`weight=lambda batches: sum(map(hessfunc.examples, batches))`"
            )
        return product

    return drawn


def _chances(
    proxy: Callable[[Tree, Any], float],
    params: Tree,
    batches: Sequence[Any],
    weights: Sequence[float],
) -> tuple[float, ...]:
    """Return the cumulative probabilities with which batches are drawn by a proxy."""
    sizes = [
        _number("proxy", proxy(params, batches[b])) if weight else 0.0
        for b, weight in enumerate(weights)
    ]
    _running_sum(sizes, "proxy")
    sizes = [size * weight for size, weight in zip(sizes, weights, strict=True)]
    total = sum(sizes)
    equal = 1 / sum(weight > 0 for weight in weights)
    return tuple(
        accumulate(
            _BY_PROXY * size / total + (1 - _BY_PROXY) * equal * (weight > 0)
            for size, weight in zip(sizes, weights, strict=True)
        )
    )


def _number(name: str, value: Any) -> float:
    """Return a real number, or the only entry of a tensor, as a float."""
    is_single = isinstance(value, Tensor) and value.numel() == 1
    plain = scalar(value.detach().reshape(()) if is_single else value)
    if isinstance(plain, Real):
        return float(plain)
    remedy = f"return a number from `{name}`, such as `float(loss(params, batch))`"
    if name == "weight":
        remedy = "return a number from `weight`, such as `len(batch)`"
    raise refused(f"the {name} of a batch", value, "a number", remedy)


def _running_sum(weights: Sequence[float], name: str) -> tuple[float, ...]:
    """Return the cumulative sum of nonnegative weights, or proxies, of the batches."""
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the {name} of a batch is {weight}: it must be at least 0 and finite")
    if not sum(weights) > 0:
        raise ValueError(
            f"the {name} values of the batches sum to zero: check that the list is not empty, and "
            f"that `{name}` returns positive numbers"
        )
    return tuple(accumulate(weights))
