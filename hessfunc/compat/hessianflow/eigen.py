"""The dominant eigenvalue of the Hessian, in eval mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.compat.place import evaluated_loss
from hessfunc.options import anything, validated
from hessfunc.tracking.undisturbed import undisturbed
from hessfunc.training.batches import refuse_iterators
from hessfunc.training.steps import Criterion
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.hessian import hvp


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
    """The eigenvalue of largest absolute value of the Hessian on one batch, and its vector.

    Args:
        model: in eval mode here, whatever its mode.
        inputs: of the batch.
        targets: of the batch.
        criterion: ``(outputs, targets) -> mean over the examples``.
        cuda: not read: the batch goes to where the parameters lie.
        maxIter: the most products; at least two are made.
        tol: stop when |H v - value v| <= tol |value|.

    Returns:
        ``(value, vector)``, the vector of unit length, as one tensor for each trainable parameter
        in the order of ``model.parameters()``. The random start is a function of torch's seed.

    Raises:
        ValueError: an option is out of range.
        FloatingPointError: a product is not finite.

    Warns:
        UserWarning: the residual is above the tolerance.

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
    """The eigenvalue of largest absolute value of the Hessian on a data set, and its vector.

    Args:
        model: as for `get_eigen`, like all below.
        dataloader: of batches ``(inputs, targets)``, each of which counts by its examples.
        criterion: ``(outputs, targets) -> mean over the examples``.
        cuda: not read.
        maxIter: the most products; at least two are made.
        tol: of the residual.

    Returns:
        As `get_eigen`.

    Raises:
        ValueError: an option is out of range; the batches can be read only once, or differ from
            one pass to the next, as with random augmentation.
        FloatingPointError: a product is not finite.

    Warns:
        UserWarning: the residual is above the tolerance.

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
    with undisturbed(model, batches):
        found = lanczos(
            over_batches(hvp(loss), weight=examples, keep=keep)(params, batches),
            params,
            k=1,
            rtol=tol,
            max_matvecs=max(most, 2),
            seed=torch.initial_seed(),
        )
    value, residual = float(found.values[0]), float(found.residuals[0])
    if not found.converged[0]:
        warnings.warn(
            f"the eigenvalue {value:.3g} has not converged to tol={tol:g}: its residual is "
            f"{residual:.1e} ({found.reason}); raise maxIter, or tol",
            stacklevel=4,
        )
    return value, [block[0] for block in found.vectors.values()]
