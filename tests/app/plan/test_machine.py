"""Time and communication of a run."""

from __future__ import annotations

import pytest

from hessfunc.app.plan import Lanczos, Network, Setting, Slq, gradient_seconds
from tests.app.plan.settings import RATES, SEVEN


def test_a_ring_sends_each_sum_twice_and_each_block_once() -> None:
    network = Network(10**6, 10**5)
    cost = RATES.cost(Setting(network, 4), 3)
    assert cost.reduced == 2 * 3 / 4 * (3 * 10**6 + 2) * 4
    assert cost.gathered == 3 / 4 * 3 * 10**6 * 4
    assert RATES.cost(Setting(network, 4, sharded=False), 3).gathered == 0
    alone = RATES.cost(Setting(network, 1), 3, Lanczos(block_size=3).workload(Setting(network, 1)))
    assert (alone.sent, alone.wire) == (0, 0)
    assert alone.products == 1 + 2 * 3


def test_a_run_is_its_steps_and_its_checks() -> None:
    setting, algorithm = Setting(SEVEN, 64), Lanczos(k=10, steps=100)
    workload = algorithm.workload(setting)
    assert workload.products == 100 + 1 + 10 + 2
    run = RATES.in_all(setting, workload)
    step, check = RATES.cost(setting, 1, workload), RATES.cost(setting, 1)
    assert run.seconds == pytest.approx(100 * step.seconds + 13 * check.seconds)
    assert run.sent == pytest.approx(100 * step.sent + 13 * check.sent)


def test_a_gradient_takes_six_operations_a_parameter_and_token() -> None:
    assert gradient_seconds(10**9, 10**6, 1e15) == 6


def test_every_step_reads_the_basis_twice_and_the_last_vectors_again() -> None:
    setting = Setting(Network(10**6, 10**5))
    vectors = Lanczos(k=5, basis_size=20, steps=20).workload(setting).traffic / (4 * 10**6)
    assert vectors == 2 * sum(range(1, 21)) + 3 * 20
    assert Slq(probes=2, steps=9).workload(setting).traffic / (4 * 10**6) == 2 * (
        2 * sum(range(1, 10)) + 4 * 9
    )
