"""hessian-eigenthings: takes any function of a vector."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from bench.accuracy.cases import TOP
from bench.accuracy.questions import TOLERANCES, Method, Pairs, Products


def _operator(products: Products) -> Any:
    from hessian_eigenthings.operators.base import LambdaOperator

    return LambdaOperator(products.of, products.matrix.n, dtype=products.matrix.dtype)


def _trace(products: Products, seed: int, **options: Any) -> float:
    from hessian_eigenthings.algorithms import trace

    return float(trace(_operator(products), seed=seed, **options).estimate)


def _pairs(name: str, products: Products, seed: int, **options: Any) -> Pairs:
    algorithms = importlib.import_module("hessian_eigenthings.algorithms")
    found = getattr(algorithms, name)(_operator(products), k=TOP, seed=seed, **options)
    return found.eigenvalues, found.eigenvectors


def _lanczos(products: Products, steps: int, seed: int) -> Pairs:
    """As good as it gets: reorthogonalised, which by default it is up to 50 steps alone."""
    steps = min(max(steps, TOP), products.matrix.n)
    options = {"max_iter": steps, "reorthogonalize": True}
    return _pairs("lanczos", products, seed, **options)


def _estimator(name: str, method: str, default: int) -> Method:
    return Method(
        "hessian-eigenthings",
        name,
        "trace",
        lambda products, budget, seed: _trace(products, seed, method=method, num_matvecs=budget),
        None,
        lambda products, seed: _trace(products, seed, method=method),
        f"num_matvecs={default}",
        "hessian_eigenthings",
    )


METHODS: list[Method] = [
    _estimator("hutchinson", "hutchinson", 100),
    _estimator("hutch_plus_plus", "hutch++", 100),
    Method(
        "hessian-eigenthings",
        "lanczos",
        "eigenpairs",
        _lanczos,
        None,
        partial(_pairs, "lanczos"),
        f"max_iter=2 k={2 * TOP}",
        "hessian_eigenthings",
        resumes=True,
    ),
    Method(
        "hessian-eigenthings",
        "deflated_power_iteration",
        "eigenpairs",
        lambda products, tol, seed: _pairs(
            "deflated_power_iteration", products, seed, tol=tol, max_iter=products.limit
        ),
        TOLERANCES,
        partial(_pairs, "deflated_power_iteration"),
        "max_iter=100 a pair, tol=1e-4: change and residual, relative to the value",
        "hessian_eigenthings",
    ),
]
