from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.reference.spectra import SPECTRUM, VECTOR, symmetric

BULK = torch.linspace(-0.1, 0.1, 198, dtype=torch.float64)


def softmax_regression() -> tuple[hf.trees.Matvec, Tensor, Tensor]:
    """The Hessian at zero weights: each eigenvalue stands there four times, 40 are zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, dtype=torch.float64, generator=generator) * torch.linspace(1, 3, 40)
    weight = torch.zeros(40, 5, dtype=torch.float64)
    loss = hf.supervised(lambda params, x: x @ params, torch.nn.functional.cross_entropy)
    labels = torch.randint(5, (300,), generator=generator)
    matvec = hf.hvp(loss)(weight, (x.double(), labels))
    distinct = torch.linalg.eigvalsh(x.double().mT @ x.double() / 300).flip(0) / 5
    return matvec, weight, distinct.repeat_interleave(4)


def test_blocks_find_repeated_eigenvalues_whole() -> None:
    matvec, like, expected = softmax_regression()
    found = hf.lanczos(matvec, like, k=12, block_size=4, rtol=1e-6, seed=0)
    torch.testing.assert_close(found.values, expected[:12], rtol=1e-8, atol=0)
    assert found.reason == "converged: all residuals are within the tolerance"


@pytest.mark.parametrize("seed", range(5))
def test_a_single_vector_warns_of_repeated_eigenvalues(seed: int) -> None:
    matvec, like, expected = softmax_regression()
    with pytest.warns(UserWarning, match="repeated eigenvalues were missed, take block_size=4"):
        found = hf.lanczos(matvec, like, k=6, search=8, seed=seed)
    assert "outside of the basis" in found.reason
    assert not torch.allclose(found.values, expected[:6], rtol=1e-3)


def test_simple_eigenvalues_do_not_warn() -> None:
    for seed in range(20):
        hf.lanczos(hf.dense(symmetric(SPECTRUM)), VECTOR, k=5, which="BE", seed=seed)


def test_a_search_is_not_made_where_it_is_not_asked_for() -> None:
    A = torch.linspace(0, 6, 200, dtype=torch.float64).diag()
    A[0, 0] = A[1, 1] = 9.0
    like, start = torch.zeros(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
    # Two equal entries of the start hide one copy of 9 from its Krylov space.
    searched = hf.lanczos(hf.dense(A), like, k=2, start=start, seed=0)
    alone = hf.lanczos(hf.dense(A), like, k=2, start=start, seed=0, search=0)
    assert searched.values.tolist() == pytest.approx([9, 9])
    assert alone.values.tolist() == pytest.approx([9, 6], rel=0.01)
    assert alone.matvecs < searched.matvecs
    assert alone.reason == "converged: all residuals are within the tolerance"


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize(
    ("which", "top", "right"),
    [
        ("LA", [4.9, 5.6], [5.6]),
        ("LM", [4.9, -5.6], [-5.6]),
        ("SA", [-4.9, -5.6], [-5.6]),
        ("LA", [4.9, 5.0], [5.0]),
        ("LA", [0.2, 0.25], [0.25]),
        ("BE", [3.0, 3.5], [3.5, -0.1]),
        ("LA", [4.9, 4.9], [4.9]),
    ],
)
def test_a_start_in_an_invariant_subspace_is_not_trusted(
    which: str, top: list[float], right: list[float], block_size: int
) -> None:
    spectrum = torch.cat([torch.tensor(top, dtype=torch.float64), BULK])
    like, start = torch.zeros(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    start[0] = 1
    options: dict[str, Any] = {"k": len(right), "which": which, "block_size": block_size}
    for seed in range(4):
        found = hf.lanczos(
            lambda v: v * spectrum, like, start=start, rtol=1e-3, seed=seed, **options
        )
        assert found.values.tolist() == pytest.approx(right, rel=1e-3)
        assert found.converged.all()
        assert found.reason.startswith("converged")


def test_a_start_in_one_block_of_a_matrix_finds_the_other_block() -> None:
    first, second = symmetric(torch.linspace(0, 3, 50)), symmetric(torch.linspace(0, 9, 50))
    matrix = torch.block_diag(first, second)
    start = torch.cat([torch.randn(50), torch.zeros(50)]).double()
    found = hf.lanczos(
        hf.dense(matrix), torch.zeros(100).double(), k=2, which="LA", start=start, seed=0
    )
    assert found.values.tolist() == pytest.approx([9, 9 - 9 / 49])


def test_a_budget_that_is_too_small_to_trust_a_start_is_said() -> None:
    spectrum = torch.cat([torch.tensor([0.2, 0.25], dtype=torch.float64), BULK])
    start = torch.eye(200, dtype=torch.float64)[0]
    with pytest.warns(UserWarning, match="no wanted eigenvalue lies outside of the Krylov space"):
        found = hf.lanczos(
            lambda v: v * spectrum, torch.zeros_like(start), k=1, start=start, max_matvecs=4, seed=0
        )
    assert not found.reason.startswith("converged")


def test_copies_are_found_or_missed_aloud_where_the_basis_nearly_fills_the_space() -> None:
    # The cluster at zero ends the run after 12 or 13 vectors, before 15 span an invariant space.
    cluster = torch.linspace(-1e-3, 1e-3, 5)
    spectrum = torch.cat([torch.full((3,), 5.0), torch.linspace(1, 4, 9), cluster]).double()
    like = torch.zeros(17).double()
    options: dict[str, Any] = {"k": 10, "which": "LA", "rtol": 1e-2}
    for seed in range(10):
        # Two copies have no part in the start: zeros stay zero, however sums are rounded.
        start = hf.random_like(like, 1, kind="normal", seed=seed)[0]
        start[1:3] = 0.0
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = hf.lanczos(lambda v: v * spectrum, like, start=start, seed=seed, **options)
        copies = int((found.values > 4.9).sum())
        assert copies == 3 or "outside of the" in str(said[0].message)


def test_a_certificate_is_a_probability_that_copies_exceed_no_more_often() -> None:
    # One copy of 3 is outside of the Krylov space of any start: the search meets it, or says with
    # what probability it would not have met it.
    n = 300
    bulk = torch.linspace(-1, 1, n - 4, dtype=torch.float64)
    spectrum = torch.cat([torch.tensor([6.0, 5.0, 3.0, 3.0]).double(), bulk])
    like = torch.zeros(n, dtype=torch.float64)
    certificates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(100):
            found = hf.lanczos(lambda v: v * spectrum, like, k=3, which="LA", search=4, seed=seed)
            assert found.values.tolist() == pytest.approx([6, 5, 3], rel=1e-4)
            if "outside of the basis" not in found.reason:
                assert found.certificate is not None
                certificates.append(found.certificate)
            else:
                assert found.certificate == 1.0
    for level in (0.02, 0.05, 0.1, 0.2, 0.5):
        wrong = sum(p <= level for p in certificates)
        # Three standard deviations of a binomial count above its mean.
        assert wrong <= 100 * level + 3 * (100 * level * (1 - level)) ** 0.5


def test_the_certificate_of_well_separated_values_takes_two_products() -> None:
    bulk = torch.linspace(-0.1, 0.1, 297, dtype=torch.float64)
    spectrum = torch.cat([torch.tensor([90.0, 80.0, 70.0]).double(), bulk])
    like = torch.zeros(300, dtype=torch.float64)
    with_search, alone = (
        hf.lanczos(lambda v: v * spectrum, like, k=3, seed=0, search=search) for search in (2, 0)
    )
    assert with_search.certificate is not None
    assert with_search.certificate < 0.05
    assert 1 <= with_search.matvecs - alone.matvecs <= 2
    assert alone.certificate is None
    assert "a repeated eigenvalue would be missed with p =" in repr(with_search)
    assert "missed" not in repr(alone)


def test_values_without_a_gap_are_not_certified() -> None:
    spectrum = torch.linspace(1, 3, 300, dtype=torch.float64)
    found = hf.lanczos(lambda v: v * spectrum, torch.zeros_like(spectrum), k=3, seed=0)
    assert found.converged.all()
    assert found.certificate is not None
    assert found.certificate > 0.5


def test_a_run_that_spans_an_invariant_subspace_is_certain() -> None:
    spectrum = torch.tensor([5.0] * 3 + [1.0] * 20).double()
    found = hf.lanczos(lambda v: v * spectrum, torch.zeros_like(spectrum), k=4, seed=0)
    assert found.certificate == 0.0
