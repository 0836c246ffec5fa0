"""Blocks of each kind of layer, against the dense Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from hessfunc.kronecker import Block, Dense, DiagonalBlock, Eigenbasis, Permuted
from tests.kronecker.cases import (
    Net,
    between,
    conv,
    dense,
    gauss_newton_blocks,
    largest_error,
    net,
)


def transposed(dims: int, **options: Any) -> nn.Module:
    return getattr(nn, f"ConvTranspose{dims}d")(2, 4, **{"kernel_size": 2, **options})


# Layers with the shape of an example. Each weight acts on a single position.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 4), (3,)),
    "Conv1d": (lambda: conv(1), (2, 3)),
    "Conv2d": (lambda: conv(2), (2, 3, 3)),
    "Conv3d": (lambda: conv(3, kernel_size=2), (2, 2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (4,)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (4,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(2, affine=True), (2, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), (2, 2, 2)),
    "PReLU": (lambda: nn.PReLU(4), (4,)),
}
SHARED = {
    "Linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "Conv1d": (lambda: conv(1, padding=1), (2, 3)),
    "Conv2d": (lambda: conv(2, groups=2, padding="same"), (2, 3, 3)),
    "ConvTranspose1d": (lambda: transposed(1, stride=2, groups=2), (2, 3)),
    "ConvTranspose2d": (lambda: transposed(2, padding=1), (2, 3, 3)),
    "ConvTranspose3d": (lambda: transposed(3, dilation=2, kernel_size=(1, 2, 1)), (2, 1, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
}


def of_layer(layers: dict[str, Any], name: str, examples: int) -> Net:
    make, shape = layers[name]
    inner = between(make)
    return net(lambda: nn.Sequential(nn.Sigmoid(), *inner()), *shape, examples=examples)


@pytest.mark.parametrize("layer", LAYERS)
def test_kflr_is_exact_with_one_example_and_without_shared_weights(layer: str) -> None:
    case = of_layer(LAYERS, layer, 1)
    blocks = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    assert largest_error(dense(blocks), gauss_newton_blocks(case)) < 1e-8


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("layer", [*LAYERS, *(f"{name}, shared" for name in SHARED)])
def test_ekfac_has_the_diagonal_of_the_gauss_newton_matrix(layer: str, sharing: str) -> None:
    """The diagonal in the basis of each block, and so the trace."""
    shared = layer.endswith(", shared")
    layers = SHARED if shared else LAYERS
    case = of_layer(layers, layer.removesuffix(", shared"), 4)
    made = hf.kronecker.ekfac(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    for name, exact in gauss_newton_blocks(case).items():
        assert_diagonal(made[name], exact)


def assert_diagonal(block: Block, exact: Tensor) -> None:
    if isinstance(block, Dense):
        torch.testing.assert_close(block.matrix, exact, rtol=1e-8, atol=1e-12)
        return
    spectrum = block._spectrum
    basis = spectrum.project(torch.eye(block.n, dtype=exact.dtype))
    diagonal = torch.einsum("ij,ik,kj->j", basis, exact, basis)
    torch.testing.assert_close(spectrum.values, diagonal, rtol=1e-8, atol=1e-12)
    inner = block.inner if isinstance(block, Permuted) else block
    assert isinstance(inner, Eigenbasis | DiagonalBlock)
    assert block.trace() == pytest.approx(float(exact.trace()), rel=1e-8)


class Llama(nn.Module):
    """A norm written by hand, with its weight on either side of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def test_a_norm_of_another_class() -> None:
    case = net(between(Llama), 3, 4, examples=3)
    made = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    exact = gauss_newton_blocks(case)["0.weight"]
    torch.testing.assert_close(made["0.weight"].dense(), exact, rtol=1e-8, atol=1e-12)


def test_a_norm_of_many_entries_has_its_exact_diagonal() -> None:
    case = net(lambda: nn.Sequential(nn.LayerNorm(1100), nn.Linear(1100, 2)), 1100, examples=2)
    made = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    assert made.diagonals == ("0.weight", "0.bias")
    exact = hf.ggn_diagonal(case.loss, case.params, [case.batch])
    for name in made.diagonals:
        torch.testing.assert_close(made[name].values, exact[name], rtol=1e-8, atol=1e-14)
