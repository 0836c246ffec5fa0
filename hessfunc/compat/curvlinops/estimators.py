"""Estimates of the trace, the diagonal and the Frobenius norm of a linear operator or tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hessfunc.algorithms.diagonal import hutchinson as diagonal_by_signs
from hessfunc.algorithms.diagonal import xdiag as diagonal_by_sketch
from hessfunc.algorithms.trace import hutchinson, hutchpp
from hessfunc.algorithms.trace import xtrace as trace_by_sketch
from hessfunc.compat.curvlinops.arguments import OF_MATRIX
from hessfunc.compat.curvlinops.matvecs import as_matvec
from hessfunc.compat.curvlinops.operator import PyTorchLinearOperator
from hessfunc.compat.place import seed_of_stream
from hessfunc.options import at_least, validated
from hessfunc.spaces.of import space_of

Distribution: TypeAlias = Literal["rademacher", "normal"]
_KINDS: dict[str, Literal["signs", "normal"]] = {"rademacher": "signs", "normal": "normal"}


@validated(**OF_MATRIX)
def hutchinson_trace(
    A: PyTorchLinearOperator | Tensor, num_matvecs: int, distribution: Distribution = "rademacher"
) -> Tensor:
    """Estimate the trace by `hutchinson`, with random signs or normal vectors.

    Args:
        A: Square operator or tensor.
        num_matvecs: Number of products, at least 2.
        distribution: Distribution of the random vectors, ``"rademacher"`` or ``"normal"``.
    """
    algorithm = partial(hutchinson.hutchinson, kind=_kind(distribution))
    like, estimate = _estimated(algorithm, A, num_matvecs, least=2)
    # Two samples are the fewest of a run. The mean of the first one has the same expectation.
    return like.new_tensor(float(estimate.samples[:num_matvecs].mean()))


@validated(**OF_MATRIX)
def hutchpp_trace(
    A: PyTorchLinearOperator | Tensor, num_matvecs: int, distribution: Distribution = "rademacher"
) -> Tensor:
    """Estimate the trace by `hutchpp`.

    Args:
        A: Square operator or tensor.
        num_matvecs: Number of products, at least 6.
        distribution: Ignored: the vectors are random directions.
    """
    _kind(distribution)
    like, estimate = _estimated(hutchpp.hutchpp, A, num_matvecs, least=6)
    return like.new_tensor(estimate.value)


@validated(**OF_MATRIX)
def xtrace(
    A: PyTorchLinearOperator | Tensor, num_matvecs: int, distribution: Distribution = "rademacher"
) -> Tensor:
    """Estimate the trace by XTrace.

    Args:
        A: Square operator or tensor.
        num_matvecs: Number of products, at least 4.
        distribution: Ignored: the vectors are random directions.
    """
    _kind(distribution)
    like, estimate = _estimated(trace_by_sketch.xtrace, A, num_matvecs, least=4)
    return like.new_tensor(estimate.value)


@validated(**OF_MATRIX)
def hutchinson_diag(
    A: PyTorchLinearOperator | Tensor, num_matvecs: int, distribution: Distribution = "rademacher"
) -> Tensor:
    """Estimate the diagonal by random signs, as `hutchinson_diagonal` does.

    Args:
        A: Square operator or tensor.
        num_matvecs: Number of products, at least 2.
        distribution: Ignored: normal vectors would increase the variance.
    """
    _kind(distribution)
    like, estimate = _estimated(diagonal_by_signs.hutchinson_diagonal, A, num_matvecs, least=2)
    return estimate.value.to(like)


@validated(**OF_MATRIX)
def xdiag(A: PyTorchLinearOperator | Tensor, num_matvecs: int) -> Tensor:
    """Estimate the diagonal by XDiag.

    Args:
        A: Square operator or tensor.
        num_matvecs: Number of products, at least 4.
    """
    like, estimate = _estimated(diagonal_by_sketch.xdiag, A, num_matvecs, least=4)
    return estimate.value.to(like)


@validated(**OF_MATRIX)
def hutchinson_squared_fro(
    A: PyTorchLinearOperator | Tensor, num_matvecs: int, distribution: Distribution = "rademacher"
) -> Tensor:
    """Estimate the squared Frobenius norm by the mean of ``|A w|^2`` over random vectors w.

    Args:
        A: Operator or tensor of any shape. The adjoint is used if it has fewer columns.
        num_matvecs: Number of products.
        distribution: Distribution of the random vectors, ``"rademacher"`` or ``"normal"``.
    """
    kind, count = _kind(distribution), _count(num_matvecs)
    A = A.T if A.shape[0] < A.shape[1] else A
    like = torch.zeros(A.shape[1], dtype=A.dtype, device=A.device)
    rows = space_of(like).probes(range(count), kind=kind, seed=seed_of_stream(), dtype=like.dtype)
    product: Tensor = A @ rows.mT
    return product.square().sum() / count


def _estimated(
    algorithm: Callable[..., Any],
    A: PyTorchLinearOperator | Tensor,
    num_matvecs: int,
    *,
    least: int,
) -> tuple[Tensor, Any]:
    """Return a vector of the domain, and the result of an algorithm that needs some products."""
    matvec, like = as_matvec(A)
    count = max(_count(num_matvecs), least)
    return like, algorithm(matvec, like, max_matvecs=count, seed=seed_of_stream())


def _kind(distribution: str) -> Literal["signs", "normal"]:
    if distribution not in _KINDS:
        raise ValueError(f"distribution={distribution!r}: choose 'rademacher' or 'normal'")
    return _KINDS[distribution]


def _count(num_matvecs: int) -> int:
    at_least(1, num_matvecs=num_matvecs)
    return num_matvecs
