"""Linear maps of flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessfunc.options import described
from hessfunc.transforms.arithmetic import batched
from hessfunc.trees import Matvec

__all__ = ["LambdaOperator", "Operator", "operator_like"]


class Operator:
    """A symmetric linear map of flat vectors; a subclass says what `apply` does.

    Attributes:
        size: the number of entries of a vector, or the shape of the matrix.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    def apply(self, vec: Tensor) -> Tensor:
        """The product with one vector."""
        raise NotImplementedError

    def matvec(self) -> Matvec:
        """The map on flat blocks, the same at each product."""
        return batched(self.apply, chunk_size=1)

    def draws(self) -> Callable[[int], Matvec] | None:
        """Random maps whose mean is `matvec`; None where there is nothing to draw from."""
        return None

    def like(self, *, use_gpu: bool) -> Tensor:
        """What a vector looks like."""
        entries = self.size if isinstance(self.size, int) else self.size[0]
        device = "cuda" if use_gpu and torch.cuda.is_available() else "cpu"
        return torch.zeros(entries, dtype=torch.float32, device=device)


class LambdaOperator(Operator):
    """The map of a function of one vector."""

    def __init__(self, apply_fn: Callable[[Tensor], Tensor], size: int | Sequence[int]) -> None:
        super().__init__(size)
        self.apply_fn = apply_fn

    def apply(self, vec: Tensor) -> Tensor:
        """The product with one vector."""
        return self.apply_fn(vec)


def operator_like(name: str, value: Any, /) -> Any:
    """An `Operator`, or another object with its methods."""
    if all(callable(getattr(value, method, None)) for method in ("matvec", "draws", "like")):
        return value
    raise TypeError(
        f"{name} must be an Operator, and is {described(value)}: pass "
        "LambdaOperator(function, size) or HVPOperator(model, dataloader, criterion)"
    )
