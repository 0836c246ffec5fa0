"""A net with its batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hessfunc as hf
from tests.cases import Case


def net(criterion: Callable[[Any, Any], Tensor], targets: Tensor, outputs: int = 3) -> Case:
    """A small MLP with that many outputs, as many examples as there are targets."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    model_fn, params = hf.functional(model)
    batch = torch.randn(len(targets), 3).double(), targets
    return Case(model, hf.supervised(model_fn, criterion), params, batch)


def batches(found: Case, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The batch of a case cut into batches of these sizes."""
    x, y = found.batch
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))
