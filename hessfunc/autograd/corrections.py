"""Compositions of torch functions that replace wrong derivatives of torch.

Each replaced function has the right value, and in torch 2.13 a wrong second derivative, a wrong
derivative in forward mode, or one that is wrong at some cotangents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfunc.autograd.attention import ATTENTION
from hessfunc.autograd.constants import constant
from hessfunc.autograd.embedding import pure_lookup
from hessfunc.autograd.norms import WITH_STATISTICS
from hessfunc.autograd.overrides import Replacements

# Entries of which the log-sum-exp is taken by a triangular matrix.
_RUN = 64


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The second derivative of the fused kernel ignores that |v| depends on v.
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _logcumsumexp(input: Tensor, dim: int, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return torch.logcumsumexp(input, dim, out=out)
    # The backward of torch takes the logarithm of the cotangent, so its derivative is lost where
    # the cotangent is 0.
    if input.dim() == 0:
        return input.clone()
    x = input.movedim(dim, -1)
    if x.is_complex():
        return _accumulated(x).movedim(-1, dim)
    # Derivatives at minus infinity would be 0 times infinity.
    least = torch.finfo(x.dtype).min / 4
    y = _accumulated(x.clamp_min(least))
    return torch.where(y > least / 2, y, -math.inf).movedim(-1, dim)


def _accumulated(x: Tensor) -> Tensor:
    """Return y with exp(y_j) = sum_{i <= j} exp(x_i) along the last axis."""
    n = x.shape[-1]
    if n <= _RUN:
        later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        return x.unsqueeze(-2).masked_fill(later, -math.inf).logsumexp(-1)
    # Sums within runs of entries, to which the sums of all earlier runs are added.
    whole = n // _RUN * _RUN
    runs = _accumulated(x[..., :whole].unflatten(-1, (-1, _RUN)))
    before = _accumulated(runs[..., -1])
    parts = [runs[..., 0, :], _added(runs[..., 1:, :], before[..., :-1, None]).flatten(-2)]
    if whole < n:
        parts.append(_added(_accumulated(x[..., whole:]), before[..., -1:]))
    return torch.cat(parts, -1)


def _added(x: Tensor, y: Tensor) -> Tensor:
    # The second derivative of `logaddexp` overflows if one number is far below the other.
    return torch.stack(torch.broadcast_tensors(x, y)).logsumexp(0)


def _cholesky_inverse(input: Tensor, upper: bool = False) -> Tensor:
    # (L L')^-1 = L^-T L^-1. The backward of torch has entries beyond the triangle, and its
    # derivative in forward mode is wrong.
    lower = input.triu().mH if upper else input.tril()
    one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False)
    return inverse.mH @ inverse


def _cholesky_solve(input: Tensor, input2: Tensor, upper: bool = False) -> Tensor:
    # (L L')^-1 B = L^-T (L^-1 B).
    lower = input2.triu().mH if upper else input2.tril()
    inner = torch.linalg.solve_triangular(lower, input, upper=False)
    return torch.linalg.solve_triangular(lower.mH, inner, upper=True)


# Functions with one definition in every mode and at every order.
EXACT: Replacements = {
    torch._weight_norm: _weight_norm,
    torch.logcumsumexp: _logcumsumexp,
    Tensor.logcumsumexp: _logcumsumexp,
    torch.cholesky_inverse: _cholesky_inverse,
    Tensor.cholesky_inverse: _cholesky_inverse,
    torch.cholesky_solve: _cholesky_solve,
    Tensor.cholesky_solve: _cholesky_solve,
    **ATTENTION,
    **pure_lookup(),
    **WITH_STATISTICS,
}


def _of_symmetric(function: Any) -> Callable[..., Any]:
    """Return a function of a symmetric matrix with the derivatives that autograd gives it.

    The function reads one triangle, and its gradient with respect to A is symmetric, as if it read
    (A + A') / 2. Forward mode and finite differences would follow the triangle instead.
    """

    def symmetrised(*args: Any, **kwargs: Any) -> Any:
        name = next((name for name in ("input", "A") if name in kwargs), None)
        A, *options = args if name is None else (kwargs.pop(name), *args)
        side = str(kwargs.get("UPLO", options[0] if options else "L")).upper()
        upper = side in ("U", "TRUE") or kwargs.get("upper", False)
        fixed = constant(A)
        read = fixed.triu() + fixed.triu(1).mH if upper else fixed.tril() + fixed.tril(-1).mH
        symmetric = (A + A.mH) / 2
        return function(read + (symmetric - constant(symmetric)), *options, **kwargs)

    return symmetrised


# Functions whose derivatives depend on the mode.
SYMMETRIC: Replacements = {
    function: _of_symmetric(function)
    for function in (
        torch.cholesky,
        Tensor.cholesky,
        torch.linalg.cholesky,
        torch.linalg.cholesky_ex,
        torch.linalg.eigh,
        torch.linalg.eigvalsh,
    )
}


def _refused_product(function: Any) -> Callable[..., Tensor]:
    def refused(*args: Any, **kwargs: Any) -> Tensor:
        if "prod" in (*args, kwargs.get("reduce")):
            raise NotImplementedError(
                f"{function.__name__} with reduce='prod' has a wrong derivative in torch's forward "
                "mode: use mode='reverse', or the exponential of a sum of logarithms"
            )
        result: Tensor = function(*args, **kwargs)
        return result

    return refused


def _triangular_solve(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "torch.triangular_solve has a wrong second derivative in torch's forward mode: use "
        "torch.linalg.solve_triangular"
    )


# Functions that forward mode refuses.
REFUSED: Replacements = {
    **{
        function: _refused_product(function)
        for function in (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_)
    },
    torch.triangular_solve: _triangular_solve,
    Tensor.triangular_solve: _triangular_solve,
}
