from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from tests.reference.spectra import symmetric

N = 80
MATRIX = symmetric(torch.linspace(-1, 4, N))
LIKE = {"a": torch.zeros(3, 10).double(), "b": torch.zeros(N - 30).double()}


def test_mean_and_standard_error_are_those_of_the_formula() -> None:
    matvec = hf.dense(MATRIX)
    found = [hf.hutchinson_diagonal(matvec, LIKE, max_matvecs=50, seed=s) for s in range(80)]
    expected = ((MATRIX.square().sum(0) - MATRIX.diagonal().square()) / 50).sqrt()
    mean = torch.stack([hf.ravel(one.value) for one in found]).mean(0)
    assert bool(((mean - MATRIX.diagonal()).abs() < 4.5 * expected / 80**0.5).all())
    errors = torch.stack([hf.ravel(one.stderr) for one in found])
    torch.testing.assert_close(errors.square().mean(0).sqrt(), expected, rtol=0.1, atol=0)
    assert found[0].value["a"].shape == (3, 10)


def test_mean_relative_error_on_a_wishart_matrix() -> None:
    z = torch.randn(1000, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = z @ z.mT / 1000
    like = torch.zeros(1000).double()
    found = hf.hutchinson_diagonal(hf.dense(matrix), like, max_matvecs=20, seed=0)
    relative = ((found.value - matrix.diagonal()) / matrix.diagonal()).abs()
    assert float(relative.mean()) == pytest.approx(0.178, abs=0.02)


def test_stops_at_the_tolerance() -> None:
    found = hf.hutchinson_diagonal(hf.dense(MATRIX), LIKE, rtol=0.1, max_matvecs=5000, seed=0)
    assert found.reason.startswith("converged")
    assert found.relative_error() <= 0.1
    error = (hf.ravel(found.value) - MATRIX.diagonal()).norm() / MATRIX.diagonal().norm()
    assert float(error) < 0.1


def test_exact_on_a_diagonal_matrix() -> None:
    diagonal = torch.arange(1.0, 6.0)
    matvec, like = hf.dense(diagonal.diag()), torch.zeros(5)
    found = hf.hutchinson_diagonal(matvec, like, max_matvecs=3, seed=0)
    torch.testing.assert_close(found.value, diagonal)
    assert float(found.stderr.max()) < 1e-4


def test_block_size_changes_nothing_but_the_passes() -> None:
    ten = hf.hutchinson_diagonal(hf.dense(MATRIX), LIKE, max_matvecs=30, seed=5)
    one = hf.hutchinson_diagonal(hf.dense(MATRIX), LIKE, max_matvecs=30, block_size=1, seed=5)
    torch.testing.assert_close(hf.ravel(ten.value), hf.ravel(one.value))
    torch.testing.assert_close(hf.ravel(ten.stderr), hf.ravel(one.stderr))
    assert (ten.passes, one.passes) == (3, 30)


@pytest.mark.parametrize(
    ("options", "message"), [({"rtol": -0.1}, "rtol"), ({"max_matvecs": 1}, "max_matvecs=1")]
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.hutchinson_diagonal(hf.dense(MATRIX), LIKE, **options)


def test_entries_that_agree_by_chance_have_an_error() -> None:
    pair = torch.tensor([[0.0, 1], [1, 0]], dtype=torch.float64)
    A = torch.block_diag(*[pair] * 30)
    like, covered = torch.zeros(60, dtype=torch.float64), []
    for seed in range(60):
        low, high = hf.hutchinson_diagonal(hf.dense(A), like, max_matvecs=3, seed=seed).interval()
        covered.append(float(((low <= 0) & (high >= 0)).double().mean()))
    assert sum(covered) / 60 > 0.93
