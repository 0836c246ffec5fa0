"""Influence of training examples on their own losses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.results import SelfInfluence
from hessfunc.algorithms.results.result import Saved
from hessfunc.display import Reported
from hessfunc.losses import LossFunction
from hessfunc.options import at_least, validated
from hessfunc.options.outline import outline
from hessfunc.recipes.influence.system import Solves, System, refuse_unordered
from hessfunc.recipes.influence.training import TrainingPass, directory_of
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import rows_dtype
from hessfunc.transforms.batches.mean import partition_of
from hessfunc.transforms.batches.sums import Keep
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.example_gradients import example_gradients
from hessfunc.trees import Matvec, Tree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
    mesh: DeviceMesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
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
        mesh: Mesh of ranks as in `over_batches`, which divide the batches of A. They also divide
            the training examples if A has structured blocks; otherwise all ranks solve each system
            together. Every rank gets all scores.
        checkpoint: Directory, the same for all ranks, with the scores of each finished training
            batch. Another call with the same arguments resumes from it.
        progress: Function of a `Progress`, called after each round of a solve, and after each
            training batch; True for a bar or lines about the batches, as in `RunOptions`.

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
    space, partition = space_of(params), partition_of(mesh)
    system = System.of(
        loss, params, train_batches, curvature, damping, preconditioner, rtol, max_matvecs,
        weight=weight, keep=keep, mesh=mesh, progress=progress if callable(progress) else None,
    )  # fmt: skip
    directory, parameters = directory_of(checkpoint, params)
    over_training = TrainingPass(
        train_batches,
        partition,
        directory,
        progress,
        "self_influence",
        f"{parameters} {(damping, rtol, max_matvecs, outline(curvature))} ",
        is_collective=not system.is_inverted,
    )

    def scored(batch: Any, key: str) -> _BatchScores:
        scores, norms, solves = [], [], []
        for block in example_gradients(loss, params, batch, examples_per_chunk=examples_per_chunk):
            rows = space.ravel(block, dtype=rows_dtype(space))
            norms.append(space.norms(rows).cpu())
            solve = system.solve(rows)
            scores.append(space.by_leaf(solve.x, rows).sum(1).cpu())
            solves.append(replace(solve, x=solve.x[:0]))
        return _BatchScores(torch.cat(scores), torch.cat(norms), Solves.joined(solves), key)

    batches = over_training(scored)
    solves = Solves.joined([one.solves for one in batches])
    return SelfInfluence(
        scores=torch.cat([one.scores for one in batches]),
        damping=damping,
        residuals=solves.residuals,
        solved=solves.solved,
        norms=torch.cat([one.norms for one in batches]),
        **solves.cost,
    )


@dataclass(frozen=True)
class _BatchScores(Saved):
    """Scores of the m examples of one training batch for themselves.

    Attributes:
        scores: Scores, float64 ``(m,)``.
        norms: Norm of the gradient of each example, float64 ``(m,)``.
        solves: Solve of each example, without the solutions.
        key: Checksums of the parameters, options and batch; empty without a checkpoint.
    """

    scores: Tensor
    norms: Tensor
    solves: Solves
    key: str
