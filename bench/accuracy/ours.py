"""Our methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hessfunc as hf
from bench.accuracy.cases import TOP, Asked
from bench.accuracy.questions import QUESTIONS, TOLERANCES, Method, Pairs, Products


def _estimator(asked: Asked, estimator: Callable[..., Any]) -> Method:
    accuracy = QUESTIONS[asked].accuracy
    return Method(
        "hessfunc",
        estimator.__name__,
        asked,
        partial(_estimate, estimator),
        None,
        partial(_own_stop, estimator, accuracy),
        f"rtol={accuracy:g} for the 95 % interval, N products at the most",
        "hessfunc",
    )


def _estimate(estimator: Callable[..., Any], products: Products, budget: int, seed: int) -> Any:
    return estimator(products, products.like, max_matvecs=budget, seed=seed).value


def _own_stop(estimator: Callable[..., Any], rtol: float, products: Products, seed: int) -> Any:
    found = estimator(products, products.like, rtol=rtol, max_matvecs=products.limit, seed=seed)
    return found.value


def _solver(
    solver: Callable[..., hf.results.Eigenpairs], rule: str, resumes: bool = False
) -> Method:
    return Method(
        "hessfunc",
        solver.__name__,
        "eigenpairs",
        partial(_pairs, solver),
        TOLERANCES,
        lambda products, seed: _pairs(solver, products, None, seed),
        rule,
        "hessfunc",
        resumes,
    )


def _pairs(solver: Callable[..., Any], products: Products, rtol: float | None, seed: int) -> Pairs:
    options = {} if rtol is None else {"rtol": rtol, "max_matvecs": products.limit}
    found = solver(products, products.like, k=TOP, seed=seed, **options)
    return found.values, found.vectors


METHODS: list[Method] = [
    _estimator("trace", hf.trace),
    _estimator("trace", hf.hutchinson),
    _estimator("trace", hf.hutchpp),
    _estimator("trace", hf.xtrace),
    _estimator("trace", hf.xnystrace),
    _estimator("diagonal", hf.diagonal),
    _estimator("diagonal", hf.hutchinson_diagonal),
    _estimator("diagonal", hf.xdiag),
    _solver(hf.lanczos, "rtol=1e-4: each residual, relative to its own value", resumes=True),
    _solver(hf.power_iteration, "rtol=1e-3, max_matvecs=1000: each residual, as above"),
]
