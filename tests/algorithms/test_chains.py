from __future__ import annotations

import math

import pytest
import torch

from hessfunc.algorithms.chains import Chains, expected_reduction

HALF = math.log(2)


def grown(*steps: tuple[int, float]) -> Chains:
    chains = Chains()
    for chain, reduction in steps:
        chains = chains.extended(chain, reduction)
    return chains


def test_the_first_step_waits_for_a_reduction_that_pays() -> None:
    # A reduction by a half saves half of the needed probes, and costs one product.
    assert Chains().choice(2.1, (), lambda: HALF) == 0
    assert Chains().choice(1.9, (), lambda: HALF) is None
    assert Chains().choice(100.0, (), lambda: 0.0) is None


def test_the_first_chain_has_three_steps_and_continues_while_they_pay() -> None:
    assert grown((0, 0.0), (0, 0.0)).choice(10.0, (0,), lambda: 0.0) == 0
    assert grown((0, 0.0), (0, HALF), (0, HALF), (0, HALF)).choice(2.1, (0,), lambda: 0.0) == 0
    assert grown((0, HALF), (0, 0.0), (0, 0.0), (0, 0.0)).choice(1.9, (0,), lambda: 0.0) is None


def test_chains_of_the_most_profitable_length_follow_the_first() -> None:
    chains = grown((0, 0.1), (0, 0.5), (0, 0.0), (0, 0.0), (0, 0.0))
    assert chains.choice(100.0, (0,), lambda: 0.0) == 1
    chains = chains.extended(1, 0.1)
    assert chains.length == 2
    assert chains.choice(100.0, (0, 1), lambda: 0.0) == 1
    chains = chains.extended(1, 0.5)
    assert chains.choice(100.0, (0, 1), lambda: 0.0) == 2
    # A reduction by 0.3 on average does not pay for three probes.
    assert chains.choice(3.0, (0, 1), lambda: 0.0) is None


def test_a_dead_chain_is_not_continued() -> None:
    assert grown((0, 2.0)).choice(100.0, (), lambda: 0.0) == 1
    assert grown((0, 2.0), (1, 2.0)).choice(100.0, (), lambda: 0.0) == 2


def test_unlucky_starts_do_not_end_the_search() -> None:
    chains = grown((0, 0.0), (1, 0.0), (2, 0.0))
    assert chains.choice(100.0, (), lambda: 0.1) == 3
    assert chains.extended(3, 0.0).choice(100.0, (), lambda: 0.1) is None


def test_the_better_of_both_chains_is_taken() -> None:
    first = [(0, 0.2)] * 4
    assert grown(*first, (1, 0.1), (1, 0.1), (1, 0.1)).choice(100.0, (0, 1), lambda: 0.0) == 0
    assert grown(*first, (1, 0.9)).choice(100.0, (0,), lambda: 0.0) == 2


@pytest.mark.parametrize(("equal", "n"), [(1, 200), (5, 200), (200, 200)])
def test_expected_reduction_is_one_over_the_number_of_equal_eigenvalues(equal: int, n: int) -> None:
    values = torch.where(torch.arange(n) < equal, 3.0, 0.0).double()
    rows = torch.randn(4000, n, dtype=torch.float64) * values
    share = 1 - math.exp(-expected_reduction(rows @ rows.mT))
    assert share == pytest.approx(min(0.9, 1 / equal), rel=0.1)


def test_expected_reduction_of_zero() -> None:
    assert expected_reduction(torch.zeros(4, 4).double()) == 0.0
