"""Small net whose influence scores are dense formulas of plain autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hessfunc as hf

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
MODEL_FN, PARAMS = hf.functional(MODEL)
LOSS = hf.supervised(MODEL_FN, nn.functional.cross_entropy)
X, Y = torch.randn(12, 4).double(), torch.arange(12) % 3
TRAIN = [(X[:7], Y[:7]), (X[7:], Y[7:])]
XQ, YQ = torch.randn(5, 4).double(), torch.arange(5) % 3
QUERIES = [(XQ[:2], YQ[:2]), (XQ[2:], YQ[2:])]
DAMPING = 0.5


def flat_loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return LOSS(hf.unravel(flat, PARAMS), (x, y))


def gradients(x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each example as a row, by plain autograd."""
    flat = hf.ravel(PARAMS)
    pairs = zip(x.split(1), y.split(1), strict=True)
    return torch.stack([torch.func.grad(flat_loss)(flat, *pair) for pair in pairs])


def hessian() -> Tensor:
    return torch.func.hessian(flat_loss)(hf.ravel(PARAMS), X, Y)


def gauss_newton() -> Tensor:
    """Return the mean of J'HJ over the examples, with H = diag(p) - p p'."""
    flat = hf.ravel(PARAMS)
    jacobians = torch.func.jacrev(lambda f: MODEL_FN(hf.unravel(f, PARAMS), X))(flat)
    p = MODEL_FN(PARAMS, X).softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("bci,bcd,bdj->ij", jacobians, h, jacobians) / len(X)


def scores(matrix: Any, left: Tensor, right: Tensor, damping: float = DAMPING) -> Tensor:
    """Return ``left (A + damping I)^-1 right'``."""
    damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return left @ torch.linalg.solve(damped, right.mT)
