"""curvlinops: estimators take a budget and have no rule of their own; eigenpairs are SciPy's."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.accuracy.cases import TOP, Asked
from bench.accuracy.peers.stream import stream
from bench.accuracy.questions import TOLERANCES, Method, Pairs, Products


def _operator(products: Products) -> Any:
    from curvlinops._torch_base import PyTorchLinearOperator

    class Operator(PyTorchLinearOperator):
        SELF_ADJOINT = True
        device = torch.device("cpu")
        dtype = products.matrix.dtype

        def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
            return [products(columns[0].mT.contiguous()).mT]

    return Operator([(products.matrix.n,)], [(products.matrix.n,)])


def _estimate(place: str, products: Products, budget: int, seed: int) -> Any:
    module, _, name = place.rpartition(".")
    estimator = getattr(importlib.import_module(f"curvlinops.{module}"), name)
    with stream(products, seed):
        found = estimator(_operator(products), budget)
    return found if found.dim() else float(found)


def _pairs(products: Products, tol: float, seed: int) -> Pairs:
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(seed).standard_normal(products.matrix.n)
    operator = _operator(products).to_scipy()
    values, vectors = eigsh(operator, k=TOP, which="LM", tol=tol, v0=start)
    return torch.from_numpy(values.copy()), torch.from_numpy(vectors.T.copy())


def _estimator(asked: Asked, place: str) -> Method:
    told = partial(_estimate, place)
    name = place.rpartition(".")[2]
    rule = "none: a budget must be given"
    return Method("curvlinops-for-pytorch", name, asked, told, None, None, rule, "curvlinops")


METHODS: list[Method] = [
    _estimator("trace", "trace.hutchinson.hutchinson_trace"),
    _estimator("trace", "trace.meyer2020hutch.hutchpp_trace"),
    _estimator("trace", "trace.epperly2024xtrace.xtrace"),
    _estimator("diagonal", "diagonal.hutchinson.hutchinson_diag"),
    _estimator("diagonal", "diagonal.epperly2024xtrace.xdiag"),
    Method(
        "curvlinops-for-pytorch",
        "SciPy eigsh",
        "eigenpairs",
        _pairs,
        TOLERANCES,
        lambda products, seed: _pairs(products, 0.0, seed),
        "tol=0: the rounding of float64",
        "curvlinops",
        resumes=True,
    ),
]
