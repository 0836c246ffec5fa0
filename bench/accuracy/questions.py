"""What is asked of a method, and how its products are counted."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeAlias

import torch
from torch import Tensor

import hessfunc as hf
from bench.accuracy.cases import TOP, Asked, Matrix

TOLERANCES = (1.0, 0.3, 0.1, 0.03, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6, 1e-7, 1e-8)

Pairs: TypeAlias = tuple[Tensor, Tensor]


class ExhaustedError(Exception):
    """A method wants more products than the case allows."""


@dataclass
class Products:
    """The products of a matrix, counted.

    Attributes:
        matrix: whose.
        limit: how many are allowed.
        count: products with one vector so far.
    """

    matrix: Matrix
    limit: int
    count: int = 0

    @property
    def like(self) -> Tensor:
        """A vector of the matrix's size and dtype."""
        return torch.zeros(self.matrix.n, dtype=self.matrix.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.count + len(rows) > self.limit:
            raise ExhaustedError
        self.count += len(rows)
        return self.matrix.product(rows)

    def of(self, vector: Tensor) -> Tensor:
        """With one vector ``(n,)``."""
        return self(vector[None])[0]


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        title: for the table.
        accuracy: the error that is allowed.
        error: of an answer.
    """

    title: str
    accuracy: float
    error: Callable[[Matrix, Any], float]


def _trace_error(matrix: Matrix, value: float) -> float:
    return abs(value - matrix.trace) / abs(matrix.trace)


def _diagonal_error(matrix: Matrix, value: Tensor) -> float:
    return float((value.double() - matrix.diagonal).norm() / matrix.diagonal.norm())


def _pairs_error(matrix: Matrix, pairs: Pairs) -> float:
    """The largest residual, or what the eigenvalues fall short, whichever is larger.

    Both relative to the largest eigenvalue, the one that was found where it is not known.
    Small residuals alone do not say that the pairs are the dominant ones, nor that there are ten:
    the same vector may be returned twice, which counts as an infinite error.
    """
    values, rows = pairs[0].double(), pairs[1].to(matrix.dtype)
    if len(values) < TOP or not bool(rows.isfinite().all()):
        return math.inf
    rows = rows / rows.norm(dim=1, keepdim=True)
    if float(torch.linalg.svdvals(rows.double())[-1]) < 0.5:
        return math.inf
    residuals = (matrix.product(rows).double() - values[:, None] * rows.double()).norm(dim=1)
    if matrix.top is None:
        return float(residuals.max() / values.abs().max())
    missing = matrix.top.abs() - values.abs().sort(descending=True).values
    return max(float(residuals.max()), float(missing.max())) / float(matrix.top[0].abs())


QUESTIONS: dict[Asked, Question] = {
    "trace": Question("The trace to 1 %", 0.01, _trace_error),
    "diagonal": Question("The diagonal to 10 %", 0.1, _diagonal_error),
    "eigenpairs": Question(
        f"The {TOP} dominant eigenpairs to residuals of 1e-4 |lambda_1|", 1e-4, _pairs_error
    ),
}


@dataclass(frozen=True)
class Method:
    """A way to answer a question.

    Attributes:
        package: from where, as PyPI calls it.
        name: within the package.
        asked: the question.
        told: ``(products, knob, seed) -> answer``, with the knob that says when to stop.
        knobs: its settings, the cheapest first; None for budgets, from 6 products on.
        shipped: ``(products, seed) -> answer`` by its own rule; None where it has none.
        rule: that rule, in words.
        module: what has to be importable.
        resumes: with another knob the products are the same ones, fewer or more of them.
    """

    package: str
    name: str
    asked: Asked
    told: Callable[[Products, Any, int], Any]
    knobs: Sequence[float] | None
    shipped: Callable[[Products, int], Any] | None
    rule: str
    module: str
    resumes: bool = False

    @property
    def title(self) -> str:
        return f"{self.package}: {self.name}"

    def version(self) -> str | None:
        """Of the package; None where it cannot be imported."""
        try:
            importlib.import_module(self.module)
        except ImportError:
            return None
        return hf.__version__ if self.module == "hessfunc" else metadata.version(self.package)
