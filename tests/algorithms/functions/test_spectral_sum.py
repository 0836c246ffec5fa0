from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.functions import spectral_sum as module
from tests.reference.spectra import symmetric

N = 300
OUTLIERS = torch.tensor([100.0, 60, 30, 20, 10, 8, 6, 5, 4, 3]).double()
BULK = torch.randn(N - 10, generator=torch.Generator().manual_seed(0)).double()
SPECTRA = {
    "net": torch.cat([OUTLIERS, 0.02 * BULK.abs()]),
    "decay": 1 / torch.arange(1.0, N + 1).double(),
    "step": torch.where(torch.arange(N) < 10, 1.0, 1e-3).double(),
}
LIKE = torch.zeros(N).double()
DAMPING = 0.05


def truth(values: Tensor) -> float:
    return float(torch.log(values + DAMPING).sum())


def run(values: Tensor, **options: Any) -> hf.results.Estimate:
    options = {"damping": DAMPING, "smallest": 0.0, "max_matvecs": 400} | options
    return hf.logdet(lambda block: block * values, LIKE, **options)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_run_stops_at_its_tolerance(spectrum: str) -> None:
    values = SPECTRA[spectrum]
    covered = 0
    for seed in range(10):
        found = run(values, rtol=0.03, seed=seed)
        low, high = found.interval()
        assert found.reason.startswith("converged")
        assert (high - low) / 2 <= 0.03 * abs(found.value)
        covered += low <= truth(values) <= high
    assert covered >= 8


def test_smaller_tolerances_take_more_products() -> None:
    products = [run(SPECTRA["net"], rtol=rtol, seed=0).matvecs for rtol in (0.2, 0.06, 0.03)]
    assert products == sorted(products)
    assert products[0] < products[-1] < N


def test_all_eigenvalues_where_they_cost_less_than_probes() -> None:
    values = SPECTRA["net"]
    found = run(values, rtol=1e-5, seed=0)
    assert found.matvecs == N
    assert found.value == pytest.approx(truth(values), rel=1e-9)
    assert found.stderr == 0
    assert "converged" in found.reason


def test_a_budget_is_used_up_without_a_tolerance() -> None:
    values = SPECTRA["decay"]
    for budget in (1, 7, 50):
        calls: list[int] = []

        def matvec(block: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(len(block))
            return block * values

        found = hf.logdet(matvec, LIKE, damping=DAMPING, smallest=0.0, max_matvecs=budget, seed=1)
        assert found.matvecs == sum(calls) <= budget
        assert found.reason.startswith("budget exhausted")
        low, high = found.interval(0.999)
        assert low <= truth(values) <= high
    # Steps that the bounds do not need would leave fewer probes.
    assert len(found.samples) >= 5


def test_later_probes_share_their_passes() -> None:
    found = run(SPECTRA["decay"], rtol=0.005, seed=0, max_matvecs=250)
    assert len(found.samples) > 4
    assert found.passes < found.matvecs / 3


def test_other_functions_of_indefinite_matrices() -> None:
    values = torch.linspace(-1, 2, N).double()
    found = hf.trace_of_function(lambda block: block * values, torch.exp, LIKE, rtol=0.05, seed=0)
    low, high = found.interval()
    assert low <= float(values.exp().sum()) <= high
    assert found.matvecs < 100


def test_an_effective_dimension_to_a_tolerance() -> None:
    values = SPECTRA["net"]
    found = hf.trace_of_function(
        lambda block: block * values,
        lambda x: x / (x + DAMPING),
        LIKE,
        smallest=0.0,
        rtol=0.1,
        seed=0,
        max_matvecs=250,
    )
    low, high = found.interval()
    assert low <= float((values / (values + DAMPING)).sum()) <= high
    assert found.reason.startswith("converged")


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    values = torch.linspace(-1, 2, N).double()
    with pytest.raises(ValueError, match="f is not finite at .* nodes, the smallest -"):
        hf.logdet(lambda block: block * values, LIKE, seed=0)


def test_unbounded_logarithms_are_not_converged() -> None:
    found = hf.logdet(lambda block: block * SPECTRA["decay"], LIKE, rtol=0.5, max_matvecs=6, seed=0)
    assert not found.reason.startswith("converged")
    assert "f is not bounded" in found.reason
    assert math.inf in found.interval()


def test_the_estimate_agrees_with_that_of_slq() -> None:
    matrix = symmetric(SPECTRA["decay"])
    found = hf.logdet(hf.dense(matrix), LIKE, damping=1.0, smallest=0.0, max_matvecs=30, seed=4)
    steps = found.matvecs // len(found.samples)
    density = hf.slq(hf.dense(matrix), LIKE, probes=len(found.samples), steps=steps, seed=4)
    mean = density.mean(lambda x: torch.log(x + 1), smallest=0.0)
    assert found.value == pytest.approx(N * mean.value, rel=1e-4)


def test_memory_limits_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_to", lambda space: 4 * 8 * N * 5)
    found = run(SPECTRA["net"], max_matvecs=20, seed=0)
    assert found.passes == 20
    assert len(found.samples) == 4


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    whole = run(SPECTRA["net"], rtol=0.015, seed=3)
    run(
        SPECTRA["net"],
        rtol=0.015,
        seed=3,
        checkpoint=tmp_path,
        callback=lambda found: found.matvecs > 20,
    )
    again = run(SPECTRA["net"], rtol=0.015, seed=3, checkpoint=tmp_path)
    assert again.value == whole.value
    assert again.interval() == whole.interval()
