"""A net whose dense Hessian, and what follows from it, are functions of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.trees import leaves
from tests.reference import block_like, directional_derivative, flat, rows

Tree = Any


def _loss(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    hidden = torch.tanh(batch[0] @ params["first"].T)
    outputs = torch.nn.functional.cross_entropy(hidden @ params["second"].T, batch[1])
    return outputs + 0.05 * sum((leaf**4).sum() for leaf in params.values())


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


LOSS = _loss
PARAMS = {"first": _normal(4, 3, seed=0), "second": _normal(3, 4, seed=1)}
BATCH = (_normal(12, 3, seed=2), torch.arange(12) % 3)
ALONG = {"first": _normal(4, 3, seed=3), "second": _normal(3, 4, seed=4)}
N = 24


def matrix(params: Tree) -> Tensor:
    """The dense Hessian, by products with unit vectors."""
    units = block_like(params, torch.eye(N, dtype=torch.float64))
    found = rows(hf.hvp(LOSS)(params, BATCH)(units))
    return (found + found.T) / 2


def slope(answer: Callable[[Any], Tensor | Tree], weights: Tensor) -> Tensor:
    """The derivative along ``ALONG`` of the inner product of an answer with weights.

    ``answer`` takes the differentiable matvec at some parameters.
    """
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    found = answer(hf.hvp(LOSS, differentiable=True)(params, BATCH))
    value = flat([found] if isinstance(found, Tensor) else found) @ weights
    slopes = torch.autograd.grad(value, leaves(params))
    return sum((s * d).sum() for s, d in zip(slopes, leaves(ALONG), strict=True))


def dense_slope(answer: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """The same of a function of the dense matrix, by differences."""
    return directional_derivative(
        lambda params: answer(matrix(params)).reshape(-1) @ weights, PARAMS, ALONG
    )[0]
