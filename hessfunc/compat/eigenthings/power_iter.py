"""Power iteration with deflation, with the interface of pytorch-hessian-eigenthings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.eigen.power import power_iteration as exact_power_iteration
from hessfunc.algorithms.eigen.stochastic_power import stochastic_power_iteration
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.results.result import array
from hessfunc.compat.eigenthings.operator import (
    LambdaOperator,
    Operator,
    Start,
    operator_like,
    warn_of_residuals,
)
from hessfunc.options import validated
from hessfunc.transforms.matvecs.arithmetic import deflate

# Scripts import the operators from here, where they once were.
__all__ = ["LambdaOperator", "Operator", "deflated_power_iteration", "power_iteration"]


@validated(operator=operator_like)
def deflated_power_iteration(
    operator: Operator,
    num_eigenthings: int = 10,
    power_iter_steps: int = 20,
    power_iter_err_threshold: float = 1e-4,
    momentum: float = 0.0,
    use_gpu: bool = True,
    fp16: bool = False,
    to_numpy: bool = True,
) -> tuple[Any, Any]:
    """Compute the eigenpairs of largest absolute value, one after another by deflation.

    Args:
        operator: Operator of the matrix.
        num_eigenthings: Number of pairs.
        power_iter_steps: Largest number of products for each pair.
        power_iter_err_threshold: Tolerance of the residual, relative to the value.
        momentum: Momentum, in units of the eigenvalue squared. The best value is near
            (lambda_2 / 2)^2.
        use_gpu: Whether vectors are on CUDA, if available. Vectors of a model are on its device.
        fp16: Whether vectors are in float16.
        to_numpy: Whether to return NumPy arrays instead of tensors on the CPU.

    Returns:
        ``(values, vectors)`` of shapes ``(k,)``, in descending order, and ``(k, n)``.

    Raises:
        ValueError: If the matrix has fewer pairs, or if another option is out of range.

    Warns:
        UserWarning: If pairs have not converged.

    Cost: at most ``power_iter_steps`` products for each pair.
    """
    n = operator.like(use_gpu=use_gpu).numel()
    if not 1 <= num_eigenthings <= n:
        raise ValueError(
            f"num_eigenthings={num_eigenthings}: the matrix has {n} eigenvalues, choose 1 to {n}"
        )
    pairs: list[Eigenpairs] = []
    for _ in range(num_eigenthings):
        start = Start.of(operator, use_gpu=use_gpu, fp16=fp16)
        pair = _dominant(
            operator, start, pairs, power_iter_steps, power_iter_err_threshold, momentum
        )
        pairs.append(pair)
    warn_of_residuals(pairs, power_iter_err_threshold, budget="power_iter_steps")
    values = torch.cat([pair.values for pair in pairs])
    order = values.argsort(descending=True)
    values = values[order]
    vectors = torch.cat([pair.vectors for pair in pairs]).cpu()[order]
    return (array(values), array(vectors)) if to_numpy else (values, vectors)


@validated(operator=operator_like)
def power_iteration(
    operator: Operator,
    steps: int = 20,
    error_threshold: float = 1e-4,
    momentum: float = 0.0,
    use_gpu: bool = True,
    fp16: bool = False,
    init_vec: Any = None,
) -> tuple[float, Tensor]:
    """Compute the eigenpair of largest absolute value.

    Args:
        operator: Operator of the matrix.
        steps: Largest number of products.
        error_threshold: Tolerance of the residual, relative to the value.
        momentum: Momentum, in units of the eigenvalue squared. The best value is near
            (lambda_2 / 2)^2.
        use_gpu: Whether the vector is on CUDA, if available. The vector of a model is on its
            device.
        fp16: Whether the vector is in float16.
        init_vec: Start vector; random by default.

    Returns:
        ``(value, vector)``.

    Warns:
        UserWarning: If the pair has not converged.

    Cost: at most ``steps`` products.
    """
    start = Start.of(operator, init_vec, use_gpu=use_gpu, fp16=fp16)
    pair = _dominant(operator, start, [], steps, error_threshold, momentum)
    warn_of_residuals([pair], error_threshold, budget="steps")
    return float(pair.values[0]), pair.vectors[0]


def _dominant(
    operator: Operator,
    start: Start,
    accepted: Sequence[Eigenpairs],
    steps: int,
    threshold: float,
    momentum: float,
) -> Eigenpairs:
    """Compute the dominant pair of the matrix after deflation of earlier pairs."""
    matvec = reduce(deflate, accepted, operator.matvec())
    options: dict[str, Any] = {
        "momentum": momentum,
        "rtol": threshold,
        "max_matvecs": steps,
        "start": start.vector,
        "seed": start.seed,
    }
    draw = operator.draws()
    if draw is None:
        return exact_power_iteration(matvec, start.like, **options)
    return stochastic_power_iteration(
        matvec, lambda i: reduce(deflate, accepted, draw(i)), start.like, **options
    )
