from __future__ import annotations

import math

import pytest
from scipy import stats

from hessfunc.algorithms.statistics import (
    chi_squared_quantile,
    kolmogorov_quantile,
    student_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 101, 1999, 5000])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.975, 0.9999])
def test_is_scipys(probability: float, degrees: int) -> None:
    expected = stats.t.ppf(probability, degrees)
    assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("degrees", [0.7, 1, 12.5, 1e6])
@pytest.mark.parametrize("probability", [0.05, 0.95, 0.99])
def test_chi_squared_is_scipys(probability: float, degrees: float) -> None:
    expected = stats.chi2.ppf(probability, degrees)
    assert chi_squared_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)


def test_one_sample_has_no_bound() -> None:
    assert student_quantile(0.975, 0) == math.inf


@pytest.mark.parametrize("probability", [1e-9, 0.05, 0.5, 0.9, 0.95, 0.99, 1 - 1e-9])
def test_kolmogorov_is_scipys(probability: float) -> None:
    expected = stats.kstwobign.ppf(probability)
    assert kolmogorov_quantile(probability) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("probability", [0.0, 1.0, 95.0, math.nan])
def test_kolmogorov_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(ValueError, match=r"choose a number in \(0, 1\)"):
        kolmogorov_quantile(probability)
