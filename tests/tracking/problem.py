"""Trainings whose curvature is tracked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.tracking import Point

Batch = tuple[Tensor, Tensor]


def batches(count: int = 3, size: int = 8) -> list[Batch]:
    return [(torch.randn(size + i, 4), torch.randint(3, (size + i,))) for i in range(count)]


def problem() -> tuple[Any, dict[str, Tensor], nn.Module]:
    model = mlp([4, 5, 3], nn.Tanh).double()
    model_fn, params = hf.functional(model)
    return hf.supervised(model_fn, F.cross_entropy), params, model


def wide(data: list[Batch]) -> list[Batch]:
    return [(inputs.double(), targets) for inputs, targets in data]


class Noisy(nn.Module):
    """Everything that a measurement could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.4)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.drop(torch.tanh(self.norm(self.inner(x)))))


def point(step: int, **fields: Any) -> Point:
    return Point(step=step, loss=0.5, **fields)
