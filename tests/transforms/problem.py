"""Matrices of outputs, and a net with its batches."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hessfunc as hf
from hessfunc.transforms.chunks import Curvature
from tests.cases import Case
from tests.reference import gradient

CURVATURES: dict[str, Callable[[hf.Loss], Curvature]] = {
    "ggnvp": hf.ggnvp,
    "fvp": hf.fvp,
    "fvp, samples": partial(hf.fvp, samples=2, seed=0),
    "efvp": hf.efvp,
}


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


def of_examples(found: Case) -> list[Tensor]:
    """The gradient of each example's own loss."""
    x, y = found.batch
    return [gradient(found.loss, found.params, (x[b, None], y[b, None])) for b in range(len(y))]


def of_dicts(
    criterion: Any, **options: Any
) -> tuple[hf.Loss, dict[str, Tensor], dict[str, Tensor]]:
    model_fn, params = hf.functional(nn.Linear(3, 4).double())
    loss = hf.composed(
        lambda p, batch: model_fn(p, batch["x"]).transpose(1, 2), criterion, **options
    )
    labels = torch.tensor([[0, 1, 2, 3], [1, 2, -100, -100], [3, -100, -100, -100]])
    return loss, params, {"x": torch.randn(3, 4, 3, dtype=torch.float64), "y": labels}
