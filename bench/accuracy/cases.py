"""Matrices on which methods are compared by products: the trace, diagonal and top are known.

A matrix is a function of rows, and methods see no more of it. Those of a net are made dense once,
from the products of its loss, and kept in bench/results/, which git ignores: dense, their trace
and diagonal are known exactly, and the products are the same numbers in a fraction of the time.
Only the ResNet-20 is too large for that, and is asked for eigenpairs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

import hessfunc as hf
from hessfunc.app.problems import data, targets
from hessfunc.randomness import seeded
from hessfunc.spaces.of import space_of
from hessfunc.trees import Matvec

Asked: TypeAlias = Literal["trace", "diagonal", "eigenpairs"]

TOP = 10

RESULTS = Path(__file__).parents[1] / "results"
_N = 1000
_DIGITS = 500
_IMAGES = 50
# Of the ResNet-20, at 2 MB each, both ways.
_PRODUCTS_KEPT = 500


@dataclass(frozen=True, eq=False)
class Matrix:
    """A symmetric matrix of which the answers are known.

    Attributes:
        title: for the table.
        n: its size.
        dtype: of its products.
        product: rows -> rows, ``(k, n)``.
        trace: exact, of float64; None where it is not known, and not asked for.
        diagonal: exact, float64 ``(n,)``, or None likewise.
        top: the `TOP` largest eigenvalues in absolute value, in that order, float64; None where
            they are not known, and residuals alone are the error.
        seeds: from how many seeds an estimator of the trace or of the diagonal is run.
        seeds_for_pairs: the same of eigenpairs, which hardly depend on them.
        most: products at which an estimate of the trace or of the diagonal is given up.
        most_for_pairs: products at which a search for eigenpairs is given up.
        costly: products take so long that methods which make other ones at each setting are not
            asked what it takes to reach an accuracy.
    """

    title: str
    n: int
    dtype: torch.dtype
    product: Callable[[Tensor], Tensor]
    trace: float | None
    diagonal: Tensor | None
    top: Tensor | None
    seeds: int
    seeds_for_pairs: int
    most: int
    most_for_pairs: int
    costly: bool = False

    def knows(self, asked: Asked) -> bool:
        """Whether the answer is known, or can be judged without."""
        return asked == "eigenpairs" or getattr(self, asked) is not None


def _synthetic(title: str, values: Callable[[Tensor], Tensor]) -> Matrix:
    """Given eigenvalues, as a function of i = 1 ... n, and a random eigenbasis."""
    eigenvalues = values(torch.arange(1, _N + 1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(_N, _N, dtype=torch.float64, generator=generator)).Q
    matrix = basis @ eigenvalues.diag() @ basis.mT
    matrix = (matrix + matrix.mT) / 2
    return Matrix(
        title,
        _N,
        matrix.dtype,
        lambda rows: rows @ matrix,
        float(eigenvalues.sum()),
        matrix.diagonal().clone(),
        eigenvalues[eigenvalues.abs().argsort(descending=True)][:TOP],
        seeds=20,
        seeds_for_pairs=20,
        # From n products on the matrix itself is known.
        most=_N - 1,
        most_for_pairs=5 * _N,
    )


def _ones_then(small: float, i: Tensor) -> Tensor:
    return torch.full_like(i, small).where(i > 50, 1.0)


def _digits(which: Literal["Hessian", "GGN"]) -> Matrix:
    """Of the net of ``hessfunc analyze digits``, on the first digits."""
    matrix = torch.from_numpy(_kept(f"digits-{which.lower()}", lambda: _dense(which))["matrix"])
    found = _kept(f"digits-{which.lower()}-top", lambda: {"values": _top(matrix)})
    diagonal = matrix.diagonal().double()
    return Matrix(
        f"digits {which}",
        len(matrix),
        matrix.dtype,
        lambda rows: rows @ matrix,
        float(diagonal.sum()),
        diagonal,
        torch.from_numpy(found["values"]),
        seeds=20,
        seeds_for_pairs=5,
        most=1000,
        most_for_pairs=1000,
    )


def _dense(which: Literal["Hessian", "GGN"]) -> dict[str, np.ndarray]:
    model, criterion, batches = targets.digits()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, criterion)
    inputs, labels = batches[0]
    curvature = hf.hvp(loss) if which == "Hessian" else hf.ggnvp(loss)
    flat, n = _on_rows(curvature(params, (inputs[:_DIGITS], labels[:_DIGITS])), params)
    matrix = torch.cat([flat(rows) for rows in _identity(n, 50)])
    return {"matrix": ((matrix + matrix.mT) / 2).numpy()}


def _top(matrix: Tensor) -> np.ndarray:
    """By ARPACK, with a basis and a tolerance that leave no doubt."""
    operator = LinearOperator(
        matrix.shape, lambda v: (matrix @ torch.from_numpy(v).to(matrix)).numpy(), dtype=np.float64
    )
    start = np.random.default_rng(0).standard_normal(len(matrix))
    values = eigsh(operator, k=2 * TOP, ncv=8 * TOP, tol=1e-7, v0=start)[0]
    return values[np.abs(values).argsort()[::-1]][:TOP]


def _resnet20() -> Matrix:
    """Trained, on the first test images of CIFAR-10, under HESSFUNC_DATA or beside the checkout."""
    root = data.data_root() or Path(__file__).parents[3] / "shared" / "data"
    weights = root / "resnet20_cifar10" / "resnet20-12fca82f.th"
    model, criterion, batches = targets.cifar10(root, weights)
    inputs, labels = batches[0]
    model_fn, params = hf.functional(model)
    # One row at a time, so that a product does not depend on those beside it.
    curvature = hf.hvp(hf.supervised(model_fn, criterion), chunk_size=1)
    flat, n = _on_rows(curvature(params, (inputs[:_IMAGES], labels[:_IMAGES])), params)

    # A Krylov method told to go further makes its first products again.
    @lru_cache(maxsize=_PRODUCTS_KEPT)
    def product(entries: bytes) -> Tensor:
        row = torch.frombuffer(bytearray(entries), dtype=torch.float32)
        return flat(row[None])[0]

    return Matrix(
        "ResNet-20 Hessian",
        n,
        torch.float32,
        lambda rows: torch.stack([product(row.numpy().tobytes()) for row in rows]),
        trace=None,
        diagonal=None,
        top=None,
        seeds=1,
        seeds_for_pairs=1,
        most=600,
        most_for_pairs=600,
        costly=True,
    )


def _on_rows(matvec: Matvec, params: Any) -> tuple[Callable[[Tensor], Tensor], int]:
    """The matvec on flat rows, and their length: what a library takes that knows no trees."""
    space = space_of(params)
    return lambda rows: space.ravel(matvec(space.unravel(rows))), space.n


def _identity(n: int, size: int) -> Iterator[Tensor]:
    for first in range(0, n, size):
        rows = torch.zeros(min(size, n - first), n)
        rows[:, first:].fill_diagonal_(1.0)
        yield rows


def _kept(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What ``make`` returns, from the file of an earlier run where there is one."""
    path = RESULTS / f"accuracy-{name}.npz"
    if not path.exists():
        with seeded(0):
            made = make()
        # Not savez(path), so that a run that is stopped here leaves no half of a file behind.
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **made)
        part.rename(path)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


SYNTHETIC: dict[str, Callable[[], Matrix]] = {
    "flat": partial(_synthetic, "linspace(1, 3)", lambda i: 1 + 2 * (i - 1) / (_N - 1)),
    "square": partial(_synthetic, "i^-2", lambda i: i**-2),
    "slow": partial(_synthetic, "0.9^i", lambda i: 0.9**i),
    "fast": partial(_synthetic, "0.7^i", lambda i: 0.7**i),
    "step": partial(_synthetic, "50 ones, 1e-3", partial(_ones_then, 1e-3)),
    "cliff": partial(_synthetic, "50 ones, 1e-8", partial(_ones_then, 1e-8)),
}

CASES: dict[str, Callable[[], Matrix]] = {
    **SYNTHETIC,
    "digits-hessian": partial(_digits, "Hessian"),
    "digits-ggn": partial(_digits, "GGN"),
    "resnet20": _resnet20,
}
