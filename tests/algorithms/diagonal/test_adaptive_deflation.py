from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.reference.spectra import symmetric

N = 150
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
LIKE = {"a": torch.zeros(5, 10).double(), "b": torch.zeros(N - 50).double()}
SIGNS = torch.where(INDEX % 2 == 0, -1.0, 1.0).double()
MATRICES = {
    "outliers": symmetric(torch.where(INDEX <= 10, 100 / INDEX, 0.02)),
    "1/i": symmetric(1 / INDEX),
    "flat": symmetric(torch.linspace(1, 3, N, dtype=torch.float64)),
    "indefinite": symmetric(SIGNS * 0.9**INDEX),
}


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree["a"].flatten(), tree["b"]])


def relative_error(found: hf.results.DiagonalEstimate, matrix: Tensor) -> float:
    return float((flat(found.value) - matrix.diagonal()).norm() / matrix.diagonal().norm())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rank", [1, 6])
def test_exact_rank(rank: int, sign: float) -> None:
    signs = torch.where(INDEX % 2 == 0, sign, 1.0)
    matrix = symmetric(torch.where(rank >= INDEX, INDEX * signs, 0.0))
    found = hf.diagonal(hf.dense(matrix), LIKE, max_matvecs=40, seed=0)
    assert relative_error(found, matrix) < 1e-8
    assert float(flat(found.stderr).max()) < 1e-8
    assert found.sum_of_squares is not None
    squares = float(matrix.diagonal().square().sum())
    assert found.sum_of_squares.value == pytest.approx(squares, rel=1e-8)


def test_diagonal_matrices_and_zero() -> None:
    for values in (INDEX, torch.zeros(N).double()):
        found = hf.diagonal(hf.dense(values.diag()), LIKE, max_matvecs=20, seed=0)
        torch.testing.assert_close(flat(found.value), values, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_matrices_are_exact(n: int) -> None:
    matrix = symmetric(torch.arange(n).double() - 1)
    found = hf.diagonal(hf.dense(matrix), torch.zeros(n).double(), seed=0)
    torch.testing.assert_close(found.value, matrix.diagonal(), rtol=1e-10, atol=1e-10)
    assert found.matvecs <= n + 1
    assert found.sum_of_squares is not None
    squares = float(matrix.diagonal().square().sum())
    assert found.sum_of_squares.value == pytest.approx(squares, abs=1e-10)


@pytest.mark.parametrize("name", MATRICES)
def test_entries_leaves_and_squares_are_within_their_intervals(name: str) -> None:
    matrix = MATRICES[name]
    truth = matrix.diagonal()
    for budget in (10, 40):
        found = hf.diagonal(hf.dense(matrix), LIKE, max_matvecs=budget, seed=0)
        low, high = map(flat, found.interval(0.95))
        assert float(((low <= truth) & (truth <= high)).double().mean()) > 0.9
        for leaf, part in {"a": float(truth[:50].sum()), "b": float(truth[50:].sum())}.items():
            assert found.by_leaf[leaf] == pytest.approx(float(found.value[leaf].sum()), rel=1e-9)
            low, high = found.by_leaf[leaf].interval(0.999)  # type: ignore[attr-defined]
            assert low <= part <= high
        assert found.sum_of_squares is not None
        low, high = found.sum_of_squares.interval(0.999)
        assert low <= float(truth.square().sum()) <= high
        rows = found.squared_row_norms
        assert rows is not None
        low, high = map(flat, rows.interval(0.99))
        inside = (low <= matrix.square().sum(0)) & (matrix.square().sum(0) <= high)
        assert float(inside.double().mean()) > 0.9


def test_sums_of_squares_are_unbiased() -> None:
    matrix = MATRICES["1/i"]
    truth = float(matrix.diagonal().square().sum())
    runs = [hf.diagonal(hf.dense(matrix), LIKE, max_matvecs=12, seed=s) for s in range(60)]
    unbiased = torch.tensor([float(run.sum_of_squares.value) - truth for run in runs])  # type: ignore[union-attr]
    naive = torch.tensor([float(flat(run.value).square().sum()) - truth for run in runs])
    error = float(unbiased.std()) / 60**0.5
    assert abs(float(unbiased.mean())) < 4 * error < float(naive.mean())


@pytest.mark.parametrize(("name", "rtol"), [("outliers", 0.05), ("1/i", 0.2), ("indefinite", 0.1)])
def test_needs_fewer_products_than_others(name: str, rtol: float) -> None:
    options: dict[str, Any] = {"rtol": rtol, "max_matvecs": 140, "seed": 0}
    found = hf.diagonal(hf.dense(MATRICES[name]), LIKE, **options)
    assert found.reason.startswith("converged")
    assert relative_error(found, MATRICES[name]) < rtol
    for other in (hf.xdiag, hf.hutchinson_diagonal):
        assert found.matvecs < 0.75 * other(hf.dense(MATRICES[name]), LIKE, **options).matvecs


def test_eigenpairs_at_hand_cost_one_product() -> None:
    matrix = MATRICES["outliers"]
    top = hf.lanczos(hf.dense(matrix), LIKE, k=10, rtol=1e-8, seed=0)
    found = hf.diagonal(hf.dense(matrix), LIKE, start=top, rtol=0.01, seed=0)
    assert found.matvecs == 9
    assert relative_error(found, matrix) < 0.01
    assert found.squared_row_norms is None
    low, high = map(flat, found.interval(0.99))
    truth = matrix.diagonal()
    assert float(((low <= truth) & (truth <= high)).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("method", "function"), [("hutchinson", hf.hutchinson_diagonal), ("xdiag", hf.xdiag)]
)
def test_named_methods_are_the_estimators(method: Any, function: Any) -> None:
    options: dict[str, Any] = {"max_matvecs": 20, "block_size": 5, "seed": 3}
    one = hf.diagonal(hf.dense(MATRICES["1/i"]), LIKE, method=method, **options)
    other = function(hf.dense(MATRICES["1/i"]), LIKE, **options)
    assert torch.equal(flat(one.value), flat(other.value))


def test_float32() -> None:
    matrix = MATRICES["outliers"].float()
    found = hf.diagonal(hf.dense(matrix), torch.zeros(N), max_matvecs=40, seed=0)
    error = (found.value - matrix.diagonal()).norm() / matrix.diagonal().norm()
    assert float(error) < 0.01


def test_a_result_is_saved_and_loaded(tmp_path: Path) -> None:
    found = hf.diagonal(hf.dense(MATRICES["1/i"]), LIKE, max_matvecs=20, seed=0)
    found.save(tmp_path / "diagonal.npz")
    again = hf.load(tmp_path / "diagonal.npz")
    assert isinstance(again, hf.results.DiagonalEstimate)
    assert again.by_leaf == found.by_leaf
    assert again.by_leaf["a"].interval() == found.by_leaf["a"].interval()  # type: ignore[attr-defined]
    assert again.sum_of_squares is not None
    assert again.sum_of_squares.value == found.sum_of_squares.value  # type: ignore[union-attr]


def test_a_run_is_resumed_where_it_was_stopped(tmp_path: Path) -> None:
    matrix = hf.dense(MATRICES["1/i"])
    options: dict[str, Any] = {"max_matvecs": 30, "seed": 5}
    whole = hf.diagonal(matrix, LIKE, **options)
    hf.diagonal(matrix, LIKE, checkpoint=tmp_path, callback=lambda r: r.matvecs >= 12, **options)
    resumed = hf.diagonal(matrix, LIKE, checkpoint=tmp_path, **options)
    assert torch.equal(flat(resumed.value), flat(whole.value))
    assert resumed.matvecs == whole.matvecs


@pytest.mark.parametrize("budget", [2, 30])
def test_an_asymmetric_matvec_is_refused(budget: int) -> None:
    matrix = torch.triu(torch.ones(N, N, dtype=torch.float64))
    with pytest.raises(ValueError, match="not symmetric"):
        hf.diagonal(hf.dense(matrix), torch.zeros(N).double(), max_matvecs=budget, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -0.1}, "rtol=-0.1"),
        ({"max_matvecs": 1}, "max_matvecs=1: it must be at least 2"),
        ({"method": "xtrace"}, "method='xtrace': choose one of auto, hutchinson, xdiag"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.diagonal(hf.dense(MATRICES["flat"]), LIKE, **options)


def test_start_is_refused_where_it_has_no_use() -> None:
    top = hf.lanczos(hf.dense(MATRICES["outliers"]), LIKE, k=2, seed=0)
    with pytest.raises(ValueError, match="start has no use for method='xdiag'"):
        hf.diagonal(hf.dense(MATRICES["outliers"]), LIKE, method="xdiag", start=top)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_matvecs": 5}, {"max_matvecs": 25}, {"rtol": 0.2}])
@pytest.mark.parametrize("name", MATRICES)
def test_intervals_cover(name: str, options: dict[str, Any]) -> None:
    matrix, seeds = MATRICES[name], 20
    truth = matrix.diagonal()
    runs = [hf.diagonal(hf.dense(matrix), LIKE, seed=s, **options) for s in range(seeds)]
    for level in (0.8, 0.95):
        ends = [tuple(map(flat, run.interval(level))) for run in runs]
        covered = torch.stack([(low <= truth) & (truth <= high) for low, high in ends])
        assert float(covered.double().mean()) >= level - 0.03
        sums = torch.tensor([run.by_leaf["a"].interval(level) for run in runs])  # type: ignore[attr-defined]
        part = float(truth[:50].sum())
        share = float(((sums[:, 0] <= part) & (part <= sums[:, 1])).double().mean())
        assert share >= level - 0.03 - 3 * (level * (1 - level) / seeds) ** 0.5
