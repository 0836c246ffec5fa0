"""Laplace approximation of a posterior from the curvature of a loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hessfunc import options
from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.algorithms.matrix import matrix
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.factored_blocks import DiagonalBlock
from hessfunc.kronecker.factors import ekfac, kflr
from hessfunc.losses import Loss
from hessfunc.numerics import wide_dtype
from hessfunc.recipes.gauss_newton_diagonal import ggn_diagonal
from hessfunc.recipes.laplace.likelihood import family_of, likelihood_of
from hessfunc.recipes.laplace.posterior import Posterior
from hessfunc.recipes.laplace.precision import (
    BlockDiagonal,
    LowRank,
    PriorPrecision,
    as_numbers,
    positive,
    prior_of,
)
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.gauss_newton import ggnvp
from hessfunc.trees import Tree, tree_map

Structure: TypeAlias = Literal["full", "kronecker", "ekfac", "diagonal", "low_rank"]
_FACTORS = {"kronecker": kflr, "ekfac": ekfac}
# Least budget of products for the eigenpairs.
_MATVECS = 1000


@options.validated(prior_precision=options.factors, noise=options.factor)
def laplace(
    loss: Loss,
    params: Tree,
    batches: Iterable[Any],
    /,
    *,
    structure: Structure = "full",
    prior_precision: PriorPrecision = 1.0,
    noise: float | Tensor | None = None,
    temperature: float = 1.0,
    model: nn.Module | None = None,
    rank: int | None = None,
    seed: int | None = None,
) -> Posterior:
    """Approximate the posterior of trained parameters by a normal distribution.

        p(params | D) ~ N(params, (s G + D)^-1)

    G is the generalised Gauss-Newton matrix of the criterion, and D is the diagonal prior
    precision. The factor s makes the criterion the negative log-likelihood of the whole data set:
    cross-entropy and BCE-with-logits of classes, or ``mse_loss`` as
    ``|y - f|^2 / (2 noise^2)``. A mean criterion is multiplied by its number of terms. The
    parameters should minimise this sum plus ``params' D params / 2``, which is weight decay.

    | structure | approximation of G | memory |
    |---|---|---|
    | ``"full"`` | none | n^2 numbers |
    | ``"kronecker"`` | Kronecker product for each parameter, by `kflr` | both factors |
    | ``"ekfac"`` | their eigenvectors, exact eigenvalues, by `ekfac` | both factors, n numbers |
    | ``"diagonal"`` | exact diagonal, by `ggn_diagonal` | n numbers |
    | ``"low_rank"`` | leading eigenpairs, by `lanczos` | rank n numbers |

    The curvature is computed once. Other prior precisions and noises reuse it, in
    `log_marginal_likelihood` and `tuned`.

    Args:
        loss: Loss of a model and a criterion that is the negative logarithm of a likelihood, as
            made by `supervised` or `composed`. With `split` and `hold`, only some parameters are
            random, such as those of the last layer.
        params: Trained parameters, the mean of the posterior.
        batches: Batches of the training data, as in `over_batches`.
        structure: Structure of the curvature, from the table.
        prior_precision: Precision of the prior N(0, D^-1), a number, or a dict with the number of
            each parameter tensor by its name.
        noise: Standard deviation of normal targets, by default 1. Omitted for classes.
        temperature: Temperature T of the likelihood p(D | params)^(1/T); a cold posterior has
            T < 1.
        model: Module of the loss, which ``"kronecker"`` and ``"ekfac"`` need.
        rank: Number of eigenpairs, which ``"low_rank"`` needs.
        seed: Seed of the start vector of ``"low_rank"``.

    Returns:
        `Posterior`, with the marginal likelihood, samples and predictions.

    Raises:
        TypeError: If the loss does not expose its criterion, or if the batches can be read only
            once.
        ValueError: If the criterion is not the negative logarithm of a known likelihood, if a
            precision, the noise or the temperature is not positive, if an option does not belong to
            the structure, or if a layer of the model is random (dropout in train mode).
        NotImplementedError: If a parameter has no Kronecker factors for ``"kronecker"`` or
            ``"ekfac"``, or if the parameters are DTensors.
        MemoryError: If the full matrix does not fit in memory.

    Cost: one pass of evaluations, and n matvecs for ``"full"``, a Jacobian of each example for
    ``"kronecker"`` and ``"diagonal"``, about 2 to 5 rank matvecs for ``"low_rank"``.

    Source: MacKay 1992; Daxberger et al. 2021, arXiv 2106.14806.
    """
    family, space = family_of(loss), space_of(params)
    if space.distributed:
        raise NotImplementedError(
            "posteriors do not support DTensor parameters: gather them with `unsharded(model)`"
        )
    if structure not in get_args(Structure):
        choices = ", ".join(map(repr, get_args(Structure)))
        raise ValueError(f"structure={structure!r}: choose {choices}")
    if noise is not None and family != "normal":
        raise ValueError(f"noise={float(noise):g}: {family} targets have no noise; omit it")
    if (rank is not None) != (structure == "low_rank"):
        raise ValueError(
            f"structure={structure!r} and rank={rank}: pass a rank exactly for 'low_rank', such as "
            "structure='low_rank', rank=20"
        )
    if structure in _FACTORS and model is None:
        raise ValueError(f"structure={structure!r} needs the module: pass model=model")
    sigma = float(positive("noise", 1.0 if noise is None else noise, space))
    positive("temperature", temperature, space)
    prior = prior_of(params, prior_precision).precision
    # The other structures refuse random layers themselves.
    is_product = structure in ("full", "low_rank")
    likelihood = likelihood_of(loss, params, batches, checks_repetition=is_product)
    params = tree_map(lambda leaf: leaf.detach().clone(), params)
    curvature, cost = _curvature_of(loss, params, batches, structure, model, rank, seed)
    return Posterior(
        params=params,
        structure=structure,
        prior_precision=as_numbers(prior),
        noise=sigma if family == "normal" else None,
        temperature=temperature,
        likelihood=likelihood,
        curvature=curvature,
        **cost,
    )


def _curvature_of(
    loss: Loss,
    params: Tree,
    batches: Iterable[Any],
    structure: Structure,
    model: nn.Module | None,
    rank: int | None,
    seed: int | None,
) -> tuple[BlockDiagonal | LowRank, dict[str, Any]]:
    """Return the curvature of the criterion in a structure, and the cost of the run."""
    space, wide = space_of(params), wide_dtype(space_of(params).device)
    cost: dict[str, Any] = {
        "matvecs": 0,
        "passes": 1,
        "reason": "one pass over the data",
        "seed": None,
    }
    if structure == "full":
        dense = matrix(over_batches(ggnvp(loss))(params, batches), params).to(wide)
        values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
        return LowRank(values.clamp_min(0), vectors.mT), cost | {
            "matvecs": space.n,
            "reason": "exact",
        }
    if structure == "low_rank":
        assert rank is not None
        pairs = lanczos(
            over_batches(ggnvp(loss))(params, batches),
            params,
            k=rank,
            max_matvecs=max(_MATVECS, 10 * rank),
            seed=seed,
        )
        cost = {name: getattr(pairs, name) for name in cost}
        return LowRank(pairs.values.clamp_min(0).to(wide), space.rows(pairs.vectors).to(wide)), cost
    if structure == "diagonal":
        leaves = space.tree_leaves(ggn_diagonal(loss, params, batches))
        return BlockDiagonal(
            {
                name: DiagonalBlock(leaf, leaf.shape)
                for name, leaf in zip(space.names, leaves, strict=True)
            }
        ), cost
    assert model is not None
    try:
        factors = over_batches(_FACTORS[structure](loss, model))(params, batches)
    except NotImplementedError as error:
        reason, _, remedy = str(error).partition(": pass ")
        if "unsupported=" not in remedy:
            raise
        raise NotImplementedError(
            f"{reason}: use structure='full' or structure='diagonal', or hold the parameter fixed "
            "with `split` and `hold`"
        ) from error
    assert isinstance(factors, Blocks)
    return BlockDiagonal(factors.blocks), cost
