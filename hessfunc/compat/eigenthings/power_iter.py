"""Power iteration, one pair after another."""

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
from hessfunc.compat.eigenthings.operator import Operator, Start, operator_like, warn_of_residuals
from hessfunc.options import validated
from hessfunc.transforms.matvecs.arithmetic import deflate


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
    """The eigenpairs of largest absolute value, each on the matrix without those before it.

    Args:
        operator: of the matrix.
        num_eigenthings: how many pairs.
        power_iter_steps: the most products for each.
        power_iter_err_threshold: of the residual, relative to the value.
        momentum: in units of the eigenvalue squared; best near (lambda_2 / 2)^2.
        use_gpu: vectors lie on CUDA, where there is one; those of a model where it is.
        fp16: vectors are in float16.
        to_numpy: return NumPy arrays, rather than tensors on the CPU.

    Returns:
        ``(values, vectors)``, ``(k,)`` in descending order and ``(k, n)``.

    Raises:
        ValueError: there are not so many pairs, or another option is out of range.

    Warns:
        UserWarning: pairs have not converged.

    Cost: ``power_iter_steps`` products a pair.
    """
    n = operator.like(use_gpu=use_gpu).numel()
    if not 1 <= num_eigenthings <= n:
        raise ValueError(
            f"num_eigenthings={num_eigenthings}: the matrix has {n} eigenvalues, choose 1 to {n}"
        )
    found: list[Eigenpairs] = []
    for _ in range(num_eigenthings):
        start = Start.of(operator, use_gpu=use_gpu, fp16=fp16)
        pair = _dominant(
            operator, start, found, power_iter_steps, power_iter_err_threshold, momentum
        )
        found.append(pair)
    warn_of_residuals(found, power_iter_err_threshold, budget="power_iter_steps")
    values = torch.cat([pair.values for pair in found])
    order = values.argsort(descending=True)
    values = values[order]
    vectors = torch.cat([pair.vectors for pair in found]).cpu()[order]
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
    """The eigenpair of largest absolute value, as ``(value, vector)``.

    Args:
        operator: of the matrix.
        steps: the most products.
        error_threshold: of the residual, relative to the value.
        momentum: in units of the eigenvalue squared; best near (lambda_2 / 2)^2.
        use_gpu: the vector lies on CUDA, where there is one; that of a model where it is.
        fp16: the vector is in float16.
        init_vec: to start from; random by default.

    Warns:
        UserWarning: the pair has not converged.

    Cost: ``steps`` products.
    """
    start = Start.of(operator, init_vec, use_gpu=use_gpu, fp16=fp16)
    pair = _dominant(operator, start, [], steps, error_threshold, momentum)
    warn_of_residuals([pair], error_threshold, budget="steps")
    return float(pair.values[0]), pair.vectors[0]


def _dominant(
    operator: Operator,
    start: Start,
    found: Sequence[Eigenpairs],
    steps: int,
    threshold: float,
    momentum: float,
) -> Eigenpairs:
    """The dominant pair of the matrix without those that were found."""
    matvec = reduce(deflate, found, operator.matvec())
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
        matvec, lambda i: reduce(deflate, found, draw(i)), start.like, **options
    )
