"""Matvecs of operators."""

from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.compat.curvlinops.examples import IdentityLinearOperator, TensorLinearOperator
from hessfunc.compat.curvlinops.matvecs import as_matvec, block_of, columns

DENSE = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("made", [lambda A: A, TensorLinearOperator])
def test_the_matvec_is_that_of_the_symmetric_part(symmetric: bool, made: object) -> None:
    dense = DENSE + DENSE.mT if symmetric else DENSE
    matvec, like = as_matvec(made(dense))  # type: ignore[operator]
    torch.testing.assert_close(hf.matrix(matvec, like), (dense + dense.mT) / 2)


def test_dtype_and_device_are_those_of_the_operator() -> None:
    A = IdentityLinearOperator([(2, 2), (3,)], torch.device("cpu"), torch.float32)
    matvec, like = as_matvec(A)
    assert (like.shape, like.dtype) == ((7,), torch.float32)
    torch.testing.assert_close(matvec(torch.ones(2, 7)), torch.ones(2, 7))
    with pytest.raises(ValueError, match="not square"):
        as_matvec(torch.ones(2, 3))


def test_columns_and_blocks_are_inverse_to_each_other() -> None:
    X = [torch.randn(2, 3, 5), torch.randn(4, 5)]
    block = block_of(X, ["a", "b"])
    assert [tuple(leaf.shape) for leaf in block.values()] == [(5, 2, 3), (5, 4)]
    assert all(torch.equal(x, y) for x, y in zip(columns(list(block.values())), X, strict=True))
