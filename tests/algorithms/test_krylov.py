from __future__ import annotations

from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.deflation import Deflation
from hessfunc.algorithms.krylov import Krylov
from hessfunc.spaces.of import space_of
from tests.reference.spectra import symmetric

N = 60
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
SIGNS = torch.where(INDEX % 3 > 0, 1.0, -1.0)
MATRIX = symmetric(torch.where(INDEX <= 8, 40 / INDEX, INDEX / N) * SIGNS)
LIKE = {"a": torch.zeros(4, 5).double(), "b": torch.zeros(N - 20).double()}
SPACE = space_of(LIKE)
ESTIMATORS = pytest.mark.parametrize("estimator", [hf.trace, hf.diagonal])


def matvec(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return SPACE.unravel(SPACE.ravel(block) @ MATRIX)


def density(steps: int = 12, **options: Any) -> hf.results.Density:
    return hf.slq(matvec, LIKE, steps=steps, keep_basis=True, seed=0, **options)


@pytest.mark.parametrize("steps", [1, 2, 12, N])
def test_known_products_are_those_of_the_matrix(steps: int) -> None:
    krylov = Krylov.of(SPACE, density(steps), "start")
    products = krylov.core @ krylov.basis
    if len(krylov.end):
        products[-1] += krylov.end[0]
    assert len(krylov) == min(steps - 1, N - 3)
    torch.testing.assert_close(krylov.basis @ MATRIX, products, rtol=0, atol=1e-10)


def test_the_deflated_part_is_exact() -> None:
    krylov = Krylov.of(SPACE, density(), "start")
    state = krylov.deflated(Deflation.none(SPACE, 0, diagonal=True), SPACE)
    inside = krylov.basis.mT @ krylov.basis
    outside = torch.eye(N, dtype=torch.float64) - inside
    rest = MATRIX - outside @ MATRIX @ outside
    torch.testing.assert_close(state.diagonal[0], rest.diagonal(), rtol=0, atol=1e-10)
    by_leaf = torch.stack([rest.diagonal()[:20].sum(), rest.diagonal()[20:].sum()])
    torch.testing.assert_close(state.parts, by_leaf, rtol=0, atol=1e-10)
    rows = (MATRIX @ inside @ MATRIX).diagonal()
    torch.testing.assert_close(state.row_squares[0], rows, rtol=0, atol=1e-9)


def test_an_exhausted_space_is_used_whole() -> None:
    values = torch.where(INDEX <= 2, 3.0, 1.0).double()
    found = hf.slq(lambda block: block * values, INDEX, steps=20, keep_basis=True, seed=0)
    krylov = Krylov.of(space_of(INDEX), found, "start")
    assert len(krylov) == 2
    assert not len(krylov.end)
    estimate = hf.trace(lambda block: block * values, INDEX, start=found, max_matvecs=8, seed=0)
    assert estimate.interval(0.999)[0] <= float(values.sum()) <= estimate.interval(0.999)[1]


@ESTIMATORS
def test_a_density_saves_products(estimator: Any) -> None:
    alone = estimator(matvec, LIKE, rtol=0.05, max_matvecs=55, seed=1)
    after = estimator(matvec, LIKE, rtol=0.05, max_matvecs=55, seed=1, start=density(40))
    assert after.reason.startswith("converged")
    assert after.matvecs < alone.matvecs / 2


@ESTIMATORS
def test_a_run_writes_nothing_behind_its_krylov_space(estimator: Any) -> None:
    start = density()
    before = SPACE.ravel(start.basis).clone()
    runs = [estimator(matvec, LIKE, start=start, max_matvecs=30, seed=1) for _ in range(2)]
    assert runs[0].by_leaf == runs[1].by_leaf
    torch.testing.assert_close(SPACE.ravel(start.basis), before, rtol=0, atol=0)
    krylov = Krylov.of(SPACE, start, "start")
    assert krylov.basis.untyped_storage().nbytes() == krylov.basis.nbytes


def test_intervals_cover_with_the_seed_of_the_density() -> None:
    covered = 0
    for seed in range(200):
        start = hf.slq(matvec, LIKE, steps=8, keep_basis=True, seed=seed)
        low, high = hf.trace(matvec, LIKE, start=start, max_matvecs=8, seed=seed).interval(0.9)
        covered += low <= float(MATRIX.trace()) <= high
    # With 200 seeds, the standard error of a coverage of 90 % is 2 %.
    assert covered >= 168


def test_diagonals_are_unbiased_with_the_seed_of_the_density() -> None:
    errors = []
    for seed in range(60):
        start = hf.slq(matvec, LIKE, steps=8, keep_basis=True, seed=seed)
        found = hf.diagonal(matvec, LIKE, start=start, max_matvecs=8, seed=seed)
        errors.append(SPACE.ravel_leaves([leaf[None] for leaf in found.value.values()])[0])
    mean, spread = torch.stack(errors).mean(0), torch.stack(errors).std(0) / 60**0.5
    assert float(((mean - MATRIX.diagonal()) / spread).abs().max()) < 5


def test_leaves_and_rows_have_intervals() -> None:
    found = hf.trace(matvec, LIKE, start=density(), max_matvecs=12, seed=3)
    for name, part in (("a", MATRIX.diagonal()[:20]), ("b", MATRIX.diagonal()[20:])):
        low, high = found.by_leaf[name].interval(0.999)  # type: ignore[attr-defined]
        assert low <= float(part.sum()) <= high
    assert found.squared_frobenius is not None
    low, high = found.squared_frobenius.interval(0.999)
    assert low <= float(MATRIX.square().sum()) <= high


@ESTIMATORS
def test_a_density_without_its_basis_is_refused(estimator: Any) -> None:
    bare = hf.slq(matvec, LIKE, steps=4, seed=0)
    with pytest.raises(ValueError, match="keep_basis=True"):
        estimator(matvec, LIKE, start=bare)


def test_a_saved_density_is_a_start(tmp_path: Any) -> None:
    start = density()
    start.save(tmp_path / "density.npz")
    loaded = hf.load(tmp_path / "density.npz")
    options: Any = {"max_matvecs": 10, "seed": 0}
    one = hf.trace(matvec, LIKE, start=start, **options)
    assert one.value == hf.trace(matvec, LIKE, start=loaded, **options).value  # type: ignore[arg-type]


def test_a_density_is_refused_by_another_method() -> None:
    with pytest.raises(ValueError, match="deflates eigenpairs only"):
        hf.trace(matvec, LIKE, method="hutchinson", start=density())


@ESTIMATORS
@pytest.mark.parametrize("change", [1.01, -1.0, 1e-3])
def test_a_density_of_another_matrix_is_refused(estimator: Any, change: float) -> None:
    def other(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return SPACE.unravel(change * SPACE.ravel(matvec(block)))

    with pytest.raises(ValueError, match="start belongs to another matrix"):
        estimator(other, LIKE, start=density(), max_matvecs=20)


@ESTIMATORS
def test_a_density_in_low_precision_is_that_of_the_matrix(estimator: Any) -> None:
    """Products in bfloat16 with vectors in float32 are equal up to their own rounding."""
    coarse = MATRIX.bfloat16()

    def product(block: torch.Tensor) -> torch.Tensor:
        return (block.bfloat16() @ coarse).float()

    like = torch.zeros(N)
    start = hf.slq(product, like, steps=6, keep_basis=True, seed=0)
    assert estimator(product, like, start=start, max_matvecs=10, seed=0).matvecs == 10
