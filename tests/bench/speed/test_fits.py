from __future__ import annotations

import math

import pytest

from bench.speed.fits import power


def test_a_power_law_is_found() -> None:
    sizes = [1e4, 1e5, 1e6, 1e7]
    fit = power(sizes, [3 * n**0.75 for n in sizes])
    assert fit.exponent == pytest.approx(0.75)
    assert fit.factor == pytest.approx(3)
    assert fit.stderr == pytest.approx(0, abs=1e-9)


def test_the_error_of_the_exponent_is_that_of_least_squares() -> None:
    # Logarithms 0, 1, 2 and 0, 2, 2: the slope is 1, the rest -1/3, 2/3, -1/3.
    fit = power([1, math.e, math.e**2], [1, math.e**2, math.e**2])
    assert fit.exponent == pytest.approx(1)
    assert fit.stderr == pytest.approx(math.sqrt(6 / 9 / 2))


def test_two_points_have_no_error() -> None:
    assert power([1, 2], [1, 4]).exponent == pytest.approx(2)
    assert math.isinf(power([1, 2], [1, 4]).stderr)
