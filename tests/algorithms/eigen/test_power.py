from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.memory import Footprint
from tests.reference.spectra import symmetric

SPECTRUM = torch.cat([torch.linspace(-1, 1, 90), torch.tensor([-9.0, 7.0, 5.0, -4.0])])
VECTOR = torch.zeros(len(SPECTRUM), dtype=torch.float64)


@pytest.mark.parametrize(
    ("which", "values"), [("LM", [-9, 7, 5]), ("LA", [7, 5, 1]), ("SA", [-9, -4, -1])]
)
def test_finds_the_wanted_end(which: str, values: list[float]) -> None:
    matrix = symmetric(SPECTRUM)
    found = hf.power_iteration(
        hf.dense(matrix), VECTOR, k=2, which=which, rtol=1e-4, max_matvecs=4000, seed=0
    )
    assert found.values.tolist() == pytest.approx(values[:2], rel=1e-6)
    assert found.converged.all()
    images = found.vectors @ matrix
    residuals = (images - found.values[:, None] * found.vectors).norm(dim=1)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-6, atol=1e-12)


def test_dominant_pair_of_opposite_sign_does_not_converge_and_says_so() -> None:
    spectrum = torch.cat([torch.tensor([3.0, -3.0]), torch.linspace(-1, 1, 98)])
    found = hf.power_iteration(
        hf.dense(symmetric(spectrum)), torch.zeros(100).double(), max_matvecs=200, seed=0
    )
    assert not found.converged.any()
    assert "budget" in found.reason
    low, high = found.intervals[0]
    assert ((low <= spectrum) & (spectrum <= high)).any()


def test_start_and_its_cost() -> None:
    matrix = symmetric(SPECTRUM)
    vector = torch.linalg.eigh(matrix).eigenvectors[:, 0].contiguous()
    kept = vector.clone()
    found = hf.power_iteration(hf.dense(matrix), VECTOR, start=vector, seed=0)
    assert float(found.values) == pytest.approx(-9)
    assert torch.equal(vector, kept)
    # One product, and the steps that show that nothing larger lies outside.
    cold = hf.power_iteration(hf.dense(matrix), VECTOR, seed=0)
    assert found.matvecs <= cold.matvecs + 5


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@pytest.mark.parametrize(
    ("which", "k", "right"),
    [("LM", 1, [-9.0]), ("LA", 1, [7.0]), ("SA", 1, [-9.0]), ("LM", 2, [-9, 7])],
)
def test_a_start_in_an_invariant_subspace_is_not_trusted(
    which: str, k: int, right: list[float], momentum: float
) -> None:
    start = torch.zeros_like(VECTOR)
    start[92] = 1  # The eigenvector of 5.
    for seed in range(3):
        found = hf.power_iteration(
            lambda v: v * SPECTRUM,
            VECTOR,
            k=k,
            which=which,
            start=start,
            momentum=momentum,
            seed=seed,
        )
        assert found.values.tolist() == pytest.approx(right, rel=1e-4)
        assert found.converged.all()


@pytest.mark.parametrize("k", [1, 3])
def test_memory_is_what_is_said(k: int) -> None:
    n = 200_000
    spectrum = torch.linspace(0.1, 1, n)
    spectrum[:3] = torch.tensor([9.0, 7.0, 5.0])
    like, start = torch.zeros(n), torch.ones(n)
    for given in (None, start):
        with Footprint() as memory:
            found = hf.power_iteration(
                lambda v: v * spectrum, like, k=k, start=given, rtol=0.1, seed=0
            )
        assert found.converged.all()
        # Two of a product: that of the matvec, and the same in one row.
        vectors = max(2 * k + 3, 3 * k + 1) + 2 + 2 * (given is not None)
        assert memory.peak <= 1.2 * vectors * 4 * n


def test_zero_matrix_and_whole_space() -> None:
    found = hf.power_iteration(hf.dense(torch.zeros(3, 3)), torch.zeros(3), k=3, seed=0)
    assert found.values.tolist() == [0, 0, 0]
    assert found.converged.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 95}, "k=95: the matrix has 94"),
        ({"rtol": -1.0}, "rtol"),
        ({"momentum": -1.0}, "momentum"),
        ({"which": "BE"}, "which='BE'"),
        ({"start": VECTOR}, "zeros"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.power_iteration(hf.dense(symmetric(SPECTRUM)), VECTOR, **options)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (torch.full((3,), float("nan")), "NaN"),
        (torch.full((3,), float("inf")), "NaN or infinite"),
        (torch.zeros(3), "zeros"),
        (torch.zeros(0, 3), "block of 0"),
    ],
)
def test_a_start_that_is_no_vector_is_refused(start: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hf.power_iteration(hf.dense(torch.eye(3)), torch.zeros(3), start=start, seed=0)
