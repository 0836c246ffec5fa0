"""Changes that make a run fit."""

from __future__ import annotations

import pytest

from hessfunc.app.plan import (
    Algorithm,
    Hutchinson,
    Lanczos,
    Remedy,
    Setting,
    Slq,
    Transformer,
    Xtrace,
    fewest_ranks,
    plan,
    remedies,
    whole,
)
from tests.app.plan.settings import GIB, SEVEN


def test_the_fewest_ranks_fit_and_one_less_does_not() -> None:
    setting = Setting(Transformer.usual(10**9).network("bfloat16", tokens=512, context=512))
    run = Remedy("", setting, Slq(probes=4, steps=100))
    fewest = fewest_ranks(run, 40 * GIB)
    assert fewest is not None
    assert fewest > 1
    assert run.on(fewest).fits(40 * GIB)
    assert not run.on(fewest - 1).fits(40 * GIB)
    assert fewest_ranks(run, GIB) is None
    assert whole(setting, run.algorithm) > GIB


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("algorithm", [Lanczos(), Slq(probes=2), Hutchinson(), Xtrace()])
def test_each_remedy_takes_less_and_all_take_the_least(algorithm: Algorithm, ranks: int) -> None:
    setting = Setting(SEVEN, ranks, sharded=False)
    peaks = [remedy.peak for remedy in remedies(setting, algorithm)]
    assert len(peaks) > 2
    assert max(peaks) < plan(setting, algorithm).peak.total
    assert min(peaks) == peaks[-1]


def test_remedies_that_were_taken_are_not_named_again() -> None:
    setting = Setting(SEVEN.in_bfloat16().computed_again(), 8)
    algorithm = Lanczos(basis_dtype="bfloat16", basis_size=12)
    found = [remedy.how for remedy in remedies(setting, algorithm)]
    assert found == ["the basis in host memory", "all of these"]
