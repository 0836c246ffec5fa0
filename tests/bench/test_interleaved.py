from __future__ import annotations

from bench.interleaved import Ratio, ratio


def test_a_ratio_is_of_times_in_the_same_round() -> None:
    found = ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0])
    assert found.median == 2.0
    assert (found.low, found.high) == (2.0, 3.0)


def test_one_round_has_no_spread() -> None:
    assert ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)
