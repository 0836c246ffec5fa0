"""Pools of estimates of one matrix, or of batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.cases import Case, case
from tests.reference import gauss_newton
from tests.reference.spectra import symmetric

LIKE = {"a": torch.zeros(10).double(), "b": torch.zeros(50).double()}
MATRIX = symmetric(torch.linspace(-1, 4, 60))


def test_a_pool_has_parts_with_intervals() -> None:
    runs = [hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=s) for s in range(3)]
    pooled = hf.pool(runs, [1, 2, 3])
    expected = math.hypot(
        *(w / 6 * r.by_leaf["a"].stderr for w, r in zip([1, 2, 3], runs, strict=True))
    )
    assert pooled.by_leaf["a"].stderr == pytest.approx(expected)


@pytest.mark.parametrize(
    "other",
    [
        (torch.eye(30).double(), torch.zeros(30).double()),
        (torch.eye(60).double(), {"a": torch.zeros(50).double(), "b": torch.zeros(10).double()}),
        (torch.eye(60).double(), {"a": torch.zeros(2, 5).double(), "b": torch.zeros(50).double()}),
        (torch.eye(60).double(), {"c": torch.zeros(10).double(), "b": torch.zeros(50).double()}),
    ],
    ids=["dimension", "sizes", "shapes", "names"],
)
def test_estimates_of_different_matrices_are_not_pooled(other: tuple[Tensor, Any]) -> None:
    first = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=0)
    second = hf.hutchinson(hf.dense(other[0]), other[1], max_matvecs=20, seed=1)
    with pytest.raises(ValueError, match="different matrices"):
        hf.pool([first, second])


def test_a_trace_and_a_norm_are_not_pooled() -> None:
    first = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=0)
    second = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=1).squared_frobenius
    assert second is not None
    with pytest.raises(ValueError, match="different matrices"):
        hf.pool([first, second])


def test_an_estimate_and_a_pool_with_it_are_not_independent() -> None:
    runs = [hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=s) for s in range(2)]
    with pytest.raises(ValueError, match="share a seed"):
        hf.pool([hf.pool(runs), runs[0]])


@pytest.mark.parametrize("weights", [[1.0, math.nan], [1.0, math.inf], [-1.0, 2.0]])
def test_weights_that_are_not_finite_are_refused(weights: list[float]) -> None:
    runs = [hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=s) for s in range(2)]
    with pytest.raises(ValueError, match="weights"):
        hf.pool(runs, weights)


def test_estimates_of_one_quantity_that_contradict_each_other_are_refused() -> None:
    runs = [
        hf.hutchinson(hf.dense(s * MATRIX), LIKE, max_matvecs=50, seed=seed)
        for seed, s in enumerate([1.0, 1.0, 3.0])
    ]
    assert hf.pool(runs[:2]).matvecs == 100
    with pytest.raises(ValueError, match=r"estimates\[[01]\] and estimates\[2\] contradict"):
        hf.pool(runs)
    # Those of different batches have weights.
    assert hf.pool(runs, [1, 1, 1]).value == pytest.approx(sum(r.value for r in runs) / 3)


SPECTRA = {
    "rank one": torch.cat([torch.ones(1), torch.zeros(99)]),
    "ten ones": torch.cat([torch.ones(10), 1e-3 * torch.ones(90)]),
    "1/i": 1 / torch.arange(1.0, 101.0),
    "flat": torch.linspace(1, 3, 100),
    "zero": torch.zeros(100),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("budget", [6, 12, 21, 60])
@pytest.mark.parametrize("estimator", [hf.hutchinson, hf.hutchpp, hf.xtrace])
def test_estimates_of_one_matrix_are_pooled(estimator: Any, budget: int, name: str) -> None:
    """Every pair of 16 seeds is compared."""
    matrix = symmetric(SPECTRA[name])
    like = torch.zeros(100).double()
    runs = [estimator(hf.dense(matrix), like, max_matvecs=budget, seed=seed) for seed in range(16)]
    runs += [estimator(hf.dense(matrix), like, max_matvecs=200, seed=seed) for seed in (100, 101)]
    pooled = hf.pool(runs)
    assert pooled.value == pytest.approx(float(matrix.trace()), abs=6 * pooled.stderr + 1e-9)
    norms = [run.squared_frobenius for run in runs]
    assert hf.pool([norm for norm in norms if norm is not None]).n == 100


def traces(seeds: list[int], sizes: list[int]) -> tuple[Case, list[hf.results.Estimate]]:
    """Trace estimates of batches of these sizes."""
    found, start, estimates = case("conv"), 0, []
    inputs, targets = found.batch
    for seed, size in zip(seeds, sizes, strict=True):
        batch = inputs[start : start + size], targets[start : start + size]
        start += size
        matvec = hf.ggnvp(found.loss)(found.params, batch)
        estimates.append(hf.hutchinson(matvec, found.params, max_matvecs=64, seed=seed))
    return found, estimates


def test_pooled_estimates_are_of_the_trace_over_all_examples() -> None:
    found, estimates = traces([0, 1], [4, 1])
    pooled = hf.pool(estimates, [4, 1])
    exact = float(gauss_newton(found.loss, found.params, found.batch).trace())
    assert pooled.value == pytest.approx(
        0.8 * estimates[0].value + 0.2 * estimates[1].value, rel=1e-12
    )
    assert pooled.stderr**2 == pytest.approx(
        (0.8 * estimates[0].stderr) ** 2 + (0.2 * estimates[1].stderr) ** 2
    )
    assert abs(pooled.value - exact) < 4 * pooled.stderr
    assert sum(pooled.by_leaf.values()) == pytest.approx(pooled.value)
    assert list(pooled.by_leaf) == list(found.params)
    assert pooled.matvecs == sum(e.matvecs for e in estimates)


def test_estimates_count_alike_without_weights() -> None:
    _, estimates = traces([0, 1], [3, 2])
    pooled = hf.pool(estimates)
    assert pooled.value == pytest.approx((estimates[0].value + estimates[1].value) / 2)
    low, high = pooled.interval(0.9)
    assert low < pooled.value < high


def test_the_pool_of_one_estimate_is_that_estimate() -> None:
    _, (estimate,) = traces([0], [5])
    pooled = hf.pool([estimate], [3.0])
    assert (pooled.value, pooled.stderr) == pytest.approx((estimate.value, estimate.stderr))
    assert pooled.interval() == pytest.approx(estimate.interval())


@pytest.mark.parametrize(
    ("seeds", "weights", "message"),
    [
        ([0, 1], [1.0], "2 estimates and 1 weights"),
        ([0, 1], [0.0, 0.0], "weights"),
        ([], None, "estimates"),
        ([3, 3], None, "share a seed"),
    ],
)
def test_estimates_that_cannot_be_pooled_are_refused(
    seeds: list[int], weights: list[float] | None, message: str
) -> None:
    _, estimates = traces(seeds, [2] * len(seeds))
    with pytest.raises((TypeError, ValueError), match=message):
        hf.pool(estimates, weights)


def test_estimates_of_matrices_of_another_size_are_refused() -> None:
    """Both traces are zero up to their errors, but the norms differ by a factor of 50."""
    values = torch.linspace(-1, 1, 200).double()
    estimates = [
        hf.hutchinson(
            lambda block, scale=scale: scale * (block * values).flip(1),
            torch.zeros(200).double(),
            max_matvecs=20,
            seed=seed,
        )
        for seed, scale in enumerate((1.0, 50.0))
    ]
    with pytest.raises(ValueError, match="squared Frobenius norms"):
        hf.pool(estimates)
    assert hf.pool(estimates, [1.0, 1.0]).n == 200
