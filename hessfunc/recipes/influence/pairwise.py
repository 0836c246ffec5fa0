"""Influence of training examples on the losses of queries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.results import Influence
from hessfunc.algorithms.results.result import Saved
from hessfunc.containers import number_of
from hessfunc.display import Reported
from hessfunc.fingerprints import of_batches
from hessfunc.losses import Loss, LossFunction
from hessfunc.options import at_least, validated
from hessfunc.options.outline import outline
from hessfunc.recipes.influence.system import Solves, System, gradients_of, refuse_unordered
from hessfunc.recipes.influence.tokens import TokenLosses, token_losses
from hessfunc.recipes.influence.training import (
    NO_EXAMPLE,
    BatchScores,
    TrainingPass,
    directory_of,
    joined_scores,
    scores_of,
    stored,
)
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import rows_dtype
from hessfunc.transforms.batches.gradient import mean_gradient
from hessfunc.transforms.batches.mean import partition_of
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.batches.sums import Keep
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec, Tree, tree_map

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def _flag_or_losses(name: str, value: Any) -> bool | TokenLosses:
    check = options.plain_callable if callable(value) else options.flag
    made: bool | TokenLosses = check(name, value)
    return made


@validated(curvature=options.curvature_or_matvec, by_token=_flag_or_losses)
def influence(
    loss: LossFunction,
    params: Tree,
    train_batches: Iterable[Any],
    query_batches: Iterable[Any],
    /,
    *,
    damping: float,
    curvature: Curvature | Matvec | None = None,
    preconditioner: Matvec | None = None,
    query_loss: LossFunction | None = None,
    aggregate: bool = False,
    by_leaf: bool = False,
    by_token: bool | TokenLosses = False,
    rank: int | None = None,
    rtol: float = 1e-4,
    max_matvecs: int = 1000,
    weight: Callable[[Any], float] | None = None,
    keep: Keep = False,
    examples_per_chunk: int | None = None,
    mesh: DeviceMesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Reported = None,
) -> Influence:
    """Compute the influence of each training example on the loss of each query.

        S[i, j] = g_i' (A + damping I)^-1 g_j,    g = gradient of the loss of one example

    A is a curvature matrix of the mean training loss L. If example j gets a larger weight in
    training, L + epsilon l_j, the minimum moves by -epsilon (A + damping I)^-1 g_j to first order,
    and the loss of query i changes by -epsilon S[i, j]. A positive score therefore means that more
    weight lowers the loss of the query. Leaving out one of m examples is the weight -1/m, which
    changes the loss by S[i, j] / m.

    For an L2 penalty of training that is not part of the loss, pass its factor as the damping. In
    a net that is not at a minimum, the damping is a parameter of the method: choose it on held-out
    subsets, because it matters as much as the choice of A.

    Each batch of queries is solved as a block of right-hand sides. The gradients of the training
    examples are then computed in one pass over the data, and only their inner products with the
    solutions are kept.

    Examples:
        >>> loss = hf.supervised(lambda w, x: x @ w, torch.nn.functional.mse_loss)
        >>> inputs = torch.eye(2, dtype=torch.float64)
        >>> train = [(inputs, torch.tensor([1.0, -1.0], dtype=torch.float64))]
        >>> queries = [(inputs[:1], torch.ones(1, dtype=torch.float64))]
        >>> w = torch.zeros(2, dtype=torch.float64)
        >>> hf.influence(loss, w, train, queries, damping=1.0).scores.round(decimals=3)
        tensor([[2., 0.]], dtype=torch.float64)

    Args:
        loss: Training loss, ``(params, batch) -> scalar``.
        params: Trained parameters.
        train_batches: Any re-iterable of training batches, in a fixed order.
        query_batches: Any re-iterable of batches of queries.
        damping: Number that is added to the diagonal of A.
        curvature: Curvature function whose mean over the training batches is A, such as
            ``hvp(loss)`` or ``kronecker.ekfac(loss, model)``, or the matvec of A. The default is
            ``ggnvp(loss)``. Structured blocks are inverted; other matrices are solved by `cg`.
        preconditioner: Preconditioner of `cg`, such as ``blocks.inverse(damping)`` for the
            Kronecker factors of the data set.
        query_loss: Loss of queries, ``(params, batch) -> scalar``, any differentiable function;
            by default the training loss.
        aggregate: Whether the mean loss of all queries, as in `over_batches`, is the only query.
        by_leaf: Whether to keep the part of the scores that belongs to each leaf.
        by_token: Whether to keep the part of the scores that belongs to each token, for a
            cross-entropy. For another loss, a function ``(params, batch) -> losses`` of shape
            (examples, tokens) that sum to the loss of each example.
        rank: Project the query gradients on their top ``rank`` singular directions, so that only
            ``rank`` systems are solved. The residuals include the part that is left out.
        rtol: Relative tolerance of the residual of each solve.
        max_matvecs: Budget, the largest number of products for each system, on average over a
            block.
        weight: Weight of a training batch in A, and of a query batch if ``aggregate``, as in
            `over_batches`.
        keep: Whether the graph of every training batch is kept, as in `over_batches`.
        examples_per_chunk: Number of examples that vmap differentiates at once; 1 is a loop
            without vmap. By default, the gradients of one pass take 64 MiB.
        mesh: Mesh of ranks as in `over_batches`, which divide the batches of A and the gradients of
            the training examples. Every rank gets all scores.
        checkpoint: Directory, the same for all ranks, with the solutions and with the scores of
            each finished training batch. Another call with the same arguments resumes from it.
        progress: Function of a `Progress`, called after each round of a solve, and after each
            training batch; True for a bar or lines, as in `RunOptions`.

    Returns:
        `Influence`, with the scores, the residual of each query, and a bound of the error.

    Raises:
        TypeError: If an argument has the wrong type, or if batches can be read only once.
        ValueError: If an option is out of range, if a loader shuffles, if a batch cannot be divided
            into examples, if a gradient is not finite, or if A + damping I is not positive
            definite, if the parts of the tokens do not sum to the scores, or if the checkpoint
            belongs to other parameters, data or options.
        NotImplementedError: If the parameters are DTensors.
        RuntimeError: If vmap does not support the model.

    Cost: the products of `cg` for each query, one gradient for each training example, and q n
    operations for its scores. Parts of tokens add a forward-mode product for each query and
    training batch. Memory: the solutions of all queries, the gradients of one chunk, and, while a
    batch of queries is solved, 14 vectors per query of it.

    Source: Koh and Liang 2017, arXiv 1703.04730; EKFAC: Grosse et al. 2023, arXiv 2308.03296;
    projections: Park et al. 2023, TRAK, arXiv 2303.14186.
    """
    at_least(1, rank=rank, examples_per_chunk=examples_per_chunk)
    for batches in (train_batches, query_batches):
        refuse_unordered(batches)
    if number_of(train_batches) == 0:
        raise ValueError(NO_EXAMPLE)
    if number_of(query_batches) == 0:
        raise ValueError(_NO_QUERY)
    space, partition = space_of(params), partition_of(mesh)
    measured = loss if query_loss is None else _explained(query_loss)
    tokens = by_token if callable(by_token) else token_losses(loss) if by_token else None
    directory, key = directory_of(checkpoint, params)
    if directory is not None:
        settings = damping, rank, rtol, max_matvecs, aggregate, tokens is not None
        key = f"{key} {of_batches(query_batches)} {(*settings, outline(curvature))}"

    def solved() -> _Queries:
        gradients: Iterator[Tree]
        if aggregate:
            average = Average.over(weight, query_batches)
            _, mean = mean_gradient(measured, average, params, query_batches)
            gradients = iter([tree_map(lambda leaf: leaf[None], mean)])
        else:
            gradients = gradients_of(measured, params, query_batches, examples_per_chunk)
        system = System.of(
            loss, params, train_batches, curvature, damping, preconditioner, rtol, max_matvecs,
            weight=weight, keep=keep, mesh=mesh, progress=progress,
        )  # fmt: skip
        return _solved(system, gradients, rank, key)

    if directory is None:
        queries = solved()
    else:
        # All ranks resume, or all solve: the products may be collective.
        file = directory / "queries.npz"
        exists = all(partition.gathered(file.exists()))
        is_first = partition.writes and partition.place(0) == 0
        queries = stored(file, key, solved, exists=exists, writes=is_first)
    over_training = TrainingPass(train_batches, partition, directory, progress, "influence")

    def scored(batch: Any, key: str) -> BatchScores:
        return scores_of(loss, params, batch, queries.solves.x, tokens, examples_per_chunk, key)

    train = joined_scores(over_training(scored))
    # Scores of the directions, (leaves, r, m), combined to those of the queries.
    parts = queries.coefficients @ train.parts
    return Influence(
        scores=parts.sum(0),
        damping=damping,
        residuals=queries.residuals,
        solved=queries.solved,
        query_norms=queries.norms,
        train_norms=train.norms,
        by_leaf=dict(zip(space.names, parts, strict=True)) if by_leaf else None,
        by_token=None
        if train.tokens is None
        else torch.einsum("qr,rmt->qmt", queries.coefficients, train.tokens),
        **queries.solves.cost,
    )


@dataclass(frozen=True)
class _Queries(Saved):
    """Solutions for r directions, of which the queries are linear combinations.

    Attributes:
        solves: Solve of each direction.
        coefficients: Coefficients of the queries, float64 ``(q, r)``.
        residuals: Bound of the residual of each query, float64 ``(q,)``.
        solved: Whether the solves of each query are within the tolerance, bool ``(q,)``.
        norms: Norm of the gradient of each query, float64 ``(q,)``.
        key: Checksums and options with which the queries were solved; empty without a checkpoint.
    """

    solves: Solves
    coefficients: Tensor
    residuals: Tensor
    solved: Tensor
    norms: Tensor
    key: str


def _solved(system: System, gradients: Iterator[Tree], rank: int | None, key: str) -> _Queries:
    space = system.space
    blocks = (space.ravel(block, dtype=rows_dtype(space)) for block in gradients)
    if rank is None:
        pairs = [(system.solve(rows), space.norms(rows).cpu()) for rows in blocks]
        if not pairs:
            raise ValueError(_NO_QUERY)
        norms = torch.cat([norm for _, norm in pairs])
        identity = torch.eye(len(norms), dtype=norms.dtype, device=norms.device)
        solves = Solves.joined([solve for solve, _ in pairs])
        return _Queries(solves, identity, solves.residuals, solves.solved, norms, key)
    every = list(blocks)
    if not every:
        raise ValueError(_NO_QUERY)
    rows = torch.cat(every)
    # Q = U diag(s) V': the queries are combinations U_r diag(s_r) of the directions V_r.
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    kept = min(rank, int((values > 0).sum()) or 1)
    solves = system.solve(right[:kept])
    norms = space.norms(rows).cpu()
    coefficients = (left[:, :kept] * values[:kept]).to(norms.dtype).cpu()
    # |g - P g|^2 = |g|^2 - |P g|^2, and the residual of P g is at most sum_k |c_k| |r_k|.
    outside = (norms.square() - coefficients.square().sum(1)).clamp_min(0).sqrt()
    bound = outside + coefficients.abs() @ solves.residuals
    solved = solves.solved.all().repeat(len(rows))
    return _Queries(solves, coefficients, bound, solved, norms, key)


_NO_QUERY = "there is no query: pass at least one batch in `query_batches`"


def _explained(query_loss: LossFunction) -> LossFunction:
    """Return the loss of queries, whose type errors say what its arguments are.

    A criterion of outputs and targets, passed as the loss, fails with an error of its own.
    """
    if isinstance(query_loss, Loss):
        return query_loss

    def measured(params: Tree, batch: Any) -> Tensor:
        try:
            return query_loss(params, batch)
        except (TypeError, AttributeError) as error:
            raise TypeError(
                f"query_loss(params, batch) raised {type(error).__name__}, {error}: it takes the "
                "parameters and a batch of queries; for a criterion of outputs and targets, pass "
                "`supervised(model_fn, criterion)`"
            ) from error

    return measured
