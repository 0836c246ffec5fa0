"""A matrix of known spectrum, and a net with its data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc.compat.eigenthings import LambdaOperator
from tests.reference import hessian
from tests.reference.spectra import symmetric

SPECTRUM = torch.tensor([5.0, -4.0, 3.0, 2.0, -1.0, 0.5, 0.2, 0.1])


def matrix() -> Tensor:
    """A symmetric matrix of that spectrum."""
    return symmetric(SPECTRUM)


def operator(of: Tensor | None = None) -> LambdaOperator:
    found = (matrix() if of is None else of).float()
    return LambdaOperator(lambda vector: found @ vector, 8)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model.to(dtype).eval()


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 4, generator=generator).to(dtype)
    return inputs, torch.randint(3, (50,), generator=generator)


def loader(size: int, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """50 examples: 3 batches of 20, 20 and 10, where size is 20."""
    return DataLoader(TensorDataset(*data(dtype)), batch_size=size)


def dense(model: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    model_fn, params = hf.functional(model)
    return hessian(hf.supervised(model_fn, cross_entropy), params, examples)
