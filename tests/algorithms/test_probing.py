"""A run has converged if and only if the interval that it reports is within its tolerance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf

N = 130
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
LIKE = torch.zeros(N, dtype=torch.float64)
SPECTRA = {
    "1/i": 1 / INDEX,
    "flat": torch.linspace(1, 3, N, dtype=torch.float64),
    "ten ones": torch.where(INDEX <= 10, 1.0, 1e-3).double(),
    "rank one": torch.where(INDEX == 1, 1.0, 0.0).double(),
    "zero": 0 * INDEX,
}
TRACES = {
    "trace": hf.trace,
    "hutchinson": hf.hutchinson,
    "hutchinson, sphere": partial(hf.hutchinson, kind="sphere"),
    "hutchpp": hf.hutchpp,
    "xtrace": hf.xtrace,
    "xnystrace": hf.xnystrace,
}
DIAGONALS = {
    "diagonal": hf.diagonal,
    "hutchinson_diagonal": hf.hutchinson_diagonal,
    "xdiag": hf.xdiag,
}
STOPS = [
    {"rtol": 0.05, "max_matvecs": 120},
    {"rtol": 0.005, "max_matvecs": 100},
    {"rtol": 0.3, "max_matvecs": 8},
    {"rtol": 1e-3, "max_matvecs": 300},
    {"rtol": 1e-30, "max_matvecs": 200},
    {"atol": 0.1, "max_matvecs": 120},
    {"max_matvecs": 50},
]


def scaled(values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda block: block * values


def within(
    result: hf.results.Estimate, rtol: float | None = None, atol: float | None = None
) -> bool:
    low, high = result.interval(0.95)
    tolerance = max((rtol or 0) * abs(result.value), atol or 0)
    return (rtol is not None or atol is not None) and (high - low) / 2 <= tolerance


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("estimator", TRACES)
def test_a_trace_has_converged_exactly_where_its_interval_is_narrow_enough(
    estimator: str, name: str
) -> None:
    for seed, stop in enumerate(STOPS):
        options: dict[str, Any] = dict(stop)
        run = TRACES[estimator]
        found = run(scaled(SPECTRA[name]), LIKE, seed=seed, **options)
        budget = options.pop("max_matvecs")
        assert found.reason.startswith("converged") == within(found, **options), (found, stop)
        assert found.matvecs <= budget


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("estimator", DIAGONALS)
def test_a_diagonal_has_converged_exactly_where_its_bound_is_small_enough(
    estimator: str, name: str
) -> None:
    for seed, rtol in enumerate([0.5, 0.1, 1e-30]):
        run = DIAGONALS[estimator]
        found = run(scaled(SPECTRA[name]), LIKE, rtol=rtol, max_matvecs=110, seed=seed)
        assert found.reason.startswith("converged") == (found.relative_error(0.95) <= rtol)


@pytest.mark.parametrize("estimator", DIAGONALS)
def test_the_diagonal_of_a_zero_matrix_converges(estimator: str) -> None:
    found = DIAGONALS[estimator](scaled(SPECTRA["zero"]), LIKE, rtol=0.1, seed=0)
    assert found.reason.startswith("converged")
    assert found.relative_error() == 0


@pytest.mark.parametrize("estimator", TRACES)
def test_no_budget_is_spent_where_the_interval_is_narrow_enough(estimator: str) -> None:
    """The flat spectrum is estimated to 5 % by a few probes."""
    found = TRACES[estimator](scaled(SPECTRA["flat"]), LIKE, rtol=0.05, max_matvecs=125, seed=0)
    assert found.reason.startswith("converged")
    assert found.matvecs <= 40


@pytest.mark.parametrize("estimator", [*TRACES, *DIAGONALS])
@pytest.mark.parametrize("budget", [math.inf, math.nan])
def test_a_budget_without_end_is_refused(estimator: str, budget: float) -> None:
    run = (TRACES | DIAGONALS)[estimator]
    with pytest.raises(ValueError, match="max_matvecs"):
        run(scaled(SPECTRA["flat"]), LIKE, max_matvecs=budget)


@pytest.mark.parametrize("estimator", TRACES)
@pytest.mark.parametrize(
    "matrix",
    [[[3.0]], [[0.0]], [[0.0, 1], [1, 0]], [[2.0, 1], [1, 2]], [[1.0] * 3] * 3],
    ids=str,
)
def test_small_matrices_are_covered_at_small_budgets(
    estimator: str, matrix: list[list[float]]
) -> None:
    A = torch.tensor(matrix, dtype=torch.float64)
    if estimator == "xnystrace" and float(torch.linalg.eigvalsh(A)[0]) < 0:
        pytest.skip("indefinite")
    least = {"hutchpp": 6, "xtrace": 4}.get(estimator, 3)
    like, wrong = torch.zeros(len(A), dtype=torch.float64), 0
    for seed in range(20):
        found = TRACES[estimator](hf.dense(A), like, max_matvecs=least, seed=seed)
        low, high = found.interval(0.99)
        wrong += not low - 1e-12 <= float(A.trace()) <= high + 1e-12
    assert wrong <= 1


@pytest.mark.parametrize("estimator", ["hutchpp", "xtrace", "xnystrace"])
def test_products_in_bfloat16_reach_a_tolerance_above_their_rounding(estimator: str) -> None:
    basis = torch.linalg.qr(
        torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).Q
    A = (basis * torch.arange(1, 6)) @ basis.mT
    for seed in range(5):
        found = TRACES[estimator](
            lambda block: (block.double() @ A).bfloat16(),
            LIKE.bfloat16(),
            rtol=0.08,
            max_matvecs=100,
            seed=seed,
        )
        low, high = found.interval(0.99)
        assert low <= 15 <= high
        assert found.reason.startswith("converged")


# Products that are random, or of a matrix that is not symmetric


@pytest.mark.parametrize("n", [1, 2, 10, 30])
@pytest.mark.parametrize("estimator", ["hutchinson", "hutchpp", "xtrace", "xnystrace", *DIAGONALS])
def test_random_products_are_not_exact(estimator: str, n: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(block: Tensor) -> Tensor:
        noise = torch.randn(block.shape, dtype=block.dtype, generator=generator)
        return 2 * block + 3 * noise

    run = (TRACES | DIAGONALS)[estimator]
    with pytest.raises(ValueError, match=r"not deterministic|not positive"):
        run(noisy, torch.zeros(n, dtype=torch.float64), rtol=1e-3, max_matvecs=100, seed=0)


@pytest.mark.parametrize("estimator", ["hutchpp", "xtrace", "xdiag"])
def test_a_matrix_that_is_not_symmetric_is_refused(estimator: str) -> None:
    B = torch.randn(
        100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).triu()
    run = (TRACES | DIAGONALS)[estimator]
    with pytest.raises(ValueError, match="not symmetric"):
        run(lambda v: v @ B.mT, LIKE[:100], max_matvecs=40, seed=0)


@pytest.mark.parametrize("tolerance", [{}, {"rtol": 1e-3}])
@pytest.mark.parametrize("estimator", [*TRACES, *DIAGONALS])
def test_a_budget_of_n_products_is_exact(estimator: str, tolerance: dict[str, float]) -> None:
    """With a tolerance random probes come first, and cost at most as much."""
    if estimator == "hutchinson, sphere":
        pytest.skip("a kind of random probes was asked for")
    values = 1 / INDEX[:50]
    run = (TRACES | DIAGONALS)[estimator]
    found = run(
        scaled(values), LIKE[:50], max_matvecs=150 if tolerance else 50, seed=0, **tolerance
    )
    assert found.matvecs <= (100 if tolerance else 50)
    assert found.reason.startswith("converged" if tolerance else "exact")
    truth = values if estimator in DIAGONALS else values.sum()
    error = torch.as_tensor(found.value - truth).norm() / torch.as_tensor(truth).norm()
    assert float(error) < (1e-3 if tolerance else 1e-13)


def test_a_confidence_sequence_holds_at_all_stops_together() -> None:
    values = SPECTRA["1/i"]
    covered, covered_leaf, fixed, seeds = 0, 0, 0, 20
    basis = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(1))).Q
    matrix = (basis.double() * values) @ basis.double().mT
    matrix = (matrix + matrix.mT) / 2
    like = {"a": torch.zeros(50).double(), "b": torch.zeros(N - 50).double()}
    for seed in range(seeds):
        seen: list[hf.results.Estimate] = []
        hf.hutchinson(
            hf.dense(matrix),
            like,
            kind="signs",
            max_matvecs=60,
            block_size=4,
            confidence="anytime",
            seed=seed,
            callback=seen.append,
        )
        true = float(matrix.trace())
        ends = [found.interval(0.9) for found in seen]
        covered += all(low <= true <= high for low, high in ends)
        true_leaf = float(matrix.diagonal()[:50].sum())
        parts = [found.by_leaf["a"].interval(0.9) for found in seen]  # type: ignore[attr-defined]
        covered_leaf += all(low <= true_leaf <= high for low, high in parts)
        ends = [dataclasses.replace(found, confidence="fixed").interval(0.9) for found in seen]
        fixed += all(low <= true <= high for low, high in ends)
    # Fewer than 15 of 20 have the probability 1 % at a coverage of 90 %.
    assert covered >= 15
    assert covered_leaf >= 15
    assert fixed < covered


@pytest.mark.parametrize("estimator", [hf.trace, partial(hf.hutchinson, kind="sphere")])
def test_a_confidence_sequence_stops_within_the_tolerance(estimator: Any) -> None:
    options: Any = {"rtol": 0.05, "max_matvecs": 120, "seed": 0, "confidence": "anytime"}
    found = estimator(scaled(SPECTRA["flat"]), LIKE, **options)
    assert found.reason.startswith("converged")
    assert within(found, rtol=0.05)
    assert found.confidence == "anytime"


def test_a_wrong_confidence_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence='always'"):
        hf.hutchinson(scaled(SPECTRA["flat"]), LIKE, confidence="always")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no use for method='xtrace'"):
        hf.trace(scaled(SPECTRA["flat"]), LIKE, method="xtrace", confidence="anytime")
