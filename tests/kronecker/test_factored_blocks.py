from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.kronecker import Congruence, DiagonalBlock, Eigenbasis, Kronecker


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(n: int, seed: int) -> Tensor:
    root = random(n, n, seed=seed)
    return root + root.mT


def test_a_kronecker_block_is_the_kronecker_product() -> None:
    left, right = symmetric(3, 1), symmetric(4, 2)
    block = Kronecker(left[None], right[None], torch.Size((3, 4)))
    torch.testing.assert_close(block.dense(), torch.kron(left, right))


def test_groups_of_a_kronecker_block_are_its_diagonal() -> None:
    left = torch.stack([symmetric(3, 1), symmetric(3, 2)])
    right = torch.stack([symmetric(4, 3), symmetric(4, 4)])
    block = Kronecker(left, right, torch.Size((6, 4)))
    expected = torch.block_diag(*(torch.kron(*pair) for pair in zip(left, right, strict=True)))
    torch.testing.assert_close(block.dense(), expected)


def test_an_eigenbasis_block_has_its_values_in_the_product_of_the_bases() -> None:
    left = torch.linalg.eigh(symmetric(3, 1)).eigenvectors
    right = torch.linalg.eigh(symmetric(4, 2)).eigenvectors
    values = random(1, 3, 4).square()
    block = Eigenbasis(left[None], right[None], values, torch.Size((3, 4)))
    basis = torch.kron(left, right)
    torch.testing.assert_close(block.dense(), basis * values.flatten() @ basis.mT)


def test_a_congruence_is_the_mean_over_examples() -> None:
    # z[o, p] = sum_k W[o, k] x[k, p], so that the Jacobian is dz[o, p] / dW[q, k] = x[k, p] at o=q.
    hessian, inputs = symmetric(2 * 5, 3), random(3, 1, 4, 5)
    block = Congruence(hessian, inputs, torch.Size((2, 4)))
    parts = []
    for x in inputs[:, 0]:
        jacobian = torch.einsum("oq,kp->opqk", torch.eye(2).double(), x).reshape(10, 8)
        parts.append(jacobian.mT @ hessian @ jacobian)
    torch.testing.assert_close(block.dense(), torch.stack(parts).mean(0))


def test_factors_of_two_axes_are_diagonals() -> None:
    left, right, values = random(1, 3).exp(), random(1, 4).exp(), random(1, 3, 4).square()
    basis = torch.linalg.eigh(symmetric(4, 2)).eigenvectors[None]
    shape = torch.Size((3, 4))
    pairs = [
        (Kronecker(left, right, shape), Kronecker(left.diag_embed(), right.diag_embed(), shape)),
        (
            Eigenbasis(torch.ones_like(left), basis, values, shape),
            Eigenbasis(torch.ones_like(left).diag_embed(), basis, values, shape),
        ),
    ]
    for block, expected in pairs:
        torch.testing.assert_close(block.dense(), expected.dense())
        vectors = random(2, 3, 4, seed=5)
        torch.testing.assert_close(
            block.inverse_matvec(vectors, 0.1), expected.inverse_matvec(vectors, 0.1)
        )


def test_a_diagonal_block_is_a_diagonal_matrix() -> None:
    values = random(2, 3).square()
    block = DiagonalBlock(values, torch.Size((2, 3)))
    torch.testing.assert_close(block.dense(), torch.diag(values.flatten()))
    assert block.is_diagonal
