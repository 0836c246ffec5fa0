"""Arithmetic of blocks against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessfunc.compat.curvlinops.blocks import inverse, is_bias, scaled
from hessfunc.kronecker import Blocks, Dense, DiagonalBlock, Eigenbasis, Kronecker
from hessfunc.spaces.of import space_of


def positive(*shape: int, seed: int) -> Tensor:
    a = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed)).double()
    return a @ a.mT


def grouped(seed: int = 0, *, is_diagonal: bool = False) -> Blocks:
    """A weight in two groups, and a bias."""
    left, right = positive(2, 2, seed=seed), positive(2, 3, seed=seed + 1)
    if is_diagonal:
        left, right = (factor.diagonal(dim1=1, dim2=2) for factor in (left, right))
    weight = Kronecker(left, right, torch.Size((4, 3)))
    bias = Kronecker(positive(1, 4, seed=seed + 2), torch.ones(1, 1, 1).double(), torch.Size((4,)))
    like = {"weight": torch.zeros(4, 3).double(), "bias": torch.zeros(4).double()}
    return Blocks({"weight": weight, "bias": bias}, space_of(like))


@pytest.mark.parametrize("is_diagonal", [False, True])
def test_factors_are_scaled_but_for_the_number_1_of_a_bias(is_diagonal: bool) -> None:
    blocks = grouped(is_diagonal=is_diagonal)
    expected = {name: block.dense() for name, block in blocks.items()}
    total = scaled(blocks, left=2.0, right=3.0)
    torch.testing.assert_close(total["weight"].dense(), 6 * expected["weight"])
    torch.testing.assert_close(total["bias"].dense(), 2 * expected["bias"])
    assert [is_bias(block) for block in blocks.values()] == [False, True]


def test_other_blocks_have_the_scale_of_output_factors() -> None:
    shape = torch.Size((2, 3))
    basis = Eigenbasis(
        *(torch.linalg.eigh(positive(1, n, seed=n)).eigenvectors for n in (2, 3)),
        torch.rand(1, 2, 3).double(),
        shape,
    )
    for block in (
        basis,
        Dense(positive(6, seed=1), shape),
        DiagonalBlock(torch.rand(2, 3).double(), shape),
    ):
        blocks = Blocks({"weight": block}, space_of({"weight": torch.zeros(shape).double()}))
        made = scaled(blocks, left=2.0, right=3.0)["weight"]
        torch.testing.assert_close(made.dense(), 2 * block.dense())
        with pytest.raises(TypeError, match="pass use_exact_damping=True"):
            inverse(blocks, lambda name: (0.1, 0.1))


def test_inverses_have_damped_factors() -> None:
    blocks = grouped()
    inverted = inverse(blocks, lambda name: (0.1, 0.2))
    weight = blocks["weight"]
    assert isinstance(weight, Kronecker)
    parts = [
        torch.kron(
            torch.linalg.inv(b + 0.2 * torch.eye(2)), torch.linalg.inv(a + 0.1 * torch.eye(3))
        )
        for b, a in zip(weight.left, weight.right, strict=True)
    ]
    torch.testing.assert_close(inverted["weight"].dense(), torch.block_diag(*parts))
    expected = torch.linalg.inv(blocks["bias"].dense() + 0.2 * torch.eye(4))
    torch.testing.assert_close(inverted["bias"].dense(), expected)
    with pytest.raises(ValueError, match="larger damping"):
        inverse(blocks, lambda name: (0.0, -100.0))


def test_inverses_of_diagonal_factors_are_diagonal() -> None:
    blocks = grouped(is_diagonal=True)
    inverted = inverse(blocks, lambda name: (0.1, 0.2))
    weight = blocks["weight"]
    assert isinstance(weight, Kronecker)
    expected = torch.block_diag(
        *(
            torch.kron((1 / (b + 0.2)).diag(), (1 / (a + 0.1)).diag())
            for b, a in zip(weight.left, weight.right, strict=True)
        )
    )
    torch.testing.assert_close(inverted["weight"].dense(), expected)
