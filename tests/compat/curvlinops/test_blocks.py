"""Arithmetic of blocks against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessfunc.compat.curvlinops.blocks import (
    added,
    concatenated,
    determinant,
    inverse,
    is_bias,
    logdet,
    scaled,
    squared_norm,
    with_identities,
)
from hessfunc.kronecker import Blocks, Dense, Eigenbasis, Kronecker
from hessfunc.spaces.of import space_of


def positive(*shape: int, seed: int) -> Tensor:
    a = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed)).double()
    return a @ a.mT


def grouped(seed: int = 0) -> Blocks:
    """A weight in two groups, and a bias."""
    weight = Kronecker(positive(2, 2, seed=seed), positive(2, 3, seed=seed + 1), torch.Size((4, 3)))
    bias = Kronecker(positive(1, 4, seed=seed + 2), torch.ones(1, 1, 1).double(), torch.Size((4,)))
    like = {"weight": torch.zeros(4, 3).double(), "bias": torch.zeros(4).double()}
    return Blocks({"weight": weight, "bias": bias}, space_of(like))


def test_factors_are_added_and_scaled_but_for_the_number_1_of_a_bias() -> None:
    first, second = grouped(), grouped(5)
    total = scaled(added(first, second), left=2.0, right=3.0)
    left, right = (
        getattr(first["weight"], n) + getattr(second["weight"], n) for n in ("left", "right")
    )
    expected = torch.block_diag(
        *(torch.kron(2 * b, 3 * a) for b, a in zip(left, right, strict=True))
    )
    torch.testing.assert_close(total["weight"].dense(), expected)
    torch.testing.assert_close(
        total["bias"].dense(), 2 * (first["bias"].dense() + second["bias"].dense())
    )
    assert [is_bias(block) for block in first.values()] == [False, True]


def test_numbers_are_those_of_the_dense_block() -> None:
    basis = Eigenbasis(
        *(torch.linalg.eigh(positive(1, n, seed=n)).eigenvectors for n in (2, 3)),
        torch.rand(1, 2, 3).double() + 0.1,
        torch.Size((2, 3)),
    )
    for block in (*grouped().values(), basis):
        dense = block.dense()
        assert logdet(block) == pytest.approx(float(dense.logdet()))
        assert determinant(block) == pytest.approx(float(dense.det()))
        assert squared_norm(block) == pytest.approx(float(dense.square().sum()))


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


def test_identities_replace_output_factors() -> None:
    blocks = with_identities(grouped())
    weight = blocks["weight"]
    assert isinstance(weight, Kronecker)
    torch.testing.assert_close(
        weight.dense(), torch.block_diag(*weight.right.repeat_interleave(2, 0))
    )
    assert torch.equal(blocks["bias"].dense(), torch.eye(4).double())


def test_blocks_without_factors_are_named() -> None:
    dense = Blocks(
        {"weight": Dense(torch.eye(2), torch.Size((2,)))}, space_of({"weight": torch.zeros(2)})
    )
    for use in (
        lambda: scaled(dense, left=1.0, right=1.0),
        lambda: added(dense, dense),
        lambda: with_identities(dense),
    ):
        with pytest.raises(TypeError, match="a block is a Dense"):
            use()


def test_batches_are_concatenated_leaf_by_leaf() -> None:
    first, second = (
        ({"x": torch.full((k, 2), float(k)), "name": "a"}, torch.arange(k)) for k in (2, 3)
    )
    inputs, targets = concatenated([first, second])
    assert inputs["x"].shape == (5, 2)
    assert inputs["name"] == "a"
    assert targets.tolist() == [0, 1, 0, 1, 2]
