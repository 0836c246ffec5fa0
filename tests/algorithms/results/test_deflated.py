from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.results.deflated import shifts
from tests.reference.spectra import symmetric

N = 120
OUTLIERS = torch.tensor([90.0, 60, 45, 30, 22, -15, 12, 10], dtype=torch.float64)
BULK = torch.linspace(-1, 2, N - len(OUTLIERS), dtype=torch.float64) ** 3
SPECTRUM = torch.cat([OUTLIERS, BULK]).sort().values
MATRIX = symmetric(SPECTRUM)
LIKE = torch.zeros(N, dtype=torch.float64)
K = len(OUTLIERS) + 2


def pairs(matrix: torch.Tensor = MATRIX, rtol: float = 1e-12, k: int = K) -> Any:
    return hf.lanczos(hf.dense(matrix), LIKE, k=k, rtol=rtol, basis_size=60, search=0, seed=9)


EXACT = pairs(k=len(OUTLIERS))


def distance(density: hf.results.Density) -> float:
    """W1 between the masses and the spectrum."""
    points = torch.cat([density.nodes.flatten(), SPECTRUM]).sort().values
    mass = density.masses.flatten() / len(density.nodes)
    share = ((density.nodes.flatten() <= points[:, None]) * mass).sum(1)
    true = (points[:, None] >= SPECTRUM).double().mean(1)
    return float((share - true).abs()[:-1] @ points.diff())


def test_the_density_is_exact_where_the_complement_is_a_multiple_of_the_identity() -> None:
    spectrum = torch.cat([OUTLIERS, torch.full_like(BULK, 0.5)])
    found = hf.slq(
        hf.dense(symmetric(spectrum)), LIKE, steps=20, deflate=pairs(symmetric(spectrum), k=8)
    )
    # One product checks the eigenpairs.
    assert found.matvecs == 1 + 1
    assert found.nodes[0].tolist() == pytest.approx(sorted([*OUTLIERS.tolist(), 0.5]), abs=1e-9)
    weights = {round(node, 6): weight for node, weight in zip(*found_rows(found), strict=True)}
    assert weights.pop(0.5) == pytest.approx(1 - 8 / N)
    assert list(weights.values()) == pytest.approx([1 / N] * 8)
    mean = found.mean(torch.exp)
    assert mean.value == pytest.approx(float(spectrum.exp().mean()), rel=1e-9)
    assert mean.stderr == pytest.approx(0, abs=1e-12 * mean.value)
    assert found.count_above(5.0) == (7, 7)
    assert found.count_above(0.0) == (N - 1, N - 1)


def found_rows(found: hf.results.Density) -> tuple[list[float], list[float]]:
    assert torch.equal(found.masses, found.weights)
    return found.nodes[0].tolist(), found.weights[0].tolist()


def test_probes_are_orthogonal_to_the_eigenvectors() -> None:
    seen = []

    def matvec(block: torch.Tensor) -> torch.Tensor:
        seen.append((block @ EXACT.vectors.mT).abs().max())
        return block @ MATRIX

    found = hf.slq(matvec, LIKE, probes=3, steps=30, deflate=EXACT, seed=0)
    # The first product checks the eigenpairs.
    assert float(torch.stack(seen[1:]).max()) < 1e-10
    assert found.deflated is not None
    assert found.nodes.shape == (3, 38)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3).double())
    torch.testing.assert_close(found.masses.sum(1), torch.ones(3).double())
    assert bool((found.nodes.diff(dim=1) >= 0).all())


def test_the_density_is_nearer_in_as_many_products() -> None:
    plain, deflated = [], []
    for seed in range(10):
        plain.append(distance(hf.slq(hf.dense(MATRIX), LIKE, steps=12, seed=seed)))
        found = hf.slq(hf.dense(MATRIX), LIKE, steps=12, deflate=EXACT, seed=seed)
        deflated.append(distance(found))
        assert deflated[-1] <= found.distance()
    assert sum(deflated) < sum(plain) / 1.5


@pytest.mark.parametrize("rtol", [1e-12, 0.3])
def test_bounds_hold_for_pairs_that_have_not_converged(rtol: float) -> None:
    start = pairs(rtol=rtol)
    covered = dict.fromkeys(("mean", "count", "share", "dimension"), 0)
    f, seeds = (lambda x: x.clamp(-2, 4)), 10
    psd = symmetric(SPECTRUM.abs())
    positive = pairs(psd, rtol)
    for seed in range(seeds):
        found = hf.slq(hf.dense(MATRIX), LIKE, steps=8, deflate=start, seed=seed)
        low, high = found.mean(f).interval(0.9)
        covered["mean"] += low <= float(f(SPECTRUM).mean()) <= high
        fewest, most = found.count_above(1.0, 0.9)
        covered["count"] += fewest <= int((SPECTRUM > 1).sum()) <= most
        low, high = map(float, found.cdf_bounds(0.1, 0.9))
        covered["share"] += low <= float((SPECTRUM <= 0.1).double().mean()) <= high
        found = hf.slq(hf.dense(psd), LIKE, steps=8, deflate=positive, seed=seed)
        low, high = found.effective_dimension(1.0).interval(0.9)
        true = float((SPECTRUM.abs() / (SPECTRUM.abs() + 1)).sum())
        covered["dimension"] += low <= true <= high
    # Fewer than 7 of 10 have the probability 1 % at a coverage of 90 %.
    assert min(covered.values()) >= 7, covered


def test_all_eigenvalues_are_known_after_as_many_steps_as_the_complement_has() -> None:
    found = hf.slq(hf.dense(MATRIX), LIKE, steps=N, deflate=EXACT, seed=0)
    assert found.matvecs == 1 + N - len(OUTLIERS)
    mean = found.mean(torch.square)
    assert mean.reason.startswith("exact")
    assert mean.value == pytest.approx(float(SPECTRUM.square().mean()))


def test_shifts_are_quadratic_in_residuals_where_there_is_a_gap() -> None:
    values = torch.tensor([10.0, 3.0, 0.5, -4.0]).double()
    errors = torch.tensor([0.1, 5.0, 0.1, 0.1]).double()
    found = shifts(values, errors, -2.0, 2.0)
    assert found.tolist() == pytest.approx([0.1**2 / 8, 5.0, 0.1, 0.1**2 / 2])


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = hf.slq(hf.dense(MATRIX), LIKE, steps=6, deflate=EXACT, seed=0)
    found.save(tmp_path / "density.npz")
    loaded: Any = hf.load(tmp_path / "density.npz")
    assert torch.equal(loaded.masses, found.masses)
    assert loaded.mean(torch.exp).value == found.mean(torch.exp).value


def test_a_basis_of_the_complement_is_refused() -> None:
    with pytest.raises(ValueError, match="pass only one of the two"):
        hf.slq(hf.dense(MATRIX), LIKE, deflate=EXACT, keep_basis=True)
