"""Loss of a sharded model as a sum over ranks, each of which has its own rows of a batch.

    L = sum_r s_r L_r,   s_r = (terms of the rows of rank r) / (terms of the batch)

L_r is the loss of the rows of rank r, and a mean over terms, such as targets that are not ignored.
Each rank computes its part of a product from its shards and its rows. The collectives in the model
sum the parts. Neither the outputs nor the criterion exist for all rows on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessfunc.linear_head import LinearHeadLoss
from hessfunc.losses import Loss, LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.divisor import terms_of
from hessfunc.transforms.criteria import declared_reduction
from hessfunc.trees import Tree


@dataclass(frozen=True)
class Part:
    """Part of a curvature that this process computes; all of it without a sharded model.

    Attributes:
        loss: Loss of the leaves of `space`, and of `rows`.
        space: Space whose leaves the process holds.
        rows: Function that returns the rows of this process of a batch.
        share: Weight of the loss in that of the batch.
    """

    loss: Any
    space: Space
    rows: Callable[[Any], Any]
    share: float = 1.0

    def weighted(self, params: Tree, rows: Any, /) -> Tensor:
        """Return the loss of the rows times its share."""
        value: Tensor = self.loss(params, rows)
        return value if self.share == 1 else value * self.share

    def scaled(
        self, product: Callable[[list[Tensor]], Sequence[Tensor]], /
    ) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        """Return a matrix on the outputs of the rows times the share of the rows."""
        if self.share == 1:
            return product
        return lambda tangents: [self.share * x for x in product(tangents)]


def part_of(loss: LossFunction, params: Tree, batch: Any, /, *, by_rows: bool = True) -> Part:
    """Return the part of this process in the curvature of a loss.

    The rows are divided if the model of the loss is sharded, if the criterion is known to be a
    mean or a sum over rows, and if the rows of each rank have terms. Otherwise the loss is a
    function of DTensors and of the whole batch.

    Args:
        loss: Loss.
        params: Parameters.
        batch: Whole batch.
        by_rows: Whether the matrix is a sum over rows, given that the criterion is one.
    """
    space = space_of(params)
    part = _of_rank(loss, params, batch, space) if space.distributed and by_rows else None
    return Part(loss, space, lambda batch: batch) if part is None else part


def _of_rank(loss: LossFunction, params: Tree, batch: Any, space: Space) -> Part | None:
    if type(loss) not in (Loss, LinearHeadLoss):
        return None
    assert isinstance(loss, Loss)
    if (reduction := declared_reduction(loss.criterion)) is None:
        return None
    # The imports of torch.distributed are slow, and a tree of DTensors has already done them.
    from hessfunc.sharding.model import Shards, model_in, rows_of
    from hessfunc.spaces.dtensors import DTensorSpace
    from hessfunc.spaces.shards import ShardSpace

    model = model_in(loss.outputs, batch)
    if model is None or not model.has(params):
        return None
    assert isinstance(space, DTensorSpace)
    model.refuse_different(batch)
    ranks = model.rows(batch)
    terms = [_terms(loss, batch, rows, reduction) for rows in ranks]
    if not all(terms):
        return None
    own = ranks[model.parts.ranks.rank]
    share = 1.0 if reduction == "sum" else terms[model.parts.ranks.rank] / math.fsum(terms)

    shards = ShardSpace.of(space)
    point = shards.tree([leaf.detach() for leaf in shards.tree_leaves(params)])

    def rows_of_outputs(rows: Any) -> Any:
        if isinstance(loss, LinearHeadLoss):
            # Logits are never whole, and the head is not an output of rows.
            return loss.states(Shards(point), rows)[0]
        return loss.outputs(Shards(point), rows)

    model.refuse_coupled(loss.outputs, rows_of_outputs, batch)
    return Part(
        loss.of(Shards),
        shards,
        lambda batch: rows_of(batch, own),
        share,
    )


def _terms(loss: Loss, batch: Any, rows: range, reduction: str) -> float:
    """Return the number of terms of some rows, over which the loss is a mean."""
    from hessfunc.sharding.model import rows_of

    terms = None if reduction == "sum" or not rows else terms_of(loss, rows_of(batch, rows))
    return float(len(rows)) if terms is None else terms
