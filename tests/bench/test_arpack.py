"""Products of `lanczos` beside those of ARPACK."""

from __future__ import annotations

import pytest

from bench.arpack import Question, measured


@pytest.mark.slow
def test_the_smallest_eigenvalue_of_a_trained_net_takes_at_most_70_products() -> None:
    arpack, _, default = measured(Question("digits", "SA", 1, 1e-2), seeds=1)
    assert default <= 70
    assert default < arpack / 2
