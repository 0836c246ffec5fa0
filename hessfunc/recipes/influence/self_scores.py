"""Influence of training examples on their own losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hessfunc import options
from hessfunc.algorithms.results import SelfInfluence
from hessfunc.display import Reported
from hessfunc.losses import LossFunction
from hessfunc.options import at_least, validated
from hessfunc.recipes.influence.system import System, gradients_of, refuse_unordered
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import rows_dtype
from hessfunc.transforms.batches.sums import Keep
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec, Tree


@validated(curvature=options.curvature_or_matvec)
def self_influence(
    loss: LossFunction,
    params: Tree,
    train_batches: Iterable[Any],
    /,
    *,
    damping: float,
    curvature: Curvature | Matvec | None = None,
    preconditioner: Matvec | None = None,
    rtol: float = 1e-4,
    max_matvecs: int = 1000,
    weight: Callable[[Any], float] | None = None,
    keep: Keep = False,
    examples_per_chunk: int | None = None,
    progress: Reported = None,
) -> SelfInfluence:
    """Compute the influence of each training example on its own loss.

        s[j] = g_j' (A + damping I)^-1 g_j

    The scores are the diagonal of `influence` with the training examples as queries. An example
    with a large score is predicted badly by the others; it may be mislabelled.

    Args:
        loss: Training loss, ``(params, batch) -> scalar``.
        params: Trained parameters.
        train_batches: Any re-iterable of training batches, in a fixed order.
        damping: Number that is added to the diagonal of A.
        curvature: Curvature function or matvec, as in `influence`.
        preconditioner: Preconditioner of `cg`, as in `influence`.
        rtol: Relative tolerance of the residual of each example.
        max_matvecs: Budget of products for each example, on average over a block.
        weight: Weight of a training batch in A, as in `over_batches`.
        keep: Whether the graph of every training batch is kept, as in `over_batches`.
        examples_per_chunk: Number of examples that are differentiated and solved at once, as in
            `influence`.
        progress: Function of a `Progress`, called after each round of a solve; True for a bar or
            lines, as in `RunOptions`.

    Raises:
        TypeError: If `influence` raises it.
        ValueError: If `influence` raises it.
        NotImplementedError: If the parameters are DTensors.
        RuntimeError: If vmap does not support the model.

    Cost: one gradient and one solve for each example. Structured blocks take no products for it.
    Memory: 14 vectors for each example of a chunk.

    Source: Koh and Liang 2017, arXiv 1703.04730; Pruthi, Liu, Kale and Sundararajan 2020,
    arXiv 2002.08484.
    """
    at_least(1, examples_per_chunk=examples_per_chunk)
    refuse_unordered(train_batches)
    space = space_of(params)
    system = System.of(
        loss, params, train_batches, curvature, damping, preconditioner, rtol, max_matvecs,
        weight=weight, keep=keep, progress=progress,
    )  # fmt: skip
    scores, norms = [], []
    for block in gradients_of(loss, params, train_batches, examples_per_chunk):
        rows = space.ravel(block, dtype=rows_dtype(space))
        norms.append(space.norms(rows))
        scores.append(space.by_leaf(system.solve(rows), rows).sum(1))
    if not scores:
        raise ValueError("there is no training example: pass at least one batch")
    return SelfInfluence(
        scores=torch.cat(scores).cpu(),
        damping=damping,
        residuals=torch.cat(system.residuals),
        solved=torch.cat(system.solved),
        norms=torch.cat(norms).cpu(),
        matvecs=system.matvecs,
        passes=system.passes,
        reason=system.reason,
        seed=None,
    )
