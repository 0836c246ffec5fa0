from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.trees import Matvec
from tests.reference.spectra import orthogonal, symmetric

N = 400
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
LIKE = torch.zeros(N, dtype=torch.float64)
LEAVES = {"a": torch.zeros(10, 10).double(), "b": torch.zeros(N - 100).double()}
ALTERNATING = torch.where(INDEX % 2 == 0, -1.0, 1.0).double()
SPECTRA = {
    "outliers": torch.where(INDEX <= 10, 100 / INDEX, 0.02),
    "1/i": 1 / INDEX,
    "exponential": 0.9**INDEX,
    "step": torch.where(INDEX <= 10, 1.0, 1e-3).double(),
    "flat": torch.linspace(1, 3, N, dtype=torch.float64),
    "indefinite": ALTERNATING * 0.9**INDEX,
}


def scaled(values: Tensor) -> Matvec:
    return lambda block: block * values


def contains(found: hf.results.LeafEstimate | hf.results.Estimate, value: float) -> bool:
    low, high = found.interval(0.999)
    slack = 1e-12 * abs(value)
    return low - slack <= value <= high + slack


@pytest.mark.parametrize("rank", [1, 2, 7, 20])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exact_rank(rank: int, sign: float) -> None:
    signs = torch.where(INDEX % 2 == 0, sign, 1.0)
    spectrum = torch.where(rank >= INDEX, INDEX * signs, 0.0)
    found = hf.trace(hf.dense(symmetric(spectrum)), LIKE, max_matvecs=60, seed=0)
    assert found.value == pytest.approx(float(spectrum.sum()), rel=1e-8)
    assert contains(found, float(spectrum.sum()))
    assert found.stderr < 1e-8


def test_repeated_values_are_exact() -> None:
    # A single Krylov chain contains each eigenvalue once.
    spectrum = torch.where(INDEX <= 12, 2.0, torch.where(INDEX <= 20, 1.0, 0.0)).double()
    found = hf.trace(scaled(spectrum), LIKE, max_matvecs=90, seed=0)
    assert found.value == pytest.approx(32, rel=1e-8)
    assert found.squared_frobenius is not None
    assert found.squared_frobenius.value == pytest.approx(12 * 4 + 8, rel=1e-8)


def test_zero() -> None:
    found = hf.trace(torch.zeros_like, LIKE, rtol=0.01, seed=0)
    assert (found.value, found.stderr, found.matvecs) == (0.0, 0.0, 5)
    assert found.reason.startswith("converged")


def test_identity() -> None:
    found = hf.trace(lambda block: 3 * block, LIKE, rtol=1e-8, seed=0)
    assert found.value == pytest.approx(3 * N, rel=1e-12)
    assert found.matvecs == 5


def test_a_flat_spectrum_costs_what_random_probes_cost() -> None:
    found = hf.trace(scaled(SPECTRA["flat"]), LIKE, max_matvecs=40, seed=0)
    assert found.degrees == found.matvecs == 40


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_matrices_are_exact(n: int) -> None:
    matrix = symmetric(torch.arange(n).double() - 1)
    found = hf.trace(hf.dense(matrix), torch.zeros(n).double(), seed=0)
    assert found.value == pytest.approx(float(matrix.trace()), abs=1e-12)
    assert found.matvecs <= n + 1
    few = hf.trace(hf.dense(symmetric(INDEX[:3])), torch.zeros(3).double(), max_matvecs=2, seed=0)
    assert contains(few, 6.0)


def test_a_budget_of_all_unit_vectors_is_exact() -> None:
    matrix = symmetric(torch.linspace(-1, 3, 60, dtype=torch.float64))
    found = hf.trace(hf.dense(matrix), torch.zeros(60).double(), max_matvecs=60, seed=0)
    assert found.value == pytest.approx(60, rel=1e-10)
    assert found.reason.startswith("exact")


def test_indefinite_with_zero_trace() -> None:
    values = torch.cat([INDEX[:8], -INDEX[:8], torch.zeros(N - 16).double()])
    found = hf.trace(hf.dense(symmetric(values)), LIKE, max_matvecs=60, seed=0)
    assert abs(found.value) < 1e-8 * 36
    assert contains(found, 0.0)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_interval_of_each_leaf_contains_its_part(name: str) -> None:
    matrix = symmetric(SPECTRA[name])
    parts = {"a": float(matrix.diagonal()[:100].sum()), "b": float(matrix.diagonal()[100:].sum())}
    for options in ({"max_matvecs": 3}, {"max_matvecs": 30}, {"rtol": 0.05, "max_matvecs": 200}):
        found = hf.trace(hf.dense(matrix), LEAVES, seed=1, **options)
        assert sum(found.by_leaf.values()) == pytest.approx(found.value, rel=1e-10)
        assert contains(found, float(matrix.trace()))
        assert all(contains(found.by_leaf[leaf], part) for leaf, part in parts.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECTRA)
def test_squared_frobenius_norm(name: str) -> None:
    values = SPECTRA[name]
    found = hf.trace(scaled(values), LIKE, max_matvecs=40, seed=0).squared_frobenius
    assert found is not None
    assert contains(found, float(values.square().sum()))


@pytest.mark.parametrize(
    ("name", "rtol", "most"),
    [("outliers", 0.01, 25), ("exponential", 0.01, 60), ("indefinite", 0.05, 150)],
)
def test_needs_fewer_products_than_others(name: str, rtol: float, most: int) -> None:
    options: dict[str, Any] = {"rtol": rtol, "max_matvecs": 300, "seed": 0}
    found = hf.trace(scaled(SPECTRA[name]), LIKE, **options)
    other = hf.xtrace(scaled(SPECTRA[name]), LIKE, **options)
    assert found.reason.startswith("converged")
    assert found.value == pytest.approx(float(SPECTRA[name].sum()), rel=2 * rtol)
    assert found.matvecs < min(most, 0.75 * other.matvecs)


def test_repeated_eigenvalues_do_not_cost_a_product_per_probe() -> None:
    found = hf.trace(scaled(SPECTRA["step"]), LIKE, rtol=0.01, max_matvecs=300, seed=0)
    assert found.reason.startswith("converged")
    assert found.matvecs < 60


def test_eigenpairs_at_hand_cost_one_product() -> None:
    matrix = symmetric(SPECTRA["outliers"])
    top = hf.lanczos(hf.dense(matrix), LEAVES, k=10, rtol=1e-6, seed=0)
    found = hf.trace(hf.dense(matrix), LEAVES, start=top, rtol=0.01, seed=0)
    assert found.matvecs == 6
    assert found.value == pytest.approx(float(matrix.trace()), rel=0.01)
    low, high = found.by_leaf["a"].interval(0.999)  # type: ignore[attr-defined]
    assert low <= float(matrix.diagonal()[:100].sum()) <= high
    assert found.squared_frobenius is not None
    assert found.squared_frobenius.value == pytest.approx(float(matrix.square().sum()), rel=1e-3)


def test_eigenpairs_that_have_not_converged_leave_the_trace_unbiased() -> None:
    matrix = symmetric(SPECTRA["1/i"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rough = hf.lanczos(hf.dense(matrix), LIKE, k=3, rtol=1e-9, max_matvecs=6, seed=0)
    runs = [
        hf.trace(hf.dense(matrix), LIKE, start=rough, max_matvecs=12, seed=s) for s in range(40)
    ]
    mean = sum(run.value for run in runs) / len(runs)
    spread = (sum(run.stderr**2 for run in runs) / len(runs) ** 2) ** 0.5
    assert abs(mean - float(matrix.trace())) < 4 * spread
    assert all(contains(run, float(matrix.trace())) for run in runs)


@pytest.mark.parametrize("method", ["hutchinson", "hutchpp", "xtrace", "xnystrace"])
def test_named_methods_are_the_estimators(method: Any) -> None:
    options: dict[str, Any] = {"max_matvecs": 30, "block_size": 5, "seed": 3}
    one = hf.trace(scaled(1 / INDEX), LIKE, method=method, **options)
    other = getattr(hf, method)(scaled(1 / INDEX), LIKE, **options)
    assert one.value == other.value
    assert one.stderr == other.stderr


def test_hutchinson_takes_the_eigenpairs() -> None:
    top = hf.lanczos(scaled(1 / INDEX), LIKE, k=2, seed=0)
    one = hf.trace(scaled(1 / INDEX), LIKE, method="hutchinson", start=top, max_matvecs=20, seed=3)
    other = hf.hutchinson(scaled(1 / INDEX), LIKE, deflate=top, max_matvecs=20, seed=3)
    assert one.value == other.value


def test_float32() -> None:
    found = hf.trace(scaled(SPECTRA["exponential"].float()), LIKE.float(), max_matvecs=90, seed=0)
    assert found.value == pytest.approx(float(SPECTRA["exponential"].sum()), rel=1e-4)
    assert contains(found, float(SPECTRA["exponential"].float().double().sum()))


def test_bfloat16() -> None:
    values = SPECTRA["outliers"].bfloat16()
    found = hf.trace(scaled(values), LIKE.bfloat16(), max_matvecs=40, seed=0)
    assert found.value == pytest.approx(float(values.double().sum()), rel=0.02)
    assert contains(found, float(values.double().sum()))


def test_a_run_is_resumed_where_it_was_stopped(tmp_path: Path) -> None:
    matrix = hf.dense(symmetric(SPECTRA["1/i"]))
    options: dict[str, Any] = {"rtol": 0.02, "max_matvecs": 200, "seed": 5}
    whole = hf.trace(matrix, LEAVES, **options)
    part = hf.trace(
        matrix, LEAVES, checkpoint=tmp_path, callback=lambda r: r.matvecs >= 12, **options
    )
    assert part.reason == "stopped by the callback"
    assert part.matvecs < whole.matvecs
    resumed = hf.trace(matrix, LEAVES, checkpoint=tmp_path, **options)
    assert resumed.value == whole.value
    assert resumed.stderr == whole.stderr
    assert resumed.matvecs == whole.matvecs


@pytest.mark.parametrize("budget", [2, 3, 50])
def test_an_asymmetric_matvec_is_refused(budget: int) -> None:
    matrix = torch.triu(torch.ones(N, N, dtype=torch.float64))
    with pytest.raises(ValueError, match="not symmetric"):
        hf.trace(lambda block: block @ matrix, LIKE, max_matvecs=budget, seed=0)


def test_a_random_matvec_is_refused() -> None:
    def matvec(block: Tensor) -> Tensor:
        return block * (1 / INDEX) * (torch.rand_like(block) > 0.5)

    with pytest.raises(ValueError, match="not deterministic"):
        hf.trace(matvec, LIKE, max_matvecs=50, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -0.1}, "rtol=-0.1"),
        ({"atol": -1.0}, "atol=-1.0"),
        ({"max_matvecs": 1}, "max_matvecs=1: it must be at least 2"),
        ({"block_size": 0}, "block_size=0"),
        ({"method": "hutch"}, "method='hutch': choose one of auto, hutchinson"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.trace(scaled(1 / INDEX), LIKE, **options)


def test_start_is_refused_where_it_has_no_use() -> None:
    top = hf.lanczos(scaled(1 / INDEX), LIKE, k=2, seed=0)
    with pytest.raises(ValueError, match="start has no use for method='xtrace'"):
        hf.trace(scaled(1 / INDEX), LIKE, method="xtrace", start=top)


def test_a_seed_repeats_a_run_and_rotations_do_not_matter() -> None:
    found = [hf.trace(scaled(SPECTRA["1/i"]), LIKE, max_matvecs=30, seed=s) for s in (1, 1, 2)]
    assert found[0].value == found[1].value != found[2].value
    basis = orthogonal(N, seed=1)
    rotated = hf.dense((basis * SPECTRA["1/i"]) @ basis.mT)
    errors = [
        hf.trace(rotated, LIKE, max_matvecs=30, seed=s).value - float(SPECTRA["1/i"].sum())
        for s in range(10)
    ]
    assert max(map(abs, errors)) < 0.5


def test_equal_eigenvalues_take_a_product_each() -> None:
    """Of 40 equal eigenvalues each chain shows one, and few probes hardly show that it does."""
    values, like = (
        torch.where(torch.arange(300) < 40, 1.0, 1e-8).double(),
        torch.zeros(300).double(),
    )
    errors = [
        abs(hf.trace(lambda v: v * values, like, max_matvecs=52, seed=s).value - 40)
        for s in range(8)
    ]
    assert sorted(errors)[6] < 0.4


def test_a_multiple_of_the_identity_is_not_deflated() -> None:
    values, like = 5 + 0.01 * torch.linspace(-1, 1, 300).double(), torch.zeros(300).double()
    found = hf.trace(lambda v: v * values, like, max_matvecs=40, seed=0)
    assert found.degrees == 40


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_matvecs": 5}, {"max_matvecs": 25}, {"rtol": 0.05}])
@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_cover(name: str, options: dict[str, Any]) -> None:
    values, seeds, n = SPECTRA[name][:150], 30, 150
    like, truth = {"a": torch.zeros(50).double(), "b": torch.zeros(n - 50).double()}, values.sum()
    leaf = float(values[:50].sum())

    def matvec(block: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": block["a"] * values[:50], "b": block["b"] * values[50:]}

    runs = [hf.trace(matvec, like, seed=s, **options) for s in range(seeds)]
    for level in (0.8, 0.95):
        least = level - 0.02 - 3 * (level * (1 - level) / seeds) ** 0.5
        ends = torch.tensor([run.interval(level) for run in runs])
        slack = 1e-12 * float(values.abs().sum())
        covered = (ends[:, 0] - slack <= truth) & (truth <= ends[:, 1] + slack)
        assert float(covered.double().mean()) >= least
        ends = torch.tensor([run.by_leaf["a"].interval(level) for run in runs])  # type: ignore[attr-defined]
        covered = (ends[:, 0] - slack <= leaf) & (leaf <= ends[:, 1] + slack)
        assert float(covered.double().mean()) >= least


def test_extreme_tolerances_and_scales() -> None:
    values = torch.logspace(-65, 65, N, dtype=torch.float64)
    found = hf.trace(lambda block: block * values, torch.zeros(N).double(), max_matvecs=20, seed=0)
    low, high = found.interval(0.999)
    assert low <= float(values.sum()) <= high
    tight = hf.trace(hf.dense(symmetric(SPECTRA["flat"])), LIKE, rtol=1e-300, max_matvecs=20)
    assert not tight.reason.startswith("converged")
