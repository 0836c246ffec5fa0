"""Norms of torch that are called in other ways than by `torch.nn.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from tests.reference import relative_error

D = torch.float64
X = torch.sin(torch.arange(1.0, 61, dtype=D).square()).view(4, 3, 5)
W, B = torch.linspace(0.5, 2, 5, dtype=D), torch.linspace(-1, 1, 5, dtype=D)
C, SHIFT = torch.linspace(0.5, 2, 3, dtype=D), torch.linspace(-1, 1, 3, dtype=D)
MEAN, VARIANCE = torch.linspace(-0.4, 0.7, 3, dtype=D), torch.linspace(0.6, 1.5, 3, dtype=D)
EPS = 1e-5


def statistics(x: Tensor, axes: Any) -> tuple[Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    return mean, ((x - mean).square().mean(axes, keepdim=True) + EPS).rsqrt()


def by_row(x: Tensor) -> Tensor:
    mean, scale = statistics(x, -1)
    return (x - mean) * scale * W + B


def by_channel(x: Tensor, axes: Any = (0, 2)) -> Tensor:
    mean, scale = statistics(x, axes)
    return (x - mean) * scale * C[:, None] + SHIFT[:, None]


aten = torch.ops.aten
# Name: call of torch, and its definition.
CASES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "native_layer_norm": (lambda x: torch.native_layer_norm(x, (5,), W, B, EPS)[0], by_row),
    "its mean": (
        lambda x: torch.native_layer_norm(x, (5,), W, B, EPS)[1],
        lambda x: statistics(x, -1)[0],
    ),
    "its scale": (
        lambda x: torch.native_layer_norm(x, (5,), W, B, EPS)[2],
        lambda x: statistics(x, -1)[1],
    ),
    "native_batch_norm": (
        lambda x: torch.native_batch_norm(x, C, SHIFT, None, None, True, 0.1, EPS)[0],
        by_channel,
    ),
    "native_batch_norm in eval mode": (
        lambda x: torch.native_batch_norm(x, C, SHIFT, MEAN, VARIANCE, False, 0.1, EPS)[0],
        lambda x: (
            ((x - MEAN[:, None]) * (VARIANCE[:, None] + EPS).rsqrt()) * C[:, None] + SHIFT[:, None]
        ),
    ),
    "torch.batch_norm": (
        lambda x: torch.batch_norm(
            x, C, SHIFT, MEAN.clone(), VARIANCE.clone(), True, 0.1, EPS, True
        ),
        by_channel,
    ),
    "torch.instance_norm": (
        lambda x: torch.instance_norm(x, C, SHIFT, None, None, True, 0.1, EPS, True),
        lambda x: by_channel(x, 2),
    ),
    "aten.native_layer_norm": (
        lambda x: aten.native_layer_norm.default(x, (5,), W, B, EPS)[0],
        by_row,
    ),
    "aten._native_batch_norm_legit": (
        lambda x: aten._native_batch_norm_legit.no_stats(x, C, SHIFT, True, 0.1, EPS)[0],
        by_channel,
    ),
}


def cubic(y: Tensor) -> Tensor:
    weights = torch.linspace(0.3, 1.7, y.numel(), dtype=D).view(y.shape)
    return (weights * (y + 0.3 * y.square() + 0.1 * y**3)).sum()


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_every_order_are_those_of_the_definition(name: str) -> None:
    call, definition = CASES[name]
    u, v = (torch.cos(k * torch.arange(60, dtype=D)).view(X.shape) for k in (1, 2))
    along = torch.func.jvp

    def third(f: Callable[[Tensor], Tensor]) -> Tensor:
        slope = torch.func.grad(lambda x: cubic(f(x)))
        return along(lambda x: along(slope, (x,), (v,))[1], (X,), (u,))[1]

    expected = third(definition)
    second = along(torch.func.grad(lambda x: cubic(definition(x))), (X,), (v,))[1]
    for mode in ("reverse", "forward"):
        curvature = hf.hvp(lambda p, _: cubic(call(p["x"])), mode=mode)

        def quadratic(p: Any, curvature: Any = curvature) -> Tensor:
            return hf.inner({"x": u}, hf.apply(curvature(p, None), {"x": v}))

        found = hf.apply(curvature({"x": X}, None), {"x": v})["x"]
        assert relative_error(found, second) < 1e-12
        assert relative_error(torch.func.grad(quadratic)({"x": X})["x"], expected) < 1e-10


def test_an_exported_module_has_the_matrix_of_the_module() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=D), torch.tensor([0, 1, 2, 0, 1, 2])
    exported = torch.export.export(module, (x,)).module()
    matrices = []
    for each in (module, exported):
        model_fn, params = hf.functional(each)
        loss = hf.supervised(model_fn, nn.functional.cross_entropy)
        matrices.append(hf.matrix(hf.hvp(loss)(params, (x, y)), params))
    torch.testing.assert_close(*matrices)
