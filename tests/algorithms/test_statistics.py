from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from hessfunc.algorithms.statistics import (
    _PRECISION,
    anytime_quantile,
    chi_squared_quantile,
    kolmogorov_quantile,
    largest_share,
    leaf_errors,
    mean_square,
    sphere_error,
    standard_error,
    student_mean,
    student_quantile,
)
from tests.reference import random_symmetric


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


def test_the_interval_of_a_mean_is_that_of_student() -> None:
    # The standard deviation of 1, 2, 3 is 1, and t(0.975; 2) = 4.303.
    mean, radius = student_mean(torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    torch.testing.assert_close(mean, torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(radius, torch.tensor([4.302653 / 3**0.5, 0.0]))


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


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_the_largest_share_is_where_the_tail_of_the_beta_distribution_is_reached(
    share: float,
) -> None:
    largest = float(largest_share(torch.tensor([share]).double(), 0.025, 40))
    assert share <= largest < 1
    upto = stats.beta(20 * largest, 20 * (1 - largest)).cdf(share)
    assert upto == pytest.approx(0.025, rel=1e-6) or share == 0


def test_degrees_of_a_mean_square_follow_from_the_kurtosis() -> None:
    weights = torch.full((2, 4), 0.25).double()
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0], [3.0, -3.0, 3.0, -3.0]]).double()
    square, degrees = mean_square(signs, weights, 10)
    assert square == pytest.approx((1 + 9) / 2)
    # The fourth moment is (1 + 81) / 2, and the kurtosis 41 / 25.
    assert degrees == int(2 * 10 / (41 / 25))
    assert mean_square(0 * signs, weights, 10) == (0.0, 20)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("samples", [20, 100, 5000])
def test_a_confidence_sequence_ends_where_its_martingale_reaches_the_level(
    level: float, samples: int
) -> None:
    # The martingale is (c^2 / (p + c^2))^(1/2) (V / (V - S^2 / (p + c^2)))^(p / 2) with the sum S
    # of p deviations from a candidate and the sum V of their squares.
    distance = anytime_quantile(level, samples) / math.sqrt(samples)
    total, squares = samples * distance, samples * (1 + distance**2)
    left = squares - total**2 / (samples + _PRECISION)
    logarithm = samples / 2 * math.log(squares / left)
    logarithm += math.log(_PRECISION / (samples + _PRECISION)) / 2
    assert logarithm == pytest.approx(-math.log(1 - level), rel=1e-9)


def test_a_confidence_sequence_covers_at_all_numbers_of_samples_together() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(1000, 200, generator=generator, dtype=torch.float64)
    count = torch.arange(1, 201, dtype=torch.float64)
    means = draws.cumsum(1) / count
    spread = (draws.square().cumsum(1) / count - means.square()).clamp_min(0).sqrt()
    quantiles = [anytime_quantile(0.9, p) for p in range(1, 201)]
    half = torch.tensor(quantiles).double() * spread / count.sqrt()
    half[:, :1] = math.inf
    covered = (means.abs() <= half).all(1).double().mean()
    # The standard error is 0.9 %. An interval of Student's covers fewer than half of the runs.
    assert 0.88 <= float(covered) <= 0.98


def test_a_confidence_sequence_is_infinite_for_few_samples() -> None:
    assert anytime_quantile(0.95, 0) == anytime_quantile(0.95, 5) == math.inf
    assert anytime_quantile(0.95, 7) < 8
    assert anytime_quantile(0.95, 100) == pytest.approx(3.24, abs=0.01)


def test_the_error_on_the_sphere_is_that_of_the_mean_of_quadratic_forms() -> None:
    A = random_symmetric(6)
    w = torch.randn(20_000, 6, dtype=torch.float64)
    w *= 6**0.5 / w.norm(dim=1, keepdim=True)
    quadratics, squares = ((w @ A) * w).sum(1), (w @ A).square().sum(1)
    scatter = float(quadratics.std()) / len(w) ** 0.5
    assert sphere_error(quadratics, squares, 6) == pytest.approx(scatter, rel=0.03)


def test_the_error_of_skewed_samples_by_hand() -> None:
    # A deviation of 5^(1/2) and a skewness of 12 / 5^(3/2): 1 + 12/25 + 1/5.
    samples = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    assert standard_error(samples) == pytest.approx(1.68)
    assert standard_error(-samples) == pytest.approx(1.68)
    assert standard_error(samples[:1]) == math.inf


@pytest.mark.parametrize(("stretch", "widening"), [(0.1, 4 / 3), (2.0, 8 / 3)])
def test_errors_of_leaves_are_widened_as_that_of_the_whole(stretch: float, widening: float) -> None:
    parts = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], dtype=torch.float64)
    # The deviations are 2 and 3^(1/2), and that of the sums 1, 3 and 8 is 13^(1/2).
    found = leaf_errors(parts, stretch * (13 / 3) ** 0.5)
    assert found == pytest.approx([widening * 2 / 3**0.5, widening])
