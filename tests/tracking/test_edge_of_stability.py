from __future__ import annotations

from statistics import mean

import pytest

from bench.edge_of_stability import descend
from hessfunc.tracking import stability

LR = 0.1


@pytest.mark.slow
def test_sharpness_rises_to_the_edge_of_stability_and_hovers_there() -> None:
    points = descend(LR, steps=1500, every=10)
    sharpness = [point.top[0] / stability(LR) for point in points]
    assert sharpness[0] < 0.7
    reached = next((i for i, value in enumerate(sharpness) if value >= 0.9), None)
    assert reached is not None
    assert all(0.7 < value < 1.3 for value in sharpness[reached:])
    assert mean(sharpness[-50:]) == pytest.approx(1, abs=0.1)
    # Training goes on all the same.
    assert points[-1].loss < 0.6 * points[reached].loss
    # Cold starts take 11.
    assert mean(point.matvecs for point in points[1:]) < 4
