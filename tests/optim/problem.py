"""A net with its curvature matrices, and blocks that are dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.optim.newton import Newton, NewtonState

CURVATURES = {
    "hvp": hf.hvp,
    "ggnvp": hf.ggnvp,
    "pchvp abs": partial(hf.pchvp, residual="abs"),
    "pchvp zero": partial(hf.pchvp, residual="zero"),
}


class Dense:
    """A block that is a matrix, on a tensor of any shape."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def matvec(self, vectors: Tensor) -> Tensor:
        return (vectors.reshape(len(vectors), -1) @ self.matrix).view_as(vectors)

    def inverse_matvec(self, vectors: Tensor, damping: float) -> Tensor:
        damped = self.matrix + damping * torch.eye(len(self.matrix), dtype=self.matrix.dtype)
        rows = vectors.reshape(len(vectors), -1)
        return torch.linalg.solve(damped, rows.mT).mT.reshape(vectors.shape)


def once(
    method: Newton,
    gradients: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    matvecs: Mapping[str, Any],
) -> tuple[dict[str, Tensor], NewtonState]:
    return method.update(gradients, method.init(params), params, matvecs)


def problem() -> tuple[hf.Loss, dict[str, Tensor], Any]:
    model = mlp([4, 5, 1], nn.Sigmoid).double()
    model_fn, params = hf.functional(model)
    batch = torch.randn(7, 4).double(), torch.randn(7, 1).double()
    return hf.supervised(model_fn, F.mse_loss), params, batch
