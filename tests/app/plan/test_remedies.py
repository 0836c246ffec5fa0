"""Changes that make a run fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hessfunc.app.plan import (
    Algorithm,
    Hutchinson,
    Lanczos,
    Machine,
    Remedy,
    Setting,
    Slq,
    Transformer,
    Xtrace,
    cheapest,
    fewest_ranks,
    plan,
    remedies,
    whole,
)
from tests.app.plan.settings import GIB, RATES, SEVEN


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
    assert found == [
        "microbatches(batch, size / 8)",
        'functional(model, mesh=mesh, shard="layers.*")',
        "power_iteration(k=10), at most 1000 products",
        "the basis in host memory",
        "all of these",
    ]


def test_a_model_of_7b_fits_on_16_ranks_if_it_is_divided() -> None:
    divided = Setting(SEVEN, 8, divided=True)
    assert fewest_ranks(Remedy("", Setting(SEVEN, 8), Lanczos()), 77 * GIB) is None
    assert fewest_ranks(Remedy("", divided, Lanczos()), 77 * GIB) is not None
    sent = RATES.cost(divided, 1).sent
    # `bench.sharded` measures six exchanges of all weights.
    assert sent == pytest.approx(6 * 7 / 8 * SEVEN.weights, rel=1e-6)
    assert replace(RATES, batches=10).cost(divided, 1).sent == pytest.approx(10 * sent, rel=1e-3)


def test_the_cheapest_change_fits_and_says_its_time() -> None:
    machine = Machine(
        gradient_seconds=10.0, memory_bandwidth=2e12, network_bandwidth=2e10, latency=0.0
    )
    setting, algorithm = Setting(SEVEN, 8), Lanczos()
    found = list(remedies(setting, algorithm))
    unchanged = Remedy("", setting, algorithm)
    seconds = {remedy.how: remedy.seconds(machine) for remedy in found}
    assert seconds["microbatches(batch, size / 8)"] == unchanged.seconds(machine)
    # A product costs three instead of two gradients, besides the graph of one.
    again = seconds['functional(recompute="layers.*")'] / unchanged.seconds(machine)
    assert again == pytest.approx(4 / 3, rel=0.05)
    assert seconds["the basis in host memory"] > unchanged.seconds(machine)
    for memory in (2**38, 2**39):
        best = cheapest(setting, algorithm, memory, machine)
        assert best is not None
        assert best.fits(memory)
        assert best.seconds(machine) == min(r.seconds(machine) for r in found if r.fits(memory))
    assert cheapest(setting, algorithm, GIB, machine) is None
