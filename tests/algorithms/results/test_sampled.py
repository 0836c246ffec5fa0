"""Sources of the noise of an estimate from random batches, and advice."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from hessfunc.algorithms.results.sampled import SampledEstimate


def estimate(probes: float, data: float, r: int = 2) -> SampledEstimate:
    """An estimate with these components."""
    return SampledEstimate(
        value=1.0,
        stderr=0.1,
        degrees=9,
        samples=torch.ones(10),
        by_leaf={},
        variance_probes=probes,
        variance_data=data,
        draws=10,
        probes_per_draw=r,
        matvecs=10 * r,
        passes=10,
        reason="",
        seed=0,
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            estimate(1.0, 100.0),
            "100% comes from the data.*more draws, with fewer probes.*about 1 is",
        ),
        (estimate(80.0, 1.0), "98% from the probes: take more probes.*about 10 are best"),
        (estimate(80.0, 0.0), " 0% comes from the data and 100% from the probes: take more probes"),
        (
            estimate(0.0, 3.0),
            "100% comes from the data and 0% from.*more draws, with fewer.*about 1 is",
        ),
        (
            estimate(3.0, 1.0),
            "60% from the probes.*take more draws; the number of probes per draw, 2, is the best",
        ),
        (estimate(0.0, 0.0), "not drawn can differ: draw all of them"),
        (estimate(math.nan, math.nan, 1), "take 2 probes per draw"),
    ],
)
def test_advice_is_what_the_components_say(found: SampledEstimate, words: str) -> None:
    assert re.search(words, found.advice), found.advice


def test_probes_that_dominate_are_compared_with_probes_of_all_batches() -> None:
    few = replace(estimate(80.0, 1.0), population=100)
    assert "`hutchinson(draws.full, like)`" in few.advice
    assert "hutchinson" not in replace(estimate(1.0, 100.0), population=100).advice


@pytest.mark.parametrize(("probes", "data", "cost"), [(50.0, 2.0, 1.25), (3.0, 1.0, 8.0)])
def test_best_number_of_probes_has_the_least_variance_for_its_work(
    probes: float, data: float, cost: float
) -> None:
    def variance_times_work(r: float) -> float:
        return (data + probes / r) * (cost + r)

    best = estimate(probes, data).best_probes_per_draw(cost)
    for other in (0.8 * best, 1.25 * best):
        assert variance_times_work(best) < variance_times_work(other)
    with pytest.raises(ValueError, match="cost=0"):
        estimate(probes, data).best_probes_per_draw(0)
