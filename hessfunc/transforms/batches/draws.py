"""Random batches: one at a time stands for a whole data set."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from hessfunc.modules import several_batches
from hessfunc.options import validated
from hessfunc.randomness import of_matrix, uniforms
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.batches.reductions import Average, Inner, watching
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.matvecs.arithmetic import scale
from hessfunc.trees import Matvec, Tree, tree_map, unchanged

# Probes of the same seed are functions of other keys: (seed, index, leaf), no index negative.
_BATCH_OF_DRAW = -1
_ORDER_OF_PASS = -3


@dataclass(frozen=True, eq=False)
class Draws:
    """The curvature of random batches: ``draws(i)`` is the matvec of the i-th draw's batch.

    Attributes:
        full: the matvec of all batches, the mean of the draws' in expectation.
        batches: how many there are to draw from, those of weight 0 included.
        seed: of the draws.
        ends: the running sum of the batches' weights.
        of_batch: the matvec of the batch at a place.
        places: Places of the batches that have a weight.
        replace: Whether batches are drawn with replacement.
    """

    full: Matvec
    batches: int
    seed: int
    ends: tuple[float, ...] = field(repr=False)
    of_batch: Callable[[int], Matvec] = field(repr=False)
    places: tuple[int, ...] = field(repr=False)
    replace: bool = False

    @property
    def population(self) -> int | None:
        """Number of draws that make a full pass; None for draws with replacement."""
        return None if self.replace else len(self.places)

    def batch(self, i: int, /) -> int:
        """Return the place of the i-th draw's batch, a function of (seed, i) alone."""
        if not self.replace:
            turn, at = divmod(i, len(self.places))
            return self.places[_order(self.seed, len(self.places), turn)[at]]
        point = float(uniforms(1, self.seed, _BATCH_OF_DRAW, i, device=torch.device("cpu")))
        found = bisect_right(self.ends, point * self.ends[-1])
        # A point that rounds up to the end belongs to the last batch that has a weight.
        return min(found, self.ends.index(self.ends[-1]))

    def __call__(self, i: int, /) -> Matvec:
        place = self.batch(i)
        matvec = self.of_batch(place)
        if self.replace:
            return matvec
        weight = self.ends[place] - (self.ends[place - 1] if place else 0.0)
        share = weight / self.ends[-1] * len(self.places)
        return matvec if abs(share - 1) < 1e-12 else scale(matvec, share)


@lru_cache(maxsize=8)
def _order(seed: int, count: int, turn: int) -> list[int]:
    """Return a random order of this many batches, another one in each pass."""
    points = uniforms(count, seed, _ORDER_OF_PASS, turn, device=torch.device("cpu"))
    return points.argsort(stable=True).tolist()


@validated
def draws(
    curvature: Curvature,
    /,
    *,
    weight: Callable[[Any], float] | None = None,
    replace: bool = False,
    seed: int | None = None,
) -> Callable[[Tree, Sequence[Any]], Draws]:
    """Draw random batches of a data set, as a function ``(params, batches) -> Draws``.

    The plain mean over draws is unbiased for the curvature of the whole data set, however unequal
    the batches are:

        E[A_draw] = sum_b weight(b) A_b / sum_b weight(b).

    By default the B batches are drawn without replacement, in one random order after another, and
    the curvature of batch b is multiplied by B weight(b) / sum_b weight(b). The mean over a full
    pass is then exact. With ``replace=True`` batch b is drawn with the probability of its weight,
    and draws are independent of one another. Where the loss is a sum over examples and no weight
    is given, the curvature of the data set is the sum over batches, and so is the mean over draws.

    Args:
        curvature: Curvature of one batch.
        weight: Weight of a batch; by default the number of its examples. Pass your own for a
            cross-entropy with ignored targets or class weights, which is refused otherwise.
            Batches of weight 0 are never drawn.
        replace: Whether batches are drawn with replacement.
        seed: of the draws: the i-th depends on (seed, i) alone. None draws a seed once, here.

    Returns:
        (from the function) `Draws`. A batch is read anew at each draw and its graph is made
        anew; it lives as long as the matvec of that draw.

    Raises:
        TypeError: (from the function) the batches have no length or no places.
        ValueError: (from the function) there is no batch; a weight is negative, or all are 0; a
            model uses batch statistics (BatchNorm in train mode) on more than one batch.
        ValueError: (from a draw) a loss that divides by weights or kept targets meets a batch in
            which their share differs, and no weight is given.
        RuntimeError: (from a draw) params have changed in place since the draws were made.

    Cost: each batch is read once to be weighed; a draw costs what ``curvature`` of its batch does.
    """
    seed = of_matrix(seed)

    def of_data(params: Tree, batches: Sequence[Any]) -> Draws:
        if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")):
            raise TypeError(
                f"batches is a {type(batches).__name__}, from which no single batch can be "
                "picked: pass list(loader), or the pieces of `microbatches`"
            )
        full = over_batches(curvature, weight=weight)(params, batches)
        counted = [float((weight or examples)(batches[b])) for b in range(len(batches))]
        ends = _running_sum(counted)
        places = tuple(b for b, each in enumerate(counted) if each > 0)
        average = Average(weight, several=len(ends) > 1)
        space = space_of(params)
        refuse_if_changed = unchanged(space.names, space.tree_leaves(params))

        def of_batch(place: int) -> Matvec:
            refuse_if_changed()
            with several_batches() if len(ends) > 1 else nullcontext(), watching() as seen:
                matvec = curvature(params, batches[place])
                # A batch of one example does not tell a mean from a sum.
                largest = batches[counted.index(max(counted))]
                average.decide(seen, batch=largest, counted=True)
            share = ends[-1] / counted[place]
            if weight is None and any(isinstance(one, Inner) for one in seen):
                return _of_inner(matvec, average, average.later(batches[place]), share, ends[-1])
            return scale(matvec, share) if average.is_sum else matvec

        return Draws(full, len(ends), seed, ends, of_batch, places, replace)

    return of_data


def _of_inner(
    matvec: Matvec, average: Average, own: Callable[[], float], share: float, total: float
) -> Matvec:
    """Scale a mean or sum over batches that is one of the drawn batches.

    Args:
        matvec: Its matvec.
        average: How it is put together with others, known once it has made a product.
        own: Function that then gives its weight.
        share: Ratio of the weight of all drawn batches to that with which it is drawn.
        total: Weight of all drawn batches.
    """

    def drawn(block: Tree) -> Tree:
        product = matvec(block)
        weight = own()
        if average.is_sum:
            return tree_map(lambda leaf: share * leaf, product)
        if not math.isclose(weight * share, total, rel_tol=1e-6):
            raise ValueError(
                f"a batch was drawn with the weight {total / share:.6g}, but the batches within it "
                f"have {weight:.6g}: pass `weight=`, the sum of the weights within, such as "
                "`weight=lambda batches: sum(map(hessfunc.examples, batches))`"
            )
        return product

    return drawn


def _running_sum(weights: Sequence[float]) -> tuple[float, ...]:
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of a batch is {weight}: at least 0, and finite")
    if not sum(weights) > 0:
        raise ValueError(
            "the weights of the batches sum to zero: is the list empty, or does `weight` count "
            "nothing?"
        )
    return tuple(accumulate(weights))
