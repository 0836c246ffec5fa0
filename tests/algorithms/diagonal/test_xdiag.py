from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from tests.reference.spectra import decaying, symmetric

N = 200
LIKE = {"a": torch.zeros(10, 10).double(), "b": torch.zeros(N - 100).double()}
SPECTRA = decaying(N)


def test_is_what_the_formula_says() -> None:
    n, p = 30, 5
    matrix = symmetric(0.8 ** torch.arange(n).double())
    like = torch.zeros(n).double()
    found = hf.xdiag(hf.dense(matrix), like, max_matvecs=2 * p, seed=3)
    probes = hf.random_like(like, p, kind="signs", seed=3)
    samples = []
    for i in range(p):
        others = [m for m in range(p) if m != i]
        basis = torch.linalg.qr((probes[others] @ matrix).mT).Q
        projector = basis @ basis.mT
        image = matrix @ probes[i]
        samples.append((projector @ matrix).diagonal() + probes[i] * (image - projector @ image))
    torch.testing.assert_close(found.value, torch.stack(samples).mean(0))
    torch.testing.assert_close(found.stderr, 1.45 * torch.stack(samples).std(0) / p**0.5)


@pytest.mark.parametrize("rank", [1, 7, 15])
def test_exact_from_one_probe_more_than_the_rank(rank: int) -> None:
    spectrum = torch.where(torch.arange(N) < rank, torch.arange(1.0, N + 1), 0.0)
    matrix = symmetric(spectrum)
    found = hf.xdiag(hf.dense(matrix), LIKE, max_matvecs=2 * (rank + 1), block_size=4, seed=0)
    torch.testing.assert_close(hf.ravel(found.value), matrix.diagonal(), rtol=1e-9, atol=1e-11)


def test_accuracy_on_fast_decay() -> None:
    matrix = symmetric(decaying(1000)["exponential"])
    errors = []
    for seed in range(10):
        found = hf.xdiag(hf.dense(matrix), torch.zeros(1000).double(), max_matvecs=70, seed=seed)
        errors.append(((found.value - matrix.diagonal()) / matrix.diagonal()).abs().max())
    assert float(torch.stack(errors).median()) < 1e-2


@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_cover_entry_by_entry(name: str) -> None:
    matrix = symmetric(SPECTRA[name])
    covered = []
    for seed in range(20):
        found = hf.xdiag(hf.dense(matrix), LIKE, max_matvecs=30, seed=seed)
        low, high = map(hf.ravel, found.interval())
        covered.append((low <= matrix.diagonal()) & (matrix.diagonal() <= high))
    assert float(torch.stack(covered).double().mean()) > 0.92


def test_needs_fewer_products_than_hutchinson() -> None:
    matvec = hf.dense(symmetric(SPECTRA["exponential"]))
    ours = hf.xdiag(matvec, LIKE, rtol=0.1, max_matvecs=1000, seed=0)
    plain = hf.hutchinson_diagonal(matvec, LIKE, rtol=0.1, max_matvecs=1000, seed=0)
    assert ours.reason.startswith("converged")
    assert ours.matvecs < plain.matvecs / 5


@pytest.mark.parametrize("rank", [3, 4])
def test_a_range_on_a_few_entries(rank: int) -> None:
    matrix = torch.zeros(N, N, dtype=torch.float64)
    matrix[:4, :4] = symmetric(torch.cat([torch.arange(1.0, rank + 1), torch.zeros(4 - rank)]))
    wrong = 0
    for seed in range(100):
        found = hf.xdiag(hf.dense(matrix), LIKE, max_matvecs=24, seed=seed)
        low, high = map(hf.ravel, found.interval())
        slack = 1e-12
        inside = (low - slack <= matrix.diagonal()) & (matrix.diagonal() <= high + slack)
        wrong += not bool(inside.all())
    # Twelve probes of signs on four entries span them but for one run in a hundred.
    assert wrong <= 4


def test_all_unit_vectors_give_the_diagonal() -> None:
    matrix = symmetric(torch.linspace(-1, 3, 30))
    like = torch.zeros(30).double()
    found = hf.xdiag(hf.dense(matrix), like, max_matvecs=80, seed=0)
    assert (found.matvecs, found.reason) == (30, "exact: all unit vectors were multiplied")
    torch.testing.assert_close(found.value, matrix.diagonal())
