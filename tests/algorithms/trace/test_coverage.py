"""Intervals hold what they claim; ``python -m bench.coverage`` does the same over 1,000 seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hessfunc as hf
from tests.algorithms.spectra import decaying, symmetric

N = 400
SPECTRA = decaying(N)
ESTIMATORS = [hf.hutchpp, hf.xtrace, hf.xnystrace]
STOPS = [{"max_matvecs": 30}, {"max_matvecs": 70}, {"rtol": 0.03, "max_matvecs": 200}]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_intervals_cover_and_are_not_huge(estimator: Callable[..., hf.Estimate], name: str) -> None:
    values = SPECTRA[name]
    trace, like = float(values.sum()), torch.zeros(N).double()
    for stop in STOPS:
        found = [estimator(lambda v: v * values, like, seed=s, **stop) for s in range(100)]
        errors = torch.tensor([abs(one.value - trace) for one in found])
        widths = torch.tensor([one.interval()[1] - one.value for one in found])
        assert float((errors <= widths).double().mean()) > 0.9
        limited_by_rounding = float(errors.quantile(0.95)) < 1e-12 * trace
        assert limited_by_rounding or widths.median() < 2.3 * errors.quantile(0.95)


@pytest.mark.parametrize("kind", ["signs", "sphere"])
def test_skewed_samples_are_covered(kind: str) -> None:
    values = SPECTRA["polynomial"]
    trace, like = float(values.sum()), torch.zeros(N).double()
    matvec = hf.dense(symmetric(values))
    found = [
        hf.hutchinson(matvec, like, kind=kind, max_matvecs=30, block_size=30, seed=s)
        for s in range(300)
    ]
    covered = sum(low <= trace <= high for low, high in (one.interval() for one in found))
    assert covered / len(found) > 0.92
