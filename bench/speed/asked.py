"""What is asked of all alternatives, and what one of them does for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.baselines import Vector
from bench.speed.device import on_device
from bench.speed.models import Case
from hessfunc.randomness import seeded

# Ends the title of an alternative of ours whose matrix products are torch's own.
BY_TORCH = ", torch's matrix products"


Matrix = Literal["hessian", "ggn"]
Kind = Literal["ours", "peer", "plain"]


@dataclass(frozen=True)
class Asked:
    """Products of a matrix with a block of vectors.

    Attributes:
        case: the net; the batch, where there is one alone.
        matrix: of the loss of the batch, or of the mean over all batches.
        k: the vectors of the block.
        batches: of a data set, or none.
    """

    case: Case
    matrix: Matrix = "hessian"
    k: int = 1
    batches: Sequence[tuple[Tensor, Tensor]] = ()

    @property
    def n(self) -> int:
        return sum(p.numel() for p in self.case.parameters)

    def rows(self) -> Tensor:
        """The vectors, ``[k, n]``, the same for all alternatives."""
        return _rows(self.k, self.n)

    def columns(self) -> list[Tensor]:
        """The leaves of the block with the vectors along the last axis, as some libraries do."""
        return _columns(self.k, tuple(p.shape for p in self.case.parameters))

    def split(self, rows: Tensor) -> list[Tensor]:
        """The leaves of a vector or a block, as views: ``[..., *shape]``."""
        return _split(rows, tuple(p.shape for p in self.case.parameters))

    def vectors(self) -> list[Vector]:
        """The leaves of each vector."""
        return [self.split(row) for row in self.rows()]

    def own(self) -> Asked:
        """The same with a copy of the net: some leave gradients at its parameters."""
        return replace(self, case=replace(self.case, model=copy.deepcopy(self.case.model)))


@dataclass(frozen=True)
class Work:
    """What is prepared, and what is timed.

    Attributes:
        call: what is timed.
        answer: of what a call returns, outside of the time: products as rows, or what the
            question asks for. Rows are fewer than the block has where products are made one by
            one, as each takes as long as another.
        note: for the table.
    """

    call: Callable[[], Any]
    answer: Callable[[Any], Any]
    note: str = ""


@dataclass(frozen=True)
class Alternative:
    """One way to the answer.

    Attributes:
        title: the library, and which of its ways.
        package: of PyPI, whose version is recorded; none of plain autograd.
        kind: ours, another library, or plain autograd.
        make: prepares the work, outside of the time.
        alike: those that go about it in the same way, whose memory is compared.
    """

    title: str
    package: str
    kind: Kind
    make: Callable[[Asked], Work]
    alike: str = ""


# Made once, so that no alternative has the memory of them.
@lru_cache(maxsize=1)
def _rows(k: int, n: int) -> Tensor:
    with seeded(1):
        return on_device(torch.randn(k, n))


@lru_cache(maxsize=1)
def _columns(k: int, shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    rows = _rows(k, sum(shape.numel() for shape in shapes))
    return [leaf.movedim(0, -1).contiguous() for leaf in _split(rows, shapes)]


def _split(rows: Tensor, shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    parts = rows.split([shape.numel() for shape in shapes], -1)
    return [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def flat(leaves: Sequence[Tensor]) -> Tensor:
    """The row of a vector's leaves."""
    return torch.cat([leaf.detach().flatten() for leaf in leaves])[None]


def differentiable_twice(case: Case) -> AbstractContextManager[None]:
    """Attention in the form that has a second derivative, for libraries that leave it to users."""
    return sdpa_kernel(SDPBackend.MATH) if case.attention else nullcontext()
