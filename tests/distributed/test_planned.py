"""What ranks hold beside what was planned, in processes that do nothing else."""

from __future__ import annotations

import pytest

from bench.planned import WIDTHS, compared

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("algorithm", ["lanczos", "slq"])
def test_the_plan_is_within_15_percent(algorithm: str, ranks: int) -> None:
    found = compared(WIDTHS[0], ranks, algorithm)
    assert found.counted == pytest.approx(1, abs=0.15)
    assert found.resident == pytest.approx(1, abs=0.15)


def test_what_kernels_take_for_themselves_is_planned() -> None:
    assert compared(WIDTHS[0], 1, "hutchinson").resident == pytest.approx(1, abs=0.15)
