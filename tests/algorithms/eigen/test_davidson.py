"""Pairs near a shift, and pairs of a pencil with the matvec of B."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

import hessfunc as hf


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """Symmetric matrix with these eigenvalues."""
    n, generator = len(values), torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (basis * values.double()) @ basis.mT


def interior() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    outliers = torch.tensor([10.0, 8.0, 6.0, 5.2, 5.0, 5.0, 5.0, 3.0, 2.0])
    return torch.cat([outliers, 0.3 * torch.randn(111, generator=generator)]).double()


def pairs_of(A: Tensor, **options: Any) -> hf.results.Eigenpairs:
    chosen = {"k": 3, "rtol": 1e-9, "max_matvecs": 20_000, "seed": 0, **options}
    return hf.lanczos(hf.dense(A), torch.zeros(len(A), dtype=torch.float64), **chosen)


@pytest.mark.parametrize(("sigma", "k"), [(5.3, 4), (2.4, 2), (7.2, 1), (9.0, 3), (-3.0, 2)])
def test_the_nearest_pairs_are_those_of_the_dense_matrix(sigma: float, k: int) -> None:
    values = interior()
    A = matrix(values)
    pairs = pairs_of(A, which="nearest", sigma=sigma, k=k)
    expected = values[(values - sigma).abs().argsort()[:k]]
    torch.testing.assert_close(
        (pairs.values - sigma).abs(), (expected - sigma).abs(), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(pairs.values.sort()[0], expected.sort()[0], rtol=0, atol=1e-8)
    outside = pairs.vectors @ A - pairs.values[:, None] * pairs.vectors
    torch.testing.assert_close(pairs.residuals, outside.norm(dim=1), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.mT, torch.eye(k).double())
    assert pairs.converged.all()
    assert pairs.reason.startswith("converged")


def test_all_products_are_counted_and_bounded() -> None:
    A, count = matrix(interior()), 0

    def counted(block: Tensor) -> Tensor:
        nonlocal count
        count += len(block)
        return block @ A

    like = torch.zeros(len(A), dtype=torch.float64)
    pairs = hf.lanczos(counted, like, k=2, which="nearest", sigma=4.5, seed=0)
    assert pairs.matvecs == count
    assert "inner ones" in pairs.reason
    count = 0
    short = hf.lanczos(counted, like, k=2, which="nearest", sigma=0.1, max_matvecs=60, seed=0)
    assert short.matvecs == count <= 60
    assert not short.converged.all()
    outside = short.vectors @ A - short.values[:, None] * short.vectors
    torch.testing.assert_close(short.residuals, outside.norm(dim=1))


@pytest.mark.parametrize(
    ("values", "k"),
    [(torch.zeros(20), 3), (torch.ones(20), 3), (torch.tensor([0.7]), 1), (torch.randn(9), 9)],
)
def test_small_and_degenerate_matrices(values: Tensor, k: int) -> None:
    pairs = pairs_of(matrix(values), which="nearest", sigma=0.3, k=k)
    expected = (values.double() - 0.3).abs().sort().values[:k]
    torch.testing.assert_close((pairs.values - 0.3).abs(), expected, rtol=0, atol=1e-10)
    assert pairs.converged.all()


def test_trees_of_several_leaves_in_float32() -> None:
    diagonal = {"w": torch.linspace(1, 6, 6).reshape(2, 3), "b": torch.linspace(10, 30, 40)}
    pairs = hf.lanczos(
        lambda block: {name: leaf * diagonal[name] for name, leaf in block.items()},
        diagonal,
        k=2,
        which="nearest",
        sigma=4.2,
        seed=0,
    )
    torch.testing.assert_close(pairs.values, torch.tensor([4.0, 5.0]).double(), rtol=1e-4, atol=0)
    assert pairs.vectors["w"].shape == (2, 2, 3)


def positive(n: int) -> Tensor:
    return matrix(torch.linspace(0.2, 2, n), seed=2)


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_a_pencil_has_the_pairs_of_the_dense_solver(which: Any) -> None:
    A = matrix(torch.cat([torch.tensor([9.0, 9.0, -7.0, -6.0]), torch.linspace(-1, 2, 76)]))
    B, k = positive(80), 4
    pairs = pairs_of(A, metric=hf.dense(B), which=which, k=k)
    values = torch.from_numpy(scipy.linalg.eigh(A.numpy(), B.numpy(), eigvals_only=True))
    expected = {
        "LM": values[values.abs().argsort(descending=True)[:k]],
        "LA": values.flip(0)[:k],
        "SA": values[:k],
        "BE": torch.cat([values[-2:].flip(0), values[:2].flip(0)]),
    }[which]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-8, atol=1e-8)
    vectors = pairs.vectors
    torch.testing.assert_close(vectors @ B @ vectors.mT, torch.eye(k).double())
    outside = vectors @ A - pairs.values[:, None] * (vectors @ B)
    squares = (outside * torch.linalg.solve(B, outside.mT).mT).sum(1)
    torch.testing.assert_close(pairs.residuals, squares.sqrt(), rtol=1e-3, atol=1e-12)
    assert pairs.converged.all()


def test_nearest_pairs_of_a_pencil() -> None:
    A, B = matrix(interior()), positive(120)
    pairs = pairs_of(A, metric=hf.dense(B), which="nearest", sigma=8.0, k=2, rtol=1e-8)
    values = torch.from_numpy(scipy.linalg.eigh(A.numpy(), B.numpy(), eigvals_only=True))
    expected = values[(values - 8).abs().argsort()[:2]]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-8, atol=1e-8)


def test_a_metric_that_is_not_positive_definite_is_refused() -> None:
    A = matrix(interior())
    with pytest.raises(ValueError, match="not positive definite"):
        pairs_of(A, metric=hf.dense(-positive(120)), which="LA")
    indefinite = matrix(torch.linspace(-1, 2, 120), seed=3)
    with pytest.raises(ValueError, match="not positive definite"):
        pairs_of(A, metric=hf.dense(indefinite), which="LA")


def test_an_asymmetric_matrix_is_refused() -> None:
    A = matrix(interior()) + torch.triu(torch.ones(120, 120).double())
    with pytest.raises(ValueError, match="not symmetric"):
        pairs_of(A, which="nearest", sigma=4.5)


def test_a_run_resumes_from_its_checkpoint(tmp_path: Any) -> None:
    A, options = matrix(interior()), {"which": "nearest", "sigma": 4.5, "k": 2}
    whole = pairs_of(A, **options)
    pairs_of(A, **options, checkpoint=tmp_path / "run", callback=lambda pairs: pairs.matvecs > 40)
    resumed = pairs_of(A, **options, checkpoint=tmp_path / "run")
    torch.testing.assert_close(resumed.values, whole.values)
    assert resumed.matvecs == whole.matvecs
