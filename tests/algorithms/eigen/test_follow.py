"""Eigenpairs of a matrix that has changed a little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.eigen.follow import follow


def matrix(n: int, eigenvalues: Tensor) -> Tensor:
    basis = torch.linalg.qr(torch.randn(n, n).double())[0]
    return (basis * eigenvalues) @ basis.mT


def followed(A: Tensor, before: Any = None, **options: Any) -> hf.results.Eigenpairs:
    chosen = {"k": 1, "guards": 1, "which": "LA", "rtol": 1e-3, "max_matvecs": 200, **options}
    like = torch.zeros(len(A), dtype=A.dtype)
    return follow(hf.dense((A + A.mT) / 2), like, before=before, seed=0, **chosen)


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("k", [1, 3])
def test_pairs_of_either_end_are_those_of_the_dense_matrix(which: str, k: int) -> None:
    values = torch.cat([torch.tensor([9.0, 7.0, 4.0, -8.0, -5.0, -3.0]), torch.rand(44)]).double()
    A = matrix(50, values)
    found = followed(A, k=k, which=which, rtol=1e-6)
    expected = values.sort(descending=which == "LA").values[:k]
    torch.testing.assert_close(found.values[:k], expected, rtol=1e-8, atol=0)
    assert found.converged[:k].all()
    rows = found.vectors @ A - found.values[:, None] * found.vectors
    torch.testing.assert_close(found.residuals, rows.norm(dim=1), rtol=1e-3, atol=1e-10)
    gram = found.vectors @ found.vectors.mT
    torch.testing.assert_close(gram, torch.eye(k + 1).double())


def test_a_small_change_takes_as_many_products_as_there_are_vectors() -> None:
    A = matrix(200, torch.cat([torch.tensor([10.0, 8.0, 6.0]), torch.rand(197)]).double())
    cold = followed(A, k=2, rtol=0.01)
    change = matrix(200, torch.randn(200).double())
    warm = followed(A + 0.01 * change, cold, k=2, rtol=0.01)
    assert warm.matvecs == 4 < cold.matvecs
    assert warm.converged[:2].all()


def test_a_guard_sees_an_eigenvalue_that_overtakes() -> None:
    fixed = torch.rand(48).double()
    basis = torch.linalg.qr(torch.randn(50, 50).double())[0]

    def at(rising: float) -> Tensor:
        values = torch.cat([torch.tensor([10.0, rising]).double(), fixed])
        return (basis * values) @ basis.mT

    found = None
    for rising in (8.0, 9.0, 10.5):
        found = followed(at(rising), found, rtol=0.01)
        assert float(found.values[0]) == pytest.approx(max(10, rising), rel=1e-3)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_a_block_that_the_vectors_do_not_see_is_found(which: str) -> None:
    """Each block of the matrix is invariant, so that residuals say nothing of the others."""
    sign = 1 if which == "LA" else -1
    blocks = [matrix(30, torch.cat([torch.ones(1), torch.rand(29) / 2]).double()) for _ in range(4)]

    def at(rising: float) -> Tensor:
        sizes = (10.0, 8.0, 6.0, rising)
        return sign * torch.block_diag(*(s * b for s, b in zip(sizes, blocks, strict=True)))

    found = None
    for rising in [4.0] * 20 + [12.0] * 12:
        found = followed(at(rising), found, which=which, rtol=0.01)
    assert sign * float(found.values[0]) == pytest.approx(12, rel=1e-3)


def test_a_budget_that_is_spent_is_said() -> None:
    A = matrix(100, torch.linspace(0, 1, 100).double())
    found = followed(A, rtol=1e-10, max_matvecs=10)
    assert found.matvecs == 10
    assert not found.converged[0]
    assert "budget exhausted after 10 matvecs" in found.reason


def test_a_tolerance_below_rounding_is_that_of_rounding() -> None:
    A = matrix(30, torch.linspace(1, 2, 30).double()).float()
    found = followed(A, rtol=0.0, max_matvecs=10_000)
    assert found.reason.startswith("converged")
    assert 0 < float(found.residuals[0]) < 1e-5


def test_a_matrix_that_is_not_symmetric_ends() -> None:
    A = torch.tensor([[2.0, 1.0], [-1.0, 1.0]]).double()
    options = {"which": "LA", "rtol": 0.01, "max_matvecs": 100, "before": None, "seed": 0}
    like = torch.zeros(2).double()
    found = follow(lambda block: block @ A.mT, like, k=1, guards=1, **options)
    assert "lie in the basis" in found.reason
    assert not found.converged[0]


def test_a_matrix_smaller_than_the_basis_is_solved_exactly() -> None:
    A = matrix(2, torch.tensor([3.0, -1.0]).double())
    found = followed(A, k=2, guards=4, rtol=0.0)
    torch.testing.assert_close(found.values, torch.tensor([3.0, -1.0]).double())
    assert found.converged.all()
