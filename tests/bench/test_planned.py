from __future__ import annotations

import pytest

from bench.planned import ALGORITHMS, WIDTHS, Compared, Taken, markdown, planned
from hessfunc.app.plan import Machine

RATES = Machine(gradient_seconds=0.1, memory_bandwidth=1e9, network_bandwidth=1e8, latency=1e-4)


def rank(counted: int, seconds: float) -> Taken:
    return Taken(counted, 2 * counted, 1000, RATES, seconds, products=10)


def test_a_plan_is_compared_with_the_rank_that_takes_the_most() -> None:
    plan = planned(WIDTHS[0], 2, "slq", 1000)
    peak = plan.peak.total
    found = Compared("slq", plan, [rank(peak // 2, 1.0), rank(peak, 3.0)])
    assert found.counted == pytest.approx(1)
    assert found.resident == pytest.approx(0.5)
    expected, measured = found.seconds
    assert measured == 0.3
    assert expected > (1 + 2 * 2) / 2 * RATES.gradient_seconds


def test_the_table_has_a_row_for_each_run() -> None:
    plans = [planned(WIDTHS[0], 1, name, 0) for name in ALGORITHMS]
    found = [Compared("x", plan, [rank(plan.peak.total, 1.0)]) for plan in plans]
    lines = markdown(found).splitlines()
    assert len(lines) == 2 + len(ALGORITHMS)
    for line, plan in zip(lines[2:], plans, strict=True):
        assert f"| {plan.setting.network.params:,}" in line
        assert "| 1.00" in line
