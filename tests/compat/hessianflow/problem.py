"""Nets and batches of a training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.training_mode import eval_mode
from tests import reference

Batch = tuple[Tensor, Tensor]
criterion = nn.CrossEntropyLoss()


def batches(*sizes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        found.append((inputs, (inputs[:, 0] > inputs[:, 1]).long()))
    return found


def net() -> nn.Module:
    return mlp([4, 5, 2], nn.Tanh).double()


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()


def dense(model: nn.Module, data: Iterable[Batch]) -> Tensor:
    """The Hessian of the mean loss over all examples, in eval mode."""
    with eval_mode(model):
        model_fn, params = hf.functional(model)
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    return reference.hessian(hf.supervised(model_fn, criterion), params, (inputs, targets))


def dominant(model: nn.Module, data: Iterable[Batch]) -> float:
    values = torch.linalg.eigvalsh(dense(model, data))
    return float(values[values.abs().argmax()])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
