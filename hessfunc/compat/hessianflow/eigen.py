"""Dominant eigenvalue of the Hessian in eval mode, with the interface of HessianFlow."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.compat.place import evaluated_loss, hessian_of
from hessfunc.options import anything, validated
from hessfunc.tracking.undisturbed import undisturbed
from hessfunc.training.batches import refuse_iterators
from hessfunc.training.steps import Criterion
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.mean import over_batches


@validated(inputs=anything, targets=anything)
def get_eigen(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    criterion: Criterion,
    cuda: bool = True,
    maxIter: int = 50,
    tol: float = 1e-3,
) -> tuple[float, list[Tensor]]:
    """Compute the eigenpair of largest absolute value of the Hessian on one batch.

    The random start vector is a function of torch's seed.

    Args:
        model: Module, which is evaluated in eval mode.
        inputs: Inputs of the batch.
        targets: Targets of the batch.
        criterion: Function ``(outputs, targets) -> mean over the examples``.
        cuda: Ignored: the batch is moved to the device of the parameters.
        maxIter: Largest number of products; at least two are made.
        tol: Relative tolerance: stop when ``|H v - value v| <= tol |value|``.

    Returns:
        ``(value, vector)``. The vector has unit length and consists of one tensor for each
        trainable parameter, in the order of ``model.parameters()``.

    Raises:
        ValueError: If an option is out of range.
        FloatingPointError: If a product is not finite.

    Warns:
        UserWarning: If the residual is above the tolerance.

    Cost: at most ``maxIter`` products, by Lanczos, which takes fewer than power iteration.
    """
    return _dominant(model, [(inputs, targets)], criterion, maxIter, tol, keep=True)


@validated
def get_eigen_full_dataset(
    model: nn.Module,
    dataloader: Iterable[Any],
    criterion: Criterion,
    cuda: bool = True,
    maxIter: int = 50,
    tol: float = 1e-3,
) -> tuple[float, list[Tensor]]:
    """Compute the eigenpair of largest absolute value of the Hessian on a data set.

    Args:
        model: Module, which is evaluated in eval mode.
        dataloader: Loader of batches ``(inputs, targets)``, weighted by their numbers of examples.
        criterion: Function ``(outputs, targets) -> mean over the examples``.
        cuda: Ignored: batches are moved to the device of the parameters.
        maxIter: Largest number of products; at least two are made.
        tol: Relative tolerance of the residual, as in `get_eigen`.

    Returns:
        ``(value, vector)``, as in `get_eigen`.

    Raises:
        ValueError: If an option is out of range, if the batches can be read only once, or if they
            differ from one pass to the next (random augmentation).
        FloatingPointError: If a product is not finite.

    Warns:
        UserWarning: If the residual is above the tolerance.

    Cost: at most ``maxIter`` products, each one pass over the data.
    """
    return _dominant(model, dataloader, criterion, maxIter, tol, keep=False)


def _dominant(
    model: nn.Module,
    batches: Iterable[Any],
    criterion: Criterion,
    most: int,
    tol: float,
    *,
    keep: bool,
) -> tuple[float, list[Tensor]]:
    refuse_iterators(batches)
    loss, params = evaluated_loss(model, criterion)
    curvature = hessian_of(loss, [p for p in model.parameters() if p.requires_grad])
    with undisturbed(model, batches):
        pairs = lanczos(
            over_batches(curvature, weight=examples, keep=keep)(params, batches),
            params,
            k=1,
            rtol=tol,
            max_matvecs=max(most, 2),
            seed=torch.initial_seed(),
        )
    value, residual = float(pairs.values[0]), float(pairs.residuals[0])
    if not pairs.converged[0]:
        warnings.warn(
            f"the eigenvalue {value:.3g} has not converged to tol={tol:g}: its residual is "
            f"{residual:.1e} ({pairs.reason}); increase maxIter or tol",
            stacklevel=4,
        )
    return value, [block[0] for block in pairs.vectors.values()]
