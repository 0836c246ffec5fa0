from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.memory import Footprint
from tests.algorithms.far import every_basis_is_far
from tests.reference.spectra import SPECTRUM, VECTOR, measured_residuals, symmetric


def test_a_bfloat16_basis_has_honest_residuals_and_takes_half_of_the_memory() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 50_000), torch.tensor([9.0, -7.0, 5.0])])
    like = torch.zeros(len(spectrum))
    rotation = hf.random_like(like, 1, kind="normal", seed=7)[0]
    rotation /= rotation.norm()

    def matvec(block: Tensor) -> Tensor:
        # Between two reflections, for eigenvectors that have all entries.
        block = block - 2 * (block @ rotation)[:, None] * rotation
        block = block * spectrum
        return block - 2 * (block @ rotation)[:, None] * rotation

    peaks = []
    for dtype in (torch.bfloat16, torch.float32):
        with Footprint() as memory:
            found = hf.lanczos(
                matvec, like, k=3, basis_size=60, rtol=1e-2, basis_dtype=dtype, seed=0
            )
        peaks.append(memory.peak)
        assert found.converged.all()
        assert found.vectors.dtype == torch.float32
        assert found.values.tolist() == pytest.approx([9, -7, 5], rel=2e-3)
        rows = found.vectors
        measured = (matvec(rows) - found.values[:, None].float() * rows).norm(dim=1).double()
        assert bool((found.residuals >= 0.99 * measured).all())
    # Less the vectors of the final check in float32: the products of the pairs are measured.
    half, vector = 61 * len(spectrum) * 2, len(spectrum) * 4
    assert half - 7 * vector < peaks[1] - peaks[0] < half


@pytest.mark.parametrize("rtol", [1e-4, 1e-2, 0.1])
def test_a_bfloat16_basis_converges_to_its_rounding_alone(rtol: float) -> None:
    matrix = symmetric(SPECTRUM)
    for seed in range(5):
        found = hf.lanczos(
            hf.dense(matrix.float()),
            VECTOR.float(),
            k=4,
            rtol=rtol,
            basis_dtype=torch.bfloat16,
            seed=seed,
        )
        residuals = measured_residuals(matrix, found)
        assert bool((found.residuals >= 0.99 * residuals).all())
        within = found.residuals <= rtol * found.values.abs()
        assert torch.equal(found.converged, within)
        assert bool(found.converged.all()) or rtol < 0.1
        assert ("cannot reach" in found.reason) == (not found.converged.all())


def test_a_bfloat16_basis_from_afar_has_honest_residuals() -> None:
    matrix = symmetric(SPECTRUM)
    options = {"k": 3, "rtol": 1e-2, "basis_dtype": torch.bfloat16, "basis_size": 12}
    with every_basis_is_far():
        found = hf.lanczos(hf.dense(matrix.float()), VECTOR.float(), seed=0, **options)
    assert bool((found.residuals >= 0.99 * measured_residuals(matrix, found)).all())
    assert found.converged.all()
