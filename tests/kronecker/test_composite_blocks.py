from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.kronecker import Dense, DirectSum, Kronecker, Permuted
from hessfunc.kronecker.linear_maps import Layout


def symmetric(n: int, seed: int) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root + root.mT


def test_a_direct_sum_is_block_diagonal() -> None:
    first = Dense(symmetric(6, 1), torch.Size((2, 3)))
    second = Kronecker(symmetric(1, 2)[None], symmetric(3, 3)[None], torch.Size((1, 3)))
    block = DirectSum((first, second), torch.Size((3, 3)))
    torch.testing.assert_close(block.dense(), torch.block_diag(first.dense(), second.dense()))


def test_a_permuted_block_is_that_of_the_transposed_weight() -> None:
    """A (x) B on W is B (x) A on the transpose of W."""
    left, right = symmetric(3, 1), symmetric(4, 2)
    inner = Kronecker(left[None], right[None], torch.Size((1, 3, 4)))
    block = Permuted(inner, Layout((1, 4, 3), (0, 2, 1)), torch.Size((4, 3)))
    torch.testing.assert_close(block.dense(), torch.kron(right, left))
