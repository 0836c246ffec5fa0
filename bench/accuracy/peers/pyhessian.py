"""PyHessian: bound to a model, so it is given one whose Hessian is the matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.accuracy.cases import TOP
from bench.accuracy.peers.stream import stream
from bench.accuracy.questions import TOLERANCES, Method, Pairs, Products


class _Times(torch.autograd.Function):
    """A x at x = 0, where it costs no product; its derivative costs one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products) -> Tensor:
        ctx.products = products
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.products.of(gradients[0]), None


class _Quadratic(torch.autograd.Function):
    """x'Ax / 2 at x = 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products) -> Tensor:
        ctx.save_for_backward(x)
        ctx.products = products
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * _Times.apply(x, ctx.products), None


class _Point(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self, _: Tensor) -> Tensor:
        return self.x


def _hessian(products: Products) -> Any:
    from pyhessian import hessian

    nothing = torch.zeros(1)
    return hessian(
        _Point(products.like),
        lambda x, _: _Quadratic.apply(x, products),
        data=(nothing, nothing),
        cuda=False,
    )


def _trace(products: Products, seed: int, **options: float) -> float:
    with stream(products, seed):
        return float(np.mean(_hessian(products).trace(**options)))


def _pairs(products: Products, seed: int, **options: float) -> Pairs:
    with stream(products, seed):
        values, vectors = _hessian(products).eigenvalues(top_n=TOP, **options)
    return torch.tensor(values, dtype=torch.float64), torch.stack([v[0] for v in vectors])


METHODS: list[Method] = [
    Method(
        "PyHessian",
        "trace",
        "trace",
        # With a tolerance that nothing is below, the whole budget is used.
        lambda products, budget, seed: _trace(products, seed, maxIter=budget, tol=-math.inf),
        None,
        _trace,
        "maxIter=100, tol=1e-3: the relative change of the running mean by the last sample",
        "pyhessian",
    ),
    Method(
        "PyHessian",
        "eigenvalues",
        "eigenpairs",
        lambda products, tol, seed: _pairs(products, seed, tol=tol, maxIter=products.limit),
        TOLERANCES,
        _pairs,
        "maxIter=100 a pair, tol=1e-3: the relative change of the value in the last step",
        "pyhessian",
    ),
]
