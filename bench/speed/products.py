"""Cells of products: of the Hessian and the GGN, one or a block, of a batch or a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from bench import baselines
from bench.speed import models, ours, plain
from bench.speed.asked import Alternative, Asked, differentiable_twice
from bench.speed.cells import Cell
from bench.speed.ours import with_both_libraries as both
from bench.speed.peers import backpack, curvlinops, eigenthings, pyhessian
from bench.speed.turns import Effort, Judged, prepared, rows_of, timed
from hessfunc.training.flops import CountedFlops

TOLERANCE = 1e-2
BATCHES = 20
BLOCK_OF_DATA = 8
# Twenty batches of these are the 500 images of the other questions.
_EXAMPLES = {"resnet20-trained": 25}

_HESSIAN = [
    *ours.PRODUCTS,
    *pyhessian.PRODUCTS,
    *eigenthings.PRODUCTS,
    *curvlinops.PRODUCTS,
    *backpack.PRODUCTS,
    *plain.PRODUCTS,
]
_GGN = [
    *ours.PRODUCTS,
    *eigenthings.PRODUCTS,
    *curvlinops.PRODUCTS,
    *backpack.PRODUCTS,
    *plain.GAUSS_NEWTON,
]
_DATA = [
    *ours.DATA,
    *pyhessian.DATA,
    *eigenthings.PRODUCTS,
    *curvlinops.PRODUCTS,
    *plain.DATA,
]


def product(name: str, effort: Effort) -> Cell:
    """One Hessian product, repeated on the same batch."""
    return cell_of(Asked(models.made(name)), both(_HESSIAN), effort)


def block(name: str, effort: Effort) -> Cell:
    """A block of Hessian products."""
    return cell_of(Asked(models.made(name), k=models.MODELS[name].block), both(_HESSIAN), effort)


def ggn(name: str, effort: Effort) -> Cell:
    """A block of GGN products."""
    asked = Asked(models.made(name), "ggn", models.MODELS[name].block)
    return cell_of(asked, both(_GGN), effort)


def compiled(name: str, effort: Effort) -> Cell:
    """A block of Hessian products, with ours compiled."""
    asked = Asked(models.made(name), k=models.MODELS[name].block)
    return cell_of(asked, both([*ours.COMPILED, *_HESSIAN]), effort)


def data(name: str, effort: Effort) -> Cell:
    """A block of products of the Hessian of a data set, in batches."""
    examples = _EXAMPLES.get(name, models.MODELS[name].examples)
    case = models.made(name, BATCHES * examples)
    asked = Asked(case, k=BLOCK_OF_DATA, batches=models.batches_of(case, BATCHES))
    return cell_of(asked, both(_DATA), effort)


def cell_of(asked: Asked, alternatives: Sequence[Alternative], effort: Effort) -> Cell:
    """The cell of products, one or a block, by all alternatives."""
    ready, gaps = prepared(asked, alternatives, judge(plain.expected(asked)))
    found = timed(asked, ready, effort, TOLERANCE)
    return Cell(
        title=asked.case.title,
        rounds=len(found.gradients),
        gradient=median(found.gradients),
        floor=floor(asked),
        tolerance=TOLERANCE,
        rows=rows_of(ready, found),
        gaps=gaps,
    )


def judge(expected: Tensor) -> Callable[[Tensor], Judged]:
    """The largest relative error of the rows of products, which may be the first ones alone."""

    def judged(rows: Tensor) -> Judged:
        of = expected[: len(rows)]
        return Judged(float(((rows - of).norm(dim=1) / of.norm(dim=1)).max()), len(rows))

    return judged


def floor(asked: Asked) -> float:
    """Return the operations of one product's matrix products over those of a gradient.

    A Hessian product is counted in plain autograd on a kept graph. A GGN product J'HJv takes a
    pullback and a pushforward, and these have the same number of operations. Inputs that need no
    gradient lower both. Attention is counted unfused, so that no kernel changes the count.
    """
    case = asked.own().case
    with differentiable_twice(case):
        gradient = _operations(lambda: baselines.gradient(case))
        if asked.matrix == "ggn":
            with torch.no_grad():
                forward = _operations(case.loss)
            return 2 * (gradient - forward) / gradient
        product, vector = baselines.kept(case), asked.vectors()[0]
        return _operations(lambda: product(vector)) / gradient


def _operations(call: Callable[[], object]) -> int:
    with CountedFlops() as counted:
        call()
    return counted.total
