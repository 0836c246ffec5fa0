from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.recurrences import Recurrences, eigenpairs_of, extended
from tests.reference.spectra import symmetric

N = 60
MATRIX = symmetric(torch.logspace(-1, 1, N))
UNITS = torch.nn.functional.normalize(
    torch.randn(3, N, generator=torch.Generator().manual_seed(0)).double()
)


def products(matrix: Tensor = MATRIX) -> Products:
    return Products.of(hf.dense(matrix), torch.zeros(N).double())


def after(steps: int, capacity: int, **options: int) -> Recurrences:
    runs, of = Recurrences.begin(UNITS, capacity, **options), products()
    for _ in range(steps):
        runs = extended(of, runs)
    assert of.matvecs == steps * len(UNITS)
    return runs


@pytest.mark.parametrize("workspace", [None, 4])
def test_the_recurrence_holds_in_an_orthonormal_basis(workspace: int | None) -> None:
    options = {} if workspace is None else {"workspace": workspace}
    runs = after(12, capacity=20, **options)
    for i in range(3):
        alphas, betas = runs.jacobi(i)
        basis = runs.basis.of(i).rows
        assert basis.shape == (13, N)
        torch.testing.assert_close(basis @ basis.mT, torch.eye(13).double(), rtol=0, atol=1e-13)
        projected = basis @ MATRIX @ basis.mT
        torch.testing.assert_close(projected.diagonal()[:12], torch.tensor(alphas).double())
        torch.testing.assert_close(projected.diagonal(1), torch.tensor(betas).double())


def test_vectors_beyond_the_capacity_continue_the_recurrence() -> None:
    runs, whole = after(12, capacity=5), after(12, capacity=20)
    assert len(runs.basis) == 5
    assert len(runs.tail) == 2
    for i in range(3):
        torch.testing.assert_close(runs.basis.of(i).rows, whole.basis.of(i).rows[:5])
        torch.testing.assert_close(runs.tail[:, i], whole.basis.of(i).rows[-2:])
        torch.testing.assert_close(torch.tensor(runs.jacobi(i)), torch.tensor(whole.jacobi(i)))


def test_a_recurrence_ends_with_its_krylov_space_or_with_its_steps() -> None:
    matrix = torch.linspace(1, 2, N).double().diag()
    units = torch.eye(N).double()[:2]
    units[1] = (units[1] + torch.eye(N).double()[5]) / 2**0.5
    of = products(matrix)
    runs = Recurrences.begin(torch.cat([units, UNITS[:1]]), 10)
    for _ in range(3):
        runs = extended(of, runs, 3)
    assert runs.taken == (1, 2, 3)
    assert not runs.active
    assert of.matvecs == 6
    assert runs.jacobi(1)[1][-1] == 0


def test_eigenpairs_of_a_jacobi_matrix() -> None:
    values, vectors = eigenpairs_of(((2.0, 3.0), (1.0, 0.5)))
    matrix = torch.tensor([[2.0, 1], [1, 3]]).double()
    torch.testing.assert_close(vectors @ values.diag() @ vectors.mT, matrix)


def test_asymmetry_is_noticed_beyond_the_capacity() -> None:
    slant = MATRIX.clone()
    slant[:30] *= 1.5
    of = Products.of(lambda block: block @ slant, torch.zeros(N).double())

    def run() -> None:
        runs = Recurrences.begin(UNITS, 2)
        for _ in range(5):
            runs = extended(of, runs)

    with pytest.raises(ValueError, match="not symmetric"):
        run()
