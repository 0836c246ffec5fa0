"""Symmetric linear operators on flat vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.results import Eigenpairs
from hessfunc.compat.place import seed_of_stream
from hessfunc.numerics import rounding
from hessfunc.options import described, plain_callable, shape, tensor, validated
from hessfunc.transforms.matvecs.arithmetic import batched
from hessfunc.trees import Matvec

# Relative residual above which pairs in half precision cause a warning.
_COARSE = 1e-2
# Precision that is half or less.
_HALF = 1e-4


class Operator:
    """Symmetric linear operator on flat vectors; subclasses implement `apply`.

    Attributes:
        size: Number of entries of a vector, or shape of the matrix.
    """

    @validated(size=shape)
    def __init__(self, size: int | Sequence[int]) -> None:
        if not all(entries > 0 for entries in ((size,) if isinstance(size, int) else size)):
            raise ValueError(f"size={size}: pass a positive number of entries")
        self.size = size

    def apply(self, vec: Tensor) -> Tensor:
        """Return the product with one vector."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method `apply`: define it, or use "
            "LambdaOperator(function, size)"
        )

    def matvec(self) -> Matvec:
        """Return the matvec on flat vector blocks, the same for each product."""
        return batched(self.apply, chunk_size=1)

    def draws(self) -> Callable[[int], Matvec] | None:
        """Return a function that draws random matvecs with the mean `matvec`, or None."""
        return None

    def like(self, *, use_gpu: bool) -> Tensor:
        """Return a vector of zeros with the size, dtype and device of the vectors."""
        entries = self.size if isinstance(self.size, int) else self.size[0]
        device = "cuda" if use_gpu and torch.cuda.is_available() else "cpu"
        return torch.zeros(entries, dtype=torch.float32, device=device)


class LambdaOperator(Operator):
    """Linear operator of a function of one vector."""

    @validated(apply_fn=plain_callable, size=shape)
    def __init__(self, apply_fn: Callable[[Tensor], Tensor], size: int | Sequence[int]) -> None:
        super().__init__(size)
        self.apply_fn = apply_fn

    @validated(vec=tensor)
    def apply(self, vec: Tensor) -> Tensor:
        """Return the product with one vector."""
        return self.apply_fn(vec)


def warn_of_residuals(results: Sequence[Eigenpairs], tol: float, /, *, budget: str) -> None:
    """Warn in the caller's caller if a residual is above the tolerance and above rounding.

    Args:
        results: Eigenpairs of one matrix.
        tol: Tolerance of the residuals, relative to the value.
        budget: Name of the option that allows for more products.
    """
    eps = torch.finfo(results[0].vectors.dtype).eps
    floor = rounding(eps, max(pairs.largest for pairs in results))
    values, residuals = (
        torch.cat([getattr(pairs, name) for pairs in results]) for name in ("values", "residuals")
    )
    limits = (tol * values.abs()).clamp(min=floor)
    remedy = f"increase `{budget}`"
    if eps > _HALF:
        # The rounding of float16 may be as large as a small eigenvalue.
        limits = torch.minimum(limits, max(_COARSE, tol) * values.abs())
        remedy = "pass fp16=False, because float16 cannot resolve them, or " + remedy
    missing = residuals > limits
    if missing.any():
        warnings.warn(
            f"{int(missing.sum())} of {len(missing)} pairs have not converged, with residuals of "
            f"up to {float(residuals[missing].max()):.1e}: {remedy}",
            stacklevel=4,
        )


@dataclass(frozen=True)
class Start:
    """Start of a run on an operator.

    Attributes:
        like: Vector with the size, dtype and device of the vectors.
        vector: Start vector; None for a random one.
        seed: Seed of the random start vector.
    """

    like: Tensor
    vector: Tensor | None
    seed: int

    @classmethod
    def of(cls, operator: Operator, vector: Any = None, /, *, use_gpu: bool, fp16: bool) -> Start:
        """Return the start at a given vector, or at a random one from torch's random stream."""
        like = operator.like(use_gpu=use_gpu)
        if fp16:
            like = like.half()
        if vector is not None:
            vector = torch.as_tensor(vector, device=like.device).to(like)
        return cls(like, vector, seed_of_stream())


def operator_like(name: str, value: Any, /) -> Any:
    """An `Operator`, or another object with its methods."""
    if all(callable(getattr(value, method, None)) for method in ("matvec", "draws", "like")):
        return value
    raise TypeError(
        f"{name} must be an Operator, and is {described(value)}: pass "
        "LambdaOperator(function, size) or HVPOperator(model, dataloader, criterion)"
    )
