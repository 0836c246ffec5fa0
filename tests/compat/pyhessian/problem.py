"""A net, its batches and its dense Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.compat import pyhessian as face
from tests.reference import hessian as dense_hessian

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    """81 parameters, with batch statistics that are not those of the data."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
    return model


def batches() -> list[Batch]:
    """Two batches of unequal size."""
    return [(torch.randn(k, 4), torch.randint(3, (k,))) for k in (20, 7)]


def on(source: str, found: Sequence[Batch]) -> dict[str, Any]:
    """The arguments of a `hessian` of the first batch, or of all of them."""
    return {"data": {"data": found[0]}, "dataloader": {"dataloader": list(found)}}[source]


def dense(model: nn.Module, source: str, found: Sequence[Batch]) -> Tensor:
    """The Hessian in eval mode, in float64, by double backward."""
    model = model.double().eval()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, cross_entropy)
    used = found[:1] if source == "data" else found
    parts = [len(y) * dense_hessian(loss, params, (x.double(), y)) for x, y in used]
    model.float()
    return torch.stack(parts).sum(0) / sum(len(y) for _, y in used)


def residual(found: Any, value: float, vector: Sequence[Tensor]) -> float:
    """|Hv - value v| / |v|, by the products of a `hessian`."""
    image = found.dataloader_hv_product(vector)[1]
    off = [h - value * v for h, v in zip(image, vector, strict=True)]
    return float((face.group_product(off, off) / face.group_product(vector, vector)).sqrt())


def net_like(model: nn.Module) -> nn.Module:
    other = net()
    other.load_state_dict(model.state_dict())
    return other
