"""The cell of the ten dominant eigenpairs, each to a residual that a product has measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import hessfunc as hf
from bench import baselines
from bench.speed import models, ours
from bench.speed.asked import Alternative, Asked, Work, flat
from bench.speed.cells import Cell
from bench.speed.counted import Counted
from bench.speed.peers import curvlinops, eigenthings, pyhessian
from bench.speed.turns import Effort, Judged, prepared, rows_of, timed
from hessfunc.randomness import seeded
from hessfunc.spaces.of import space_of

TOP = 10
RESIDUAL = 1e-3
IMAGES = 500
_MICROBATCH = 50


class Pairs(NamedTuple):
    """Eigenvalues, their vectors as rows, and the products that they took."""

    values: Tensor
    rows: Tensor
    products: int


def eigenpairs(name: str, effort: Effort, examples: int = IMAGES) -> Cell:
    """The dominant eigenpairs of the Hessian of so many images.

    What is timed is the way from the net to the pairs: graphs are made inside of it.
    """
    asked = Asked(models.made(name, examples))
    ready, gaps = prepared(
        asked,
        ours.with_both_libraries(ALTERNATIVES),
        lambda pairs: Judged(_residual(asked, pairs), pairs.products),
    )
    found = timed(asked, ready, effort, RESIDUAL, each=False)
    return Cell(
        title=f"{asked.case.title.rpartition(',')[0]}, {examples} images",
        rounds=len(found.gradients),
        gradient=median(found.gradients),
        tolerance=RESIDUAL,
        rows=rows_of(ready, found),
        gaps=gaps,
    )


def _residual(asked: Asked, pairs: Pairs) -> float:
    """The largest residual, relative to the pair's own value."""
    product = baselines.kept(asked.case)
    rows = pairs.rows / pairs.rows.norm(dim=1, keepdim=True)
    images = torch.cat([flat(product(asked.split(row))) for row in rows])
    left = images - pairs.values.to(rows)[:, None] * rows
    return float((left.norm(dim=1) / pairs.values.to(rows).abs()).max())


def _ours(asked: Asked, **options: int) -> Work:
    cut = (x.split(_MICROBATCH) for x in (asked.case.inputs, asked.case.targets))
    in_parts = Asked(asked.case, asked.matrix, batches=list(zip(*cut, strict=True)))

    def call() -> hf.results.Eigenpairs:
        matvec, params = ours.matvec_of(in_parts)
        return hf.lanczos(matvec, params, k=TOP, rtol=RESIDUAL, seed=0, **options)

    def pairs(found: hf.results.Eigenpairs) -> Pairs:
        _, params = hf.functional(asked.case.model)
        rows = space_of(params).ravel(found.vectors)
        return Pairs(found.values, rows, found.matvecs)

    return Work(call, pairs)


def _power_iteration(asked: Asked) -> Work:
    def call() -> Pairs:
        made = pyhessian.hessian_of(asked)
        # The package has a class of the same name.
        module = importlib.import_module("pyhessian.hessian")
        plain = module.hessian_vector_product
        module.hessian_vector_product = Counted(plain)
        try:
            with seeded(0):
                values, vectors = made.eigenvalues(top_n=TOP)
            count = module.hessian_vector_product.count
        finally:
            module.hessian_vector_product = plain
        rows = torch.cat([flat(vector) for vector in vectors])
        # Each holds the graph of the other.
        asked.case.model.zero_grad()
        return Pairs(torch.tensor(values), rows, count)

    return Work(call, lambda pairs: pairs, note="as shipped: maxIter=100 a pair, tol=1e-3")


def _lanczos(asked: Asked, steps: int) -> Pairs:
    from hessian_eigenthings.algorithms import lanczos

    found = lanczos(
        eigenthings.operator_of(asked), k=TOP, max_iter=steps, reorthogonalize=True, seed=0
    )
    return Pairs(found.eigenvalues, found.eigenvectors, found.iterations)


def _arpack(asked: Asked, tol: float) -> Pairs:
    product = baselines.kept(asked.case)
    return _eigsh(
        lambda row: flat(product(asked.split(row)))[0], asked.n, asked.case.parameters[0], tol
    )


def _curvlinops(asked: Asked, tol: float) -> Pairs:
    operator = curvlinops.operator_of(asked)
    return _eigsh(lambda row: operator @ row, asked.n, asked.case.parameters[0], tol)


def _eigsh(product: Callable[[Tensor], Tensor], n: int, like: Tensor, tol: float) -> Pairs:
    from scipy.sparse.linalg import LinearOperator, eigsh

    def matvec(vector: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(vector).to(like).flatten()).detach().cpu().numpy()

    counted = Counted(matvec)
    operator = LinearOperator((n, n), matvec=counted, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    values, vectors = eigsh(operator, k=TOP, which="LM", tol=tol, v0=start)
    rows = torch.from_numpy(np.ascontiguousarray(vectors.T)).to(like)
    return Pairs(torch.from_numpy(values.copy()), rows, counted.count)


def _settled(
    asked: Asked, solve: Callable[[Asked, float], Pairs], settings: Sequence[float], name: str
) -> Work:
    """With the first setting that reaches the residual, which no user can know beforehand."""
    for setting in settings:
        if _residual(asked, solve(asked, setting)) <= RESIDUAL:
            break
    call = partial(solve, asked, setting)
    return Work(call, lambda pairs: pairs, note=f"told the best {name}={setting:g}")


ALTERNATIVES = [
    Alternative("hessfunc, lanczos, no search", "hessfunc", "ours", partial(_ours, search=0)),
    Alternative("hessfunc, lanczos", "hessfunc", "ours", _ours),
    Alternative("PyHessian, power iteration", "PyHessian", "peer", _power_iteration),
    Alternative(
        "hessian-eigenthings, lanczos",
        "hessian-eigenthings",
        "peer",
        lambda asked: _settled(asked, _lanczos, (24, 30, 36, 48, 72), "max_iter"),
    ),
    Alternative(
        "curvlinops, SciPy's eigsh",
        "curvlinops-for-pytorch",
        "peer",
        lambda asked: _settled(asked, _curvlinops, (1e-2, 1e-3, 1e-4), "tol"),
    ),
    Alternative(
        "SciPy's eigsh, graph kept",
        "scipy",
        "peer",
        lambda asked: _settled(asked, _arpack, (1e-2, 1e-3, 1e-4), "tol"),
    ),
]
