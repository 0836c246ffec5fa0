from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.optim import (
    CombinedNorm,
    InfinityNorm,
    LargestNorm,
    PreconditionedNorm,
    Preconditioner,
    SpectralNorm,
)

D = torch.float64
EXACT: dict[str, Any] = {"rtol": 1e-10, "max_matvecs": 10**5, "seed": 0}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def positive(n: int, seed: int = 0) -> Tensor:
    A = random(n, n, seed=seed)
    return A @ A.mT


def like(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=D) for name, shape in shapes.items()}


SIGNS = LargestNorm({"w": InfinityNorm()})


@pytest.mark.parametrize("seed", range(4))
def test_with_signs_it_is_the_largest_of_all_corners(seed: int) -> None:
    A = positive(8, seed)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=D)
    expected = float((corners @ A * corners).sum(1).max())
    found = hf.generalized_sharpness(hf.dense(A), like(w=(8,)), SIGNS, restarts=32, **EXACT)
    assert found.value == pytest.approx(expected)
    assert found.converged
    assert found.gap == pytest.approx(0, abs=1e-8)
    d = found.direction["w"]
    assert float(d @ A @ d) == pytest.approx(found.value)
    assert float(d.abs().max()) == pytest.approx(1)
    assert float(found.values.max()) == found.value


def test_an_indefinite_matrix_has_its_maximum_within_the_ball() -> None:
    A = torch.diag(torch.tensor([2.0, 1.0, -5.0], dtype=D))
    found = hf.generalized_sharpness(hf.dense(A), like(w=(3,)), SIGNS, **EXACT)
    assert found.value == pytest.approx(3)
    assert abs(float(found.direction["w"][2])) < 1e-3


def test_in_the_spectral_norm_it_is_the_inner_product_of_the_sorted_eigenvalues() -> None:
    # max <X, AXB> over |X| <= 1 is sum_i a_i b_i for sorted a and b (von Neumann 1937).
    A, B = positive(3, 1), positive(4, 2)
    a, b = (torch.linalg.eigvalsh(matrix).flip(0) for matrix in (A, B))
    expected = float(a @ b[:3])
    matvec = hf.dense(torch.kron(A, B))
    norm = LargestNorm({"w": SpectralNorm()})
    found = hf.generalized_sharpness(matvec, like(w=(3, 4)), norm, **EXACT)
    assert found.value == pytest.approx(expected, rel=1e-6)
    doubled = LargestNorm({"w": SpectralNorm(radius=2.0)})
    found = hf.generalized_sharpness(matvec, like(w=(3, 2, 2)), doubled, **EXACT)
    assert found.value == pytest.approx(4 * expected, rel=1e-6)


def test_in_a_preconditioned_norm_it_is_the_largest_eigenvalue() -> None:
    A, P = positive(6), torch.rand(6, dtype=D) + 0.1
    norm = PreconditionedNorm({"w": Preconditioner(P[:4].view(2, 2)), "b": Preconditioner(P[4:])})
    expected = float(torch.linalg.eigvalsh(A / P.sqrt().outer(P.sqrt()))[-1])
    vectors = like(w=(2, 2), b=(2,))
    found = hf.generalized_sharpness(hf.dense(A), vectors, norm, **EXACT)
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_parts_of_a_combined_norm_share_the_unit() -> None:
    """For separate parts, the maximum is the larger of S_i / weight_i."""
    A = torch.diag(torch.tensor([3.0, 2.0, 7.0], dtype=D))
    w, b = LargestNorm({"w": InfinityNorm()}), PreconditionedNorm({"b": Preconditioner(A[2:, 2])})
    for weight, expected in ((1.0, 5.0), (10.0, 1.0)):
        norm = CombinedNorm([(weight, w), (1.0, b)])
        found = hf.generalized_sharpness(hf.dense(A), like(w=(2,), b=(1,)), norm, **EXACT)
        assert found.value == pytest.approx(expected, rel=1e-4)


def test_a_start_of_any_length_is_one_more_run() -> None:
    A = positive(10, seed=5)
    best = hf.generalized_sharpness(hf.dense(A), like(w=(10,)), SIGNS, restarts=32, **EXACT)
    start = {"w": 100 * best.direction["w"]}
    again = hf.generalized_sharpness(
        hf.dense(A), like(w=(10,)), SIGNS, restarts=0, start=start, **EXACT
    )
    assert again.value == pytest.approx(best.value)
    assert again.matvecs <= 3
    assert len(again.values) == 1


def test_a_budget_that_is_exhausted_is_said() -> None:
    A = positive(30)
    norm = LargestNorm({"w": SpectralNorm()})
    found = hf.generalized_sharpness(
        hf.dense(A), like(w=(5, 6)), norm, rtol=0.0, max_matvecs=10, seed=0
    )
    assert not found.converged
    assert found.matvecs <= 10
    assert "budget exhausted" in found.reason
    # 2 (|Ad|* - d'Ad) with the nuclear norm, the dual of the spectral one.
    d = found.direction["w"]
    image = (A @ d.flatten()).view(5, 6)
    gap = 2 * (torch.linalg.matrix_norm(image, "nuc") - (d * image).sum())
    assert found.gap == pytest.approx(float(gap), rel=1e-6)


def test_a_checkpoint_of_another_norm_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path, "seed": 0}
    hf.generalized_sharpness(hf.dense(positive(4)), like(w=(4,)), SIGNS, **options)
    other = LargestNorm({"w": InfinityNorm(2.0)})
    with pytest.raises(ValueError, match="length"):
        hf.generalized_sharpness(hf.dense(positive(4)), like(w=(4,)), other, **options)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    found = hf.generalized_sharpness(hf.dense(positive(4)), like(w=(4,)), SIGNS, seed=0)
    found.save(tmp_path / "found.npz")
    loaded = hf.load(tmp_path / "found.npz")
    assert isinstance(loaded, hf.results.GeneralizedSharpness)
    assert loaded.value == found.value
    torch.testing.assert_close(loaded.direction, found.direction)
    assert repr(loaded) == repr(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": 0}, "restarts=0"),
        ({"rtol": -1.0}, "rtol=-1.0"),
        ({"max_matvecs": 3}, "max_matvecs=3"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.generalized_sharpness(hf.dense(positive(4)), like(w=(4,)), SIGNS, **options)
