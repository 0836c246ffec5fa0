"""Parts of the measurement of quantisation."""

from __future__ import annotations

import math

from bench.quantisation import rows


def test_ratios_are_geometric_means_over_stories() -> None:
    nearest, factor = [1.0, 2.0, 4.0], [0.5, 0.5, 1.0]
    found = {(3, "uniform", "nearest"): nearest, (3, "by traces", "factor A"): factor}
    _, first, second = rows(found)
    assert first[3:] == ["2.3333 ± 3.7946", ""]
    # The logarithms of the ratios 1/2, 1/4, 1/4 have the standard deviation log 2 / sqrt 3.
    centre, width = -math.log(2) * 5 / 3, 4.302653 * math.log(2) / 3
    low, middle, high = (math.exp(centre + s * width) for s in (-1, 0, 1))
    assert second[4] == f"{middle:.2f} [{low:.2f}, {high:.2f}]"
