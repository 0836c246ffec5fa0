"""Products of `lanczos` and of ARPACK until all residuals are within a tolerance.

    python -m bench.arpack [--seeds 3] [--only digits]

Thirty questions about ten spectra in float64, where products are counted exactly. `eigsh` of SciPy
has a basis of 2 k + 10 vectors. Its tolerance is another one: of {10, 1, 1/3, 1/10, 1/100} rtol,
the loosest is taken with which all residuals are within ``rtol |value|``. `lanczos` runs with the
same basis and with its default, each including its certificate. Counts are medians over the seeds
of the start vector.

The table is written to bench/results/arpack.md unless ``--only`` is given.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

import hessfunc as hf
from bench.markdown import table
from hessfunc.app.problems.data import digits

RESULTS = Path(__file__).parent / "results"
_FACTORS = (10, 1, 1 / 3, 1 / 10, 1 / 100)
_MOST = 5000


@dataclass(frozen=True)
class Question:
    """Eigenpairs to be computed.

    Attributes:
        spectrum: Name of the matrix, as in `spectra`.
        which: Wanted end of the spectrum.
        k: Number of pairs.
        rtol: Largest residual, relative to the value.
    """

    spectrum: str
    which: Literal["LM", "LA", "SA", "BE"]
    k: int
    rtol: float


QUESTIONS = [
    Question("digits", "SA", 1, 1e-2),
    Question("digits", "SA", 5, 1e-4),
    Question("digits", "LM", 5, 1e-3),
    Question("digits", "LM", 10, 1e-4),
    Question("digits", "BE", 4, 1e-2),
    Question("digits", "LA", 20, 1e-4),
    Question("net-like", "LM", 5, 1e-4),
    Question("net-like", "LM", 15, 1e-3),
    Question("net-like", "SA", 3, 1e-3),
    Question("i^-.5", "LA", 6, 1e-4),
    Question("i^-.5", "LA", 20, 1e-3),
    Question("i^-1", "LM", 10, 1e-4),
    Question("i^-1", "LM", 30, 1e-6),
    Question("i^-2", "LM", 6, 1e-4),
    Question("i^-2", "LM", 15, 1e-2),
    Question("0.9^i", "LM", 10, 1e-4),
    Question("0.9^i", "LM", 3, 1e-8),
    Question("0.9^i", "LA", 25, 1e-3),
    Question("flat", "LA", 4, 1e-3),
    Question("flat", "SA", 2, 1e-3),
    Question("flat", "BE", 6, 1e-4),
    Question("semicircle", "LA", 5, 1e-4),
    Question("semicircle", "LM", 8, 1e-3),
    Question("semicircle", "SA", 1, 1e-3),
    Question("indefinite", "LM", 10, 1e-4),
    Question("indefinite", "BE", 8, 1e-3),
    Question("indefinite", "SA", 5, 1e-6),
    Question("Marchenko-Pastur", "LA", 6, 1e-4),
    Question("Marchenko-Pastur", "SA", 2, 1e-2),
    Question("large", "LM", 10, 1e-3),
]


def spectra(name: str) -> Tensor:
    """Return the eigenvalues of a diagonal matrix, or the dense Hessian of "digits"."""
    generator = torch.Generator().manual_seed(0)

    def i(n: int) -> Tensor:
        return torch.arange(1, n + 1, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    match name:
        case "digits":
            return _digits()
        case "net-like":
            return torch.cat([10 / i(10), -0.2 / i(5), 0.05 * normal(985) * i(985) ** -0.3])
        case "i^-.5" | "i^-1" | "i^-2":
            return i(1000) ** -float(name.removeprefix("i^-"))
        case "0.9^i":
            return 0.9 ** i(1000)
        case "flat":
            return torch.linspace(1, 3, 300, dtype=torch.float64)
        case "semicircle":
            matrix = normal(1500, 1500)
            return torch.linalg.eigvalsh((matrix + matrix.mT) / math.sqrt(6000))
        case "indefinite":
            return torch.where(i(1000) % 2 == 0, 1, -1) / i(1000)
        case "Marchenko-Pastur":
            return torch.linalg.svdvals(normal(1000, 2000)) ** 2 / 2000
        case _:
            return torch.cat([5 * 0.8 ** i(20), -(0.8 ** i(20)), 0.1 * normal(4960)])


def _digits() -> Tensor:
    """Return the Hessian of the net of docs/start.md, made once."""
    path = RESULTS / "arpack-digits.npy"
    if not path.exists():
        torch.manual_seed(0)
        loader = digits().batches(200)
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)
        )
        criterion = torch.nn.functional.cross_entropy
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            for inputs, targets in loader:
                optimizer.zero_grad()
                criterion(model(inputs), targets).backward()
                optimizer.step()
        model_fn, params = hf.functional(model.double().eval())
        batches = [(inputs.double(), targets) for inputs, targets in loader]
        loss = hf.supervised(model_fn, criterion)
        matvec = hf.over_batches(hf.hvp(loss), keep=True)(params, batches)
        matrix = hf.matrix(matvec, params).double().numpy()
        np.save(path, (matrix + matrix.T) / 2)
    return torch.from_numpy(np.load(path))


@dataclass
class Counted:
    """Products of a diagonal or a dense symmetric matrix, counted."""

    matrix: Tensor
    count: int = 0

    def __call__(self, block: Tensor) -> Tensor:
        """Return the products with a block of vectors."""
        self.count += len(block)
        return block * self.matrix if self.matrix.ndim == 1 else block @ self.matrix

    def hold(self, values: Tensor, vectors: Tensor, rtol: float) -> bool:
        """Whether all residuals are within the tolerance; its product is not counted."""
        images = Counted(self.matrix)(vectors)
        residuals = (images - values[:, None] * vectors).norm(dim=1)
        return bool((residuals <= rtol * values.abs()).all())


def by_arpack(question: Question, matrix: Tensor, seed: int) -> int:
    """Return the products of `eigsh` with the loosest tolerance that suffices."""
    n, best = len(matrix), _MOST
    start = np.random.default_rng(seed).standard_normal(n)
    for factor in _FACTORS:
        products = Counted(matrix)

        def product(vector: np.ndarray, products: Counted = products) -> np.ndarray:
            return products(torch.from_numpy(vector.reshape(1, -1))).numpy()[0]

        operator = LinearOperator((n, n), product, dtype=np.float64)
        try:
            values, vectors = eigsh(
                operator,
                k=question.k,
                which=question.which,
                ncv=2 * question.k + 10,
                tol=factor * question.rtol,
                maxiter=_MOST,
                v0=start,
            )
        except ArpackNoConvergence:
            break
        rows = torch.from_numpy(vectors.T.copy())
        if products.hold(torch.from_numpy(values), rows, question.rtol):
            return products.count
    return best


def by_lanczos(question: Question, matrix: Tensor, seed: int, basis: int | None) -> int:
    """Return the products of `lanczos`, which must have converged."""
    products = Counted(matrix)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="converged.*outside of the basis")
        pairs = hf.lanczos(
            products,
            torch.zeros(len(matrix), dtype=torch.float64),
            k=question.k,
            which=question.which,
            rtol=question.rtol,
            basis_size=basis,
            max_matvecs=_MOST,
            seed=seed,
        )
    if not products.hold(pairs.values, pairs.vectors, question.rtol):
        raise AssertionError(f"{question}: {pairs}")
    return products.count


def measured(question: Question, seeds: int) -> tuple[float, float, float]:
    """Return the products of ARPACK, of `lanczos` with an equal basis, and by default."""
    matrix = spectra(question.spectrum)
    methods: list[Callable[[int], int]] = [
        lambda seed: by_arpack(question, matrix, seed),
        lambda seed: by_lanczos(question, matrix, seed, 2 * question.k + 10),
        lambda seed: by_lanczos(question, matrix, seed, None),
    ]
    arpack, equal, default = (statistics.median(map(run, range(seeds))) for run in methods)
    return arpack, equal, default


def _rows(only: str, seeds: int) -> Iterator[list[str]]:
    ratios: list[tuple[float, float]] = []
    for question in QUESTIONS:
        if only not in question.spectrum:
            continue
        arpack, equal, default = measured(question, seeds)
        ratios.append((equal / arpack, default / arpack))
        shown = [question.spectrum, question.which, str(question.k), f"{question.rtol:g}"]
        counts = [f"{count:g}" for count in (arpack, equal, default)]
        yield [*shown, *counts, *(f"{ratio:.2f}" for ratio in ratios[-1])]
    columns = list(zip(*ratios, strict=True))
    yield ["geometric mean", *[""] * 6, *(f"{statistics.geometric_mean(c):.3f}" for c in columns)]
    yield ["worst", *[""] * 6, *(f"{max(column):.2f}" for column in columns)]


def main() -> None:
    """Measure all questions, and print the table."""
    parser = argparse.ArgumentParser(description="Products beside those of ARPACK.")
    parser.add_argument("--seeds", type=int, default=3, help="start vectors of each run")
    parser.add_argument("--only", default="", help="a part of the spectrum's name")
    options = parser.parse_args()
    head = ["spectrum", "which", "k", "rtol", "ARPACK", "basis 2 k + 10", "default"]
    lines = table([[*head, "ratio", "ratio by default"], *_rows(options.only, options.seeds)])
    if not options.only:
        (RESULTS / "arpack.md").write_text(lines + "\n")
    print(lines)


if __name__ == "__main__":
    main()
